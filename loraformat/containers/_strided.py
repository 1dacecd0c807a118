"""What the containers with a layout of their own share: checked names and shapes, and tensors that are not C order."""

import math
import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.errors import refuse
from loraformat.limits import MAX_DIMS, MAX_NAME_BYTES
from loraformat.spans import InputFile, Span, StoredTensor

_MAX_ARRAY_BYTES: Final = 2**63 - 1

# Not str.isprintable: its answer changes with Python's Unicode tables, and a file must mean the same everywhere.
_UNFIT_IN_NAMES: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def check_name(path: object, name: str, what: str = "tensor name") -> None:
    """Refuse a name that could drive a terminal (LF301) or that is too long (LF110)."""
    if not name or _UNFIT_IN_NAMES.search(name):
        raise refuse("LF301", path, f"the {what} {name!a:.200}", "a name without control characters and bidi marks")
    size = len(name.encode())
    if size > MAX_NAME_BYTES:
        raise refuse("LF110", path, f"a {what} of {size} bytes, {name[:60]!r}...", f"at most {MAX_NAME_BYTES}")


def check_shape(where: str, shape: tuple[int, ...], dtype: Dtype, code: str) -> None:
    """Refuse more dimensions than we handle (LF110), negative sizes and sizes beyond 2^63 bytes (`code`)."""
    if len(shape) > MAX_DIMS:
        raise refuse("LF110", where, f"{len(shape)} dimensions", f"at most {MAX_DIMS}")
    # A zero elsewhere in the shape does not save an array library from the overflow.
    if min(shape, default=0) < 0 or dtype.count_bytes(math.prod(size or 1 for size in shape)) > _MAX_ARRAY_BYTES:
        raise refuse(code, where, f"shape {list(shape)!r:.200}", "sizes from 0, and fewer than 2^63 bytes")


def is_c_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Say whether elements with these strides, in elements, lie one after another; a size of 1 has no stride."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


class StridedTensor(StoredTensor):
    """A sound tensor that is not one run of bytes in C order: a transposed or sliced view, Fortran order.

    It can be read like any other. It has no span: asking for it raises LF114, so that nobody rewrites it in place.

    Args:
        name: its name in the file.
        dtype: its number form.
        shape: its dimensions.
        strides: elements between neighbours, for each dimension; not negative.
        extent: the bytes from its first to its last element.
        file: the open file.
    """

    __slots__ = ("_extent", "_strides")
    _extent: Span
    _strides: tuple[int, ...]

    def __init__(
        self,
        name: str,
        dtype: Dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        extent: Span,
        file: InputFile,
    ) -> None:
        fields = {"name": name, "dtype": dtype, "shape": shape, "file": file, "_strides": strides, "_extent": extent}
        for key, value in fields.items():
            object.__setattr__(self, key, value)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return StridedTensor, (self.name, self.dtype, self.shape, self._strides, self._extent, self.file)

    def __repr__(self) -> str:
        return f"StridedTensor({self.name!r}, {self.dtype.name}, {self.shape}, strides {self._strides})"

    @property
    def is_contiguous(self) -> bool:
        """It is not."""
        return False

    @property
    def extent(self) -> Span:
        """The bytes from its first element to its last."""
        return self._extent

    @property
    def span(self) -> Span:
        """There is none."""
        where = f"{self.file.path}, tensor {self.name!r}"
        mend = "Save the tensor contiguous: tensor.contiguous() in torch, numpy.ascontiguousarray in numpy."
        raise refuse("LF114", where, "a view that is not one run of bytes", "a contiguous tensor", mend)

    def read(self) -> NDArray[Any]:
        """Return the tensor in its own number form, in C order, freshly read."""
        form = self.dtype.numpy()
        flat = self._read_run(0, self._extent.length // form.itemsize)
        steps = [stride * form.itemsize for stride in self._strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False).copy(order="C")

    def read_bytes(self) -> NDArray[np.uint8]:
        """Return its bytes as they would be stored in C order."""
        return self.read().reshape(-1).view(np.uint8)

    def read_part(self, rows: range, columns: range) -> NDArray[Any]:
        """Return some of its numbers as `StoredTensor.read_part` does, by rows or by columns, whichever reads less."""
        across = self._place_columns(columns)
        down = np.arange(rows.start, rows.stop, rows.step) * self._strides[0]
        held: NDArray[Any] = np.empty((len(down), len(across)), self.dtype.numpy())
        if not held.size:
            return held
        if len(down) * np.ptp(across) <= len(across) * np.ptp(down):
            for place, start in enumerate(down):
                held[place] = self._pick(start + across)
        else:
            for place, start in enumerate(across):
                held[:, place] = self._pick(start + down)
        return held

    def moved(self, file: InputFile, offset: int) -> StoredTensor:
        """Return it as a tensor of a file that holds its own one from `offset`."""
        extent = Span(file.path, self._extent.offset + offset, self._extent.length)
        return StridedTensor(self.name, self.dtype, self.shape, self._strides, extent, file)

    def equals(self, other: StoredTensor) -> bool:
        """Say whether another tensor has the same form, shape and numbers, reading both bit by bit."""
        same = (self.dtype, self.shape) == (other.dtype, other.shape)
        return same and np.array_equal(self.read_bytes(), other.read_bytes())

    def _place_columns(self, columns: range) -> NDArray[np.int64]:
        """Return where in the extent, in elements, some columns of the first row stand."""
        indices = np.unravel_index(np.arange(columns.start, columns.stop, columns.step), self.shape[1:] or (1,))
        strides = self._strides[1:] or (0,)
        places = (np.asarray(index, np.int64) * stride for index, stride in zip(indices, strides, strict=True))
        return np.asarray(sum(places), np.int64)

    def _pick(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """Return the elements at some places of the extent, which are read with all between them."""
        first, last = int(places.min()), int(places.max())
        return self._read_run(first, last + 1 - first)[places - first]

    def _read_run(self, start: int, count: int) -> NDArray[Any]:
        """Return elements of the extent as they lie."""
        form = self.dtype.numpy()
        run: NDArray[Any] = np.empty(count, dtype=form)
        self.file.read_into(run.view(np.uint8), self._extent.offset + start * form.itemsize)
        return run
