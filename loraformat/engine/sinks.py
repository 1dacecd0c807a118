"""Where merged bytes go: into a file, beside a file that should have them already, or into memory."""

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from loraformat.files import copy_range, reserve_bytes, write_at
from loraformat.images import Copy, FileImage, Literal
from loraformat.outputs import output_errors
from loraformat.spans import InputFile

_STEP_BYTES: Final = 1 << 20
_MAX_RUNS: Final = 1000
"""Differences that are noted of one step; the last one of more is as long as all that remain."""


class Sink(Protocol):
    """One output file of a merge; its methods are called from any thread, each byte range once."""

    def reserve(self, length: int) -> None:
        """Be told how long the file is, before anything is written."""
        ...

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Take bytes at `offset`."""
        ...

    def copy(self, piece: Copy, offset: int) -> None:
        """Take bytes of an input file at `offset`."""
        ...


def put_piece(sink: Sink, piece: Copy | Literal, offset: int) -> None:
    """Hand one piece of an image to a sink."""
    if isinstance(piece, Literal):
        sink.write(piece.data, offset)
    else:
        sink.copy(piece, offset)


def put_image(sink: Sink, image: FileImage) -> None:
    """Hand a whole image to a sink; its blanks and the room for what is computed are left alone."""
    sink.reserve(image.size_bytes)
    for offset, piece in image.placed():
        if isinstance(piece, Copy | Literal):
            put_piece(sink, piece, offset)


@dataclass(frozen=True, slots=True)
class FileSink:
    """A new file, written by descriptor.

    Attributes:
        descriptor: open for writing.
        path: where the file will stand, for messages.
    """

    descriptor: int
    path: Path

    def reserve(self, length: int) -> None:
        """Give the file its full length at once; LF604 when there is no room."""
        with output_errors(self.path):
            if os.fstat(self.descriptor).st_size > length:  # a part that a killed run has left
                os.ftruncate(self.descriptor, length)
            reserve_bytes(self.descriptor, length)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes at `offset`."""
        with output_errors(self.path):
            write_at(self.descriptor, data, offset)

    def copy(self, piece: Copy, offset: int) -> None:
        """Copy inside the kernel where it can."""
        with output_errors(self.path):
            copy_range(piece.file.descriptor, piece.offset, self.descriptor, offset, piece.length)


@dataclass(frozen=True, slots=True)
class Difference:
    """Bytes of a file that are not what they should be.

    Attributes:
        offset: the first one.
        length: how many, one after another.
    """

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class CompareSink:
    """A file that should have the bytes already; what differs is noted.

    Attributes:
        file: the file.
        differences: what was found, in no order.
    """

    file: InputFile
    differences: list[Difference] = field(default_factory=list)

    def reserve(self, length: int) -> None:
        """Note a file of another length."""
        shorter, longer = sorted((length, self.file.size_bytes))
        if shorter != longer:
            self.differences.append(Difference(shorter, longer - shorter))

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Compare bytes at `offset`."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _STEP_BYTES):
            self._compare(view[start : start + _STEP_BYTES], offset + start)

    def copy(self, piece: Copy, offset: int) -> None:
        """Compare bytes of an input file at `offset`."""
        for start in range(0, piece.length, _STEP_BYTES):
            length = min(_STEP_BYTES, piece.length - start)
            self._compare(memoryview(piece.file.read(piece.offset + start, length)), offset + start)

    def _compare(self, expected: memoryview, offset: int) -> None:
        have = max(0, min(len(expected), self.file.size_bytes - offset))
        found = self.file.read(offset, have)  # What is missing at the end, `reserve` has noted.
        if found == expected[:have]:
            return
        places = np.flatnonzero(np.frombuffer(found, np.uint8) != np.frombuffer(expected[:have], np.uint8))
        gaps = np.flatnonzero(np.diff(places) > 1)[: _MAX_RUNS - 1]
        firsts, lasts = places[[0, *(gaps + 1)]], places[[*gaps, -1]]
        self.differences.extend(
            Difference(offset + first, last + 1 - first)
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)
        )


@dataclass(frozen=True, slots=True)
class PatchSink:
    """A file that is its own input: only what changes is written.

    Attributes:
        descriptor: open for writing.
        path: the file, for messages.
    """

    descriptor: int
    path: Path

    def reserve(self, length: int) -> None:
        """Do nothing: it has its length."""

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes at `offset`."""
        with output_errors(self.path):
            write_at(self.descriptor, data, offset)

    def copy(self, piece: Copy, offset: int) -> None:
        """Do nothing: the bytes stand there."""


class MemorySink:
    """Memory, one buffer after another as if they were one file.

    Args:
        buffers: arrays of bytes; none is empty.
    """

    def __init__(self, buffers: Iterable[NDArray[np.uint8]]) -> None:
        self._views = [buffer.data for buffer in buffers]
        self._starts = list(accumulate((len(view) for view in self._views), initial=0))

    def reserve(self, length: int) -> None:
        """Do nothing: the buffers have their lengths."""

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Keep bytes at `offset`; they lie in one buffer."""
        view = memoryview(data).cast("B")
        index, place = self._locate(offset)
        self._views[index][place : place + len(view)] = view

    def copy(self, piece: Copy, offset: int) -> None:
        """Keep bytes of an input file at `offset`; they lie in one buffer."""
        index, place = self._locate(offset)
        piece.file.read_into(self._views[index][place : place + piece.length], piece.offset)

    def _locate(self, offset: int) -> tuple[int, int]:
        """Return which buffer an offset lies in, and where."""
        index = bisect_right(self._starts, offset) - 1
        return index, offset - self._starts[index]
