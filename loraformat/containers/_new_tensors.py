"""Tensors that are about to be written: what writers of all containers take, and the bytes of it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype

Payload: TypeAlias = NDArray[Any] | Callable[[], "NDArray[Any] | bytes | bytearray | memoryview"]
NewTensor: TypeAlias = tuple[str, Dtype, Sequence[int], Payload]
"""Name, number form, shape, and the numbers: an array, or a function that returns it (or its bytes) when it is due."""


def payload_bytes(tensor: NewTensor) -> memoryview:
    """Return the tensor's bytes: little-endian, C order.

    Raises:
        ValueError: the payload is not of the stated number form and shape.
    """
    name, dtype, shape, payload = tensor
    content = payload() if callable(payload) else payload
    if isinstance(content, np.ndarray):
        form = dtype.numpy()
        if content.shape != tuple(shape) or content.dtype.newbyteorder("<") != form:
            found = f"{content.dtype} {list(content.shape)}"
            raise ValueError(f"tensor {name!r}: an array {found} for {dtype.name} {list(shape)}")
        content = np.ascontiguousarray(content, dtype=form).reshape(-1).view(np.uint8).data
    view = memoryview(content).cast("B")
    if len(view) != dtype.count_bytes(math.prod(shape)):
        raise ValueError(f"tensor {name!r}: {len(view)} bytes for {dtype.name} {list(shape)}")
    return view
