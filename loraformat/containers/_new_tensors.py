"""Tensors that are about to be written: what writers of all containers take, and the bytes of it."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loraformat.containers._strided import check_name
from loraformat.dtypes import Dtype
from loraformat.errors import refuse

Payload: TypeAlias = NDArray[Any] | Callable[[], "NDArray[Any] | bytes | bytearray | memoryview"]
NewTensor: TypeAlias = tuple[str, Dtype, Sequence[int], Payload]
"""Name, number form, shape, and the numbers: an array, or a function that returns it (or its bytes) when it is due."""


def check_new(tensors: Sequence[NewTensor]) -> None:
    """Refuse names that are unfit (LF301, LF110) or given twice (LF105)."""
    for name, count in Counter(name for name, *_ in tensors).items():
        check_name("new file", name)
        if count > 1:
            raise refuse("LF105", "new file", f"tensor {name!r} stands twice", "each name once")


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
