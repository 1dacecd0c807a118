"""An output file before it exists: pieces of input files, new bytes, and blanks to be filled last.

A container describes its output as images; the engine writes them. Because every piece says where its bytes come from,
the engine knows where a span of the input lands in the output, and everything that is not a piece of new bytes is equal
to the input by construction.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

from loraformat.dtypes import Dtype
from loraformat.spans import InputFile, Span, StoredTensor


@dataclass(frozen=True, slots=True)
class NewOutput:
    """Where the files of an output will stand, and what they are to have.

    Attributes:
        path: the output's: its folder, or of one or several files the one that names it.
        blank_bytes: room for the receipt, in the last file; 0 for an output without one.
        fresh: digits that go into the name of a data file whose usual name is taken.
        is_taken: says whether a path is another file's.
    """

    path: Path
    blank_bytes: int
    fresh: str
    is_taken: Callable[[Path], bool] = os.path.lexists


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of an input file."""

    file: InputFile
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Literal:
    """New bytes."""

    data: bytes

    @property
    def length(self) -> int:
        """Bytes."""
        return len(self.data)


class Gathered(Literal):
    """The numbers of a tensor that is no run of bytes, in C order; read when they are asked for."""

    __slots__ = ("_tensor",)
    _tensor: StoredTensor

    def __init__(self, tensor: StoredTensor) -> None:
        object.__setattr__(self, "_tensor", tensor)

    @property
    def data(self) -> bytes:
        """The bytes."""
        return self._tensor.read().tobytes()

    @property
    def length(self) -> int:
        """Bytes."""
        return self._tensor.dtype.count_bytes(self._tensor.elements)


@dataclass(frozen=True, slots=True)
class Blank:
    """Room for the receipt, whose size is fixed before its numbers are known; padded with spaces."""

    length: int


@dataclass(frozen=True, slots=True)
class Fresh:
    """Room for the numbers of a tensor that is computed; `FileImage.locate_fresh` tells where it lies."""

    key: str
    length: int


Piece: TypeAlias = Copy | Literal | Blank | Fresh


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of a file that is written anew.

    Attributes:
        name: its name there.
        dtype: its number form there.
        shape: its dimensions there.
        source: the tensor that its numbers come from; None for one that is computed.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    source: StoredTensor | None

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.dtype.count_bytes(math.prod(self.shape))

    @property
    def is_copied(self) -> bool:
        """Whether its bytes are a span of the source's file, so that nothing is to be done but to copy them."""
        return self._is_same and self.source is not None and self.source.is_contiguous

    @property
    def _is_same(self) -> bool:
        return self.source is not None and (self.source.dtype, self.source.shape) == (self.dtype, self.shape)

    def as_piece(self) -> Piece:
        """Return where its bytes come from: the source as it is, or `Fresh(name)`, which the engine fills."""
        source = self.source
        if source is None or not self._is_same:
            return Fresh(self.name, self.nbytes)
        return Copy(source.file, source.span.offset, source.span.length) if source.is_contiguous else Gathered(source)


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace `length` bytes of a file at `offset` by `pieces` (an insertion when `length` is 0)."""

    offset: int
    length: int
    pieces: tuple[Piece, ...]


class FileImage:
    """One output file as a sequence of pieces.

    Args:
        path: where the file will stand.
        pieces: its content, in order.
        is_kept: whether it keeps bytes of the input as they were, so that nothing of it is to be rewritten.
    """

    def __init__(self, path: Path, pieces: Sequence[Piece], *, is_kept: bool = False) -> None:
        self.path = path
        self.pieces = tuple(piece for piece in pieces if piece.length)
        lengths = [piece.length for piece in self.pieces]
        self._starts = list(accumulate(lengths, initial=0))
        self.size_bytes = self._starts[-1]
        self._copies = sorted(
            (piece.file.path, piece.offset, start, piece.length)
            for piece, start in zip(self.pieces, self._starts, strict=False)
            if isinstance(piece, Copy) and not is_kept
        )
        placed = zip(self.pieces, self._starts, strict=False)
        self._fresh = {piece.key: start for piece, start in placed if isinstance(piece, Fresh)}

    def placed(self) -> Iterator[tuple[int, Piece]]:
        """Yield every piece with its offset in this file."""
        yield from zip(self._starts, self.pieces, strict=False)

    def fill_blank(self, data: bytes) -> tuple[int, bytes]:
        """Return where the blank of a receipt stands, and the receipt padded with spaces to its length.

        Raises:
            ValueError: it is longer than its blank.
        """
        offset, length = self.find_blank()
        if len(data) > length:
            raise ValueError("the receipt outgrew its draft")
        return offset, data.ljust(length)

    def find_blank(self) -> tuple[int, int]:
        """Return offset and length of the blank of a receipt."""
        return next((start, piece.length) for start, piece in self.placed() if isinstance(piece, Blank))

    def locate(self, span: Span) -> int | None:
        """Return the offset in this file at which the input's `span` lands whole, or None."""
        index = bisect_right(self._copies, (span.path, span.offset, float("inf"), 0)) - 1
        if index < 0:
            return None
        path, offset, start, length = self._copies[index]
        if path != span.path or span.end > offset + length:
            return None
        return start + span.offset - offset

    def whole_copy(self) -> InputFile | None:
        """Return the input file that this one is a copy of, from its first byte to its last, or None."""
        match self.pieces:
            case (Copy(file, 0, length),) if length == file.size_bytes:
                return file
        return None

    def sources(self) -> list[InputFile]:
        """Return the input files that pieces are copied from."""
        return [piece.file for piece in self.pieces if isinstance(piece, Copy)]

    def locate_fresh(self, key: str) -> int | None:
        """Return the offset in this file of the room for the computed tensor `key`, or None; no bytes need none."""
        return self._fresh.get(key)


def join_copies(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the pieces, neighbours that are neighbours in one input file as one."""
    last: Copy | None = None
    for piece in pieces:
        if isinstance(piece, Copy) and last and (last.file, last.offset + last.length) == (piece.file, piece.offset):
            last = Copy(last.file, last.offset, last.length + piece.length)
            continue
        if last:
            yield last
        last = piece if isinstance(piece, Copy) else None
        if not last:
            yield piece
    if last:
        yield last


def edit_file(file: InputFile, edits: Iterable[Edit], tail: Sequence[Piece] = ()) -> list[Piece]:
    """Return the pieces of `file` with `edits` made and `tail` appended; edits must not overlap."""
    pieces: list[Piece] = []
    position = 0
    for edit in sorted(edits, key=lambda edit: edit.offset):
        if edit.offset < position:
            raise ValueError("edits overlap")
        pieces += [Copy(file, position, edit.offset - position), *edit.pieces]
        position = edit.offset + edit.length
    return [*pieces, Copy(file, position, file.size_bytes - position), *tail]
