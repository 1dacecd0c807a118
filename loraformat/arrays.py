"""Tensors that lie in memory, of numpy, of torch, and of whatever numpy takes for an array; and files that do.

What is handed over is never written to. Equal addresses tell tensors that are one and the same, as offsets in a file
do.
"""

import math
import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import BY_NAME, Dtype
from loraformat.errors import refuse
from loraformat.spans import InputFile
from loraformat.strict_json import JsonValue

_PLAIN: Final = "a plain array of numpy or a plain strided tensor of torch"
_PLAIN_VALUES: Final = (str, int, float, bool, type(None))
_MENDS: Final = (
    ("full_tensor", "Gather it first: tensor.full_tensor()."),
    ("dequantize", "Give its numbers: tensor.dequantize()."),
)


@dataclass(frozen=True, slots=True, eq=False)
class HeldArray:
    """An array in memory.

    Attributes:
        original: the array itself.
        dtype: its number form.
        shape: its dimensions.
        strides: elements between neighbours, for each dimension.
        device: where it lies; empty for the machine's own memory.
        address: of its first element there.
    """

    original: Any
    dtype: Dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: str
    address: int

    @property
    def extent_bytes(self) -> int:
        """Bytes from its first element to its last."""
        if not math.prod(self.shape):
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.dtype.count_bytes(last + 1)

    def read_extent(self) -> NDArray[np.uint8]:
        """Return these bytes: those of the array, not a copy, where it lies in the machine's own memory."""
        if isinstance(self.original, np.ndarray):
            width = self.original.itemsize
            bare = self.original.view(f"V{width}")  # numpy's own function knows no types of others.
            count = self.extent_bytes // width
            flat: NDArray[Any] = np.lib.stride_tricks.as_strided(bare, (count,), (width,), writeable=False)
            return flat.view(np.uint8)
        torch = sys.modules["torch"]
        size = self.extent_bytes * 8 // self.dtype.bits
        flat = torch.as_strided(self.original, (size,), (1,)).cpu()
        data: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
        return data

    def make_like(self, data: NDArray[np.uint8], dtype: Dtype, shape: tuple[int, ...]) -> Any:
        """Return bytes as an array of the same library, on the same device."""
        if isinstance(self.original, np.ndarray):
            return data.view(dtype.numpy()).reshape(shape)
        torch = sys.modules["torch"]
        return torch.from_numpy(data).view(getattr(torch, dtype.name)).reshape(shape).to(self.original.device)


def is_array(value: object) -> bool:
    """Say whether a value is a tensor of any library."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def hold_array(name: str, value: Any) -> HeldArray:
    """Return a tensor of numpy or torch, or what numpy makes of another; nothing is copied that is numpy's or torch's.

    Raises:
        LoraformatError: LF106 a number form or a class of tensors whose numbers cannot be had.
    """
    if type(value).__module__.partition(".")[0] == "torch" or _is_torch(value):
        return _hold_torch(name, value)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refuse("LF106", f"tensor {name!r}", f"{_name_class(value)}: {error}", _PLAIN) from error
    dtype = BY_NAME.get(array.dtype.name)
    if dtype is None or dtype.bits < 8 or not array.dtype.isnative:
        raise refuse("LF106", f"tensor {name!r}", str(array.dtype), "a number form that safetensors has")
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)  # A view that runs backwards has no run of bytes from first to last.
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return HeldArray(array, dtype, array.shape, strides, "", array.ctypes.data)


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _hold_torch(name: str, value: Any) -> HeldArray:
    torch = sys.modules["torch"]
    tensor = value.detach()
    is_plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.device.type != "meta"
    dtype = BY_NAME.get(str(value.dtype).removeprefix("torch."))
    if not is_plain or dtype is None:
        found = f"{_name_class(value)}, {value.dtype}, {str(value.layout).removeprefix('torch.')}, on {value.device}"
        mend = next((advice for method, advice in _MENDS if not is_plain and method in vars(type(tensor))), "")
        raise refuse("LF106", f"tensor {name!r}", found, _PLAIN, mend)
    device = "" if tensor.device.type == "cpu" else str(tensor.device)
    return HeldArray(tensor, dtype, tuple(tensor.shape), tuple(tensor.stride()), device, tensor.data_ptr())


def _name_class(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def as_numpy(held: HeldArray) -> NDArray[Any]:
    """Return the numbers as an array of numpy; not to be written to."""
    if isinstance(held.original, np.ndarray):
        return held.original
    form = held.dtype.numpy()
    if not held.extent_bytes:
        return np.empty(held.shape, form)
    steps = [stride * form.itemsize for stride in held.strides]
    return np.lib.stride_tricks.as_strided(held.read_extent().view(form), held.shape, steps, writeable=False)


Bytes: TypeAlias = bytes | bytearray | memoryview
"""What holds bytes in memory."""


class HeldFile(InputFile):
    """Bytes in memory as if they were a file.

    Args:
        path: what they are called in messages; what they refer to is looked for in its folder.
        data: the bytes, which must stay as they are.
    """

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path = path
        self._data = memoryview(data).cast("B").toreadonly()
        self.size_bytes = len(self._data)
        self.close = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldFile, (self.path, bytes(self._data))

    @property
    def descriptor(self) -> int:
        """There is none."""
        raise TypeError("bytes in memory have no descriptor")

    @property
    def identity(self) -> tuple[int, int]:
        """What no file has."""
        return -1, id(self)

    def read_into(self, buffer: memoryview | NDArray[Any], offset: int) -> None:
        """Fill `buffer` from `offset`; LF906 when there are not so many bytes."""
        view = buffer.cast("B") if isinstance(buffer, memoryview) else buffer.data.cast("B")
        part = self._data[offset : offset + len(view)]
        if len(part) != len(view):
            raise refuse("LF906", self.path, f"the bytes end at {self.size_bytes}", f"{offset + len(view)}")
        view[:] = part

    def check_unchanged(self) -> None:
        """Do nothing: what a program does with its own bytes meanwhile is its own affair."""


class ArrayFile(InputFile):
    """Arrays of one device as if they were one file, in which an offset is an address.

    Args:
        path: what it is called in messages.
        arrays: the arrays.
    """

    def __init__(self, path: Path, arrays: Iterable[HeldArray]) -> None:
        self.path = path
        self._arrays = sorted(arrays, key=lambda held: (held.address, held.extent_bytes))
        self._starts = [held.address for held in self._arrays]
        self._read: dict[int, NDArray[np.uint8]] = {}
        self.size_bytes = sum(held.extent_bytes for held in self._arrays)
        self.close = self._read.clear

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayFile, (self.path, self._arrays)

    @property
    def descriptor(self) -> int:
        """There is none."""
        raise TypeError("arrays in memory have no descriptor")

    @property
    def identity(self) -> tuple[int, int]:
        """What no file has."""
        return -1, id(self)

    def read_into(self, buffer: memoryview | NDArray[Any], offset: int) -> None:
        """Fill `buffer` from the address `offset`."""
        view = buffer.cast("B") if isinstance(buffer, memoryview) else buffer.data.cast("B")
        index = bisect_right(self._starts, offset) - 1
        while self._starts[index] + self._arrays[index].extent_bytes < offset + len(view):
            index -= 1  # A view begins there that ends sooner.
            assert index >= 0, "a span lies in an array"
        start = offset - self._starts[index]
        view[:] = self._bytes(index)[start : start + len(view)].data

    def _bytes(self, index: int) -> NDArray[np.uint8]:
        """Return an array's bytes; those of another device are fetched once."""
        data = self._read.get(index)
        if data is None:
            data = self._read[index] = self._arrays[index].read_extent()
        return data

    def check_unchanged(self) -> None:
        """Do nothing: what a program does with its own arrays meanwhile is its own affair."""


def hold_arrays(tensors: Mapping[str, Any]) -> dict[str, HeldArray]:
    """Return those values of a state dict that are tensors, by name."""
    return {name: hold_array(name, value) for name, value in tensors.items() if is_array(value)}


def read_config(config: object) -> Mapping[str, JsonValue]:
    """Return a configuration as JSON would have it: a mapping, or an object of transformers or PEFT with `to_dict`.

    Raises:
        LoraformatError: LF832 neither.
    """
    told = config.to_dict() if hasattr(config, "to_dict") else config
    if told is None:
        return {}
    if not isinstance(told, Mapping):
        raise refuse("LF832", "config", f"{type(config).__name__}", "a mapping, or an object with to_dict()")
    return {str(name): _as_json(value) for name, value in told.items()}


def _as_json(value: Any) -> JsonValue:
    """Return what json.dump of such a configuration writes: names of types and members, sets as lists."""
    if isinstance(value, Enum):
        return _as_json(value.value)
    if isinstance(value, _PLAIN_VALUES):
        return value
    if isinstance(value, Mapping):
        return {str(name): _as_json(each) for name, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_as_json(each) for each in value), key=str)
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    return str(value)
