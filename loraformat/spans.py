"""Byte ranges of files, and tensors that are read only when asked for.

Reads go through `pread` on a descriptor that is opened once: memory stays bounded, and a file that is cut off while we
read it gives an error instead of killing the process, as a memory map would.
"""

import math
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from loraformat.descriptors import Descriptor, read_state, refuse_changed
from loraformat.dtypes import Dtype
from loraformat.errors import refuse
from loraformat.limits import MAX_CONFIG_BYTES
from loraformat.system import read_into

_COMPARE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """A byte range of a file.

    Attributes:
        path: the file.
        offset: bytes from its start.
        length: bytes.
    """

    path: Path
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Part:
    """Rows and columns of a stored tensor, seen as a matrix: a slice of a fused weight, one of packed experts.

    Attributes:
        matrix: `(rows, columns)` of the whole tensor.
        rows: start, stop and step.
        columns: start, stop and step.
    """

    matrix: tuple[int, int]
    rows: tuple[int, int, int]
    columns: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)` of the part."""
        return len(range(*self.rows)), len(range(*self.columns))

    def index(self, row: int, column: int) -> int:
        """Return the position in the whole tensor, in elements, of an element of the part."""
        return range(*self.rows)[row] * self.matrix[1] + range(*self.columns)[column]


class InputFile:
    """A regular file for reading by position; safe to share between threads, and to hand to other processes.

    A copy is the file itself. Pickled it is its path, and opened where it is unpickled: there it must be unchanged.

    Raises:
        InputError: LF100 no such file, LF906 changed while read.
        RefusedError: LF905 not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._opened = Descriptor(self.path)
        self.size_bytes = self._opened.state.size_bytes
        self.close: Callable[[], object] = self._opened.shut
        weakref.finalize(self, self._opened.shut)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.path, self._opened.state[:2])

    @property
    def descriptor(self) -> int:
        """The open descriptor, for copying between files; it stays open as long as the file is."""
        return self._opened.take()

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: equal for two names of one file."""
        return self._opened.state.device, self._opened.state.inode

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`; LF906 when the file no longer has them."""
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: memoryview | NDArray[Any], offset: int) -> None:
        """Fill `buffer` from `offset`; LF906 when the file no longer has the bytes."""
        view = buffer.cast("B") if isinstance(buffer, memoryview) else buffer.data.cast("B")
        descriptor = self._opened.take()
        try:
            self._read_view(descriptor, view, offset)
        finally:
            self._opened.put_back()

    def _read_view(self, descriptor: int, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = read_into(descriptor, view[done:], offset + done)
            except OSError as error:
                found = f"cannot be read at byte {offset + done}: {error.strerror or error}"
                raise refuse("LF100", self.path, found, "a readable file") from error
            if count == 0:
                found = f"the file ends at byte {offset + done}"
                raise refuse("LF906", self.path, found, f"{self.size_bytes} bytes, as when it was opened")
            done += count

    def check_unchanged(self) -> None:
        """Raise LF906 when size, time of change or identity differ from when the file was opened."""
        descriptor = self._opened.take()
        try:
            if read_state(descriptor) != self._opened.state:
                raise refuse_changed(self.path)
        finally:
            self._opened.put_back()


def _open_again(path: Path, known: tuple[int, int]) -> InputFile:
    """Open a file in another process; size and time of change tell it, for devices have other numbers elsewhere."""
    file = InputFile(path)
    if file._opened.state[:2] != known:
        raise refuse_changed(path)
    return file


def open_input(source: str | os.PathLike[str] | InputFile) -> InputFile:
    """Return a file, opened if need be."""
    return source if isinstance(source, InputFile) else InputFile(source)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A named tensor in a file, unread.

    Attributes:
        name: its name in the file.
        dtype: its number form.
        shape: its dimensions.
        span: where its bytes are: little-endian, C order, `dtype.count_bytes` long.
        file: the open file that holds the span.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    span: Span
    file: InputFile

    def __repr__(self) -> str:
        """Say what it is in one line; records of many are printed in notebooks."""
        return f"<tensor {self.name!r}: {self.dtype.name} {list(self.shape)} in {self.file.path.name}>"

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether it has a span: its bytes lie one after another, in C order."""
        return True

    @property
    def extent(self) -> Span:
        """The bytes from its first element to its last, others between them where it is not contiguous."""
        return self.span

    def moved(self, file: InputFile, offset: int) -> "StoredTensor":
        """Return it as a tensor of a file that holds its own one from `offset`."""
        return replace(self, span=Span(file.path, self.span.offset + offset, self.span.length), file=file)

    def equals(self, other: "StoredTensor") -> bool:
        """Say whether another tensor has the same form, shape and bytes, reading both bit by bit."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        steps = range(0, self.span.length, _COMPARE_BYTES)
        return all(self._part(start) == other._part(start) for start in steps)

    def _part(self, start: int) -> bytes:
        return self.file.read(self.span.offset + start, min(_COMPARE_BYTES, self.span.length - start))

    def read(self) -> NDArray[Any]:
        """Return the tensor in its own number form, freshly read.

        Raises:
            InputError: LF106 packed numbers below one byte, of which an array cannot hold the bytes as they are.
        """
        if self.dtype.bits < 8:
            where = f"{self.file.path}, tensor {self.name!r}"
            raise refuse("LF106", where, f"packed {self.dtype.name}", "elements of whole bytes")
        array: NDArray[Any] = np.empty(self.shape, dtype=self.dtype.numpy())
        if self.span.length:
            self.file.read_into(array.reshape(-1).view(np.uint8), self.span.offset)
        return array

    def read_bytes(self) -> NDArray[np.uint8]:
        """Return its bytes as they are stored, packed ones too."""
        data: NDArray[np.uint8] = np.empty(self.span.length, np.uint8)
        if data.size:
            self.file.read_into(data, self.span.offset)
        return data

    def read_part(self, rows: range, columns: range) -> NDArray[Any]:
        """Return some of its numbers `(len(rows), len(columns))` in its own form, reading little more than these.

        Args:
            rows: of the tensor as a matrix, its first dimension and the rest; ascending.
            columns: likewise.

        Raises:
            InputError: as `read`.
        """
        if self.dtype.bits < 8:
            return self.read().reshape(self.shape[0], -1)[rows.start : rows.stop : rows.step]  # Says why not.
        form, width = self.dtype.numpy(), math.prod(self.shape[1:])
        first, last = (columns[0], columns[-1]) if columns else (0, -1)
        whole = rows.step == 1 and (first, last) == (0, width - 1)
        runs = [(rows.start, len(rows))] if whole else [(row, 1) for row in rows]
        held: NDArray[Any] = np.empty((len(rows), last + 1 - first), form)
        for place, (row, count) in enumerate(runs):
            start = self.span.offset + (row * width + first) * form.itemsize
            into = held[place : place + count]
            if into.size:
                self.file.read_into(into.reshape(-1).view(np.uint8), start)
        return held[:, :: columns.step]


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A small tensor whose numbers its file has in no run of bytes; they were read with the file's structure.

    Attributes:
        name: its name in the file.
        dtype: its number form.
        values: the numbers.
    """

    name: str
    dtype: Dtype
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return self.values.shape

    @property
    def elements(self) -> int:
        """The number of elements."""
        return self.values.size

    def read(self) -> NDArray[Any]:
        """Return the numbers."""
        return self.values

    def read_bytes(self) -> NDArray[np.uint8]:
        """Return the bytes of the numbers."""
        return np.ascontiguousarray(self.values).reshape(-1).view(np.uint8)


def read_small(path: Path, limit_bytes: int = MAX_CONFIG_BYTES) -> bytes:
    """Return the contents of a small file such as a configuration; LF110 above `limit_bytes`."""
    file = InputFile(path)
    if file.size_bytes > limit_bytes:
        raise refuse("LF110", path, f"{file.size_bytes} bytes", f"at most {limit_bytes}")
    return file.read(0, file.size_bytes)
