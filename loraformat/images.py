"""An output file before it exists: pieces of input files, new bytes, and blanks to be filled last.

A container describes its output as images; the engine writes them. Because every piece says where its bytes come from,
the engine knows where a span of the input lands in the output, and everything that is not a piece of new bytes is equal
to the input by construction.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

from loraformat.spans import InputFile, Span


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


@dataclass(frozen=True, slots=True)
class Blank:
    """Room for the receipt, whose size is fixed before its numbers are known; padded with spaces."""

    length: int


Piece: TypeAlias = Copy | Literal | Blank


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
    """

    def __init__(self, path: Path, pieces: Sequence[Piece]) -> None:
        self.path = path
        self.pieces = tuple(piece for piece in pieces if piece.length)
        lengths = [piece.length for piece in self.pieces]
        self._starts = list(accumulate(lengths, initial=0))
        self.size_bytes = self._starts[-1]
        self._copies = sorted(
            (piece.file.path, piece.offset, start, piece.length)
            for piece, start in zip(self.pieces, self._starts, strict=False)
            if isinstance(piece, Copy)
        )

    def placed(self) -> Iterator[tuple[int, Piece]]:
        """Yield every piece with its offset in this file."""
        yield from zip(self._starts, self.pieces, strict=False)

    def locate(self, span: Span) -> int | None:
        """Return the offset in this file at which the input's `span` lands whole, or None."""
        index = bisect_right(self._copies, (span.path, span.offset, float("inf"), 0)) - 1
        if index < 0:
            return None
        path, offset, start, length = self._copies[index]
        if path != span.path or span.end > offset + length:
            return None
        return start + span.offset - offset


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
