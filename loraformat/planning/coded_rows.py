"""Rows of a quantised weight by themselves: where no scale hangs on other rows, each tile has a coder of its own."""

import math
from dataclasses import replace

from loraformat.encodings import Coding
from loraformat.spans import HeldTensor, Span, StoredTensor

_OF_BLOCKS = {"scales", "zero_points"}
_PACKED = (2, 4)
"""Zero points in a byte, where they are stored as bytes."""
_MOST_ROWS = 128
"""Blocks of more rows are not a tile's: scales of a whole matrix, or of its columns."""


def align_rows(coding: Coding | None) -> int:
    """Return of how many rows tiles should be multiples, so that blocks lie in one of them."""
    if coding is None:
        return 1
    return math.lcm(coding.rows_together, coding.block[0] if coding.block[0] <= _MOST_ROWS else 1)


def can_cut(coding: Coding, tile_rows: int) -> bool:
    """Say whether tiles of so many rows can be decoded and encoded each by itself."""
    if coding.matrix[0] <= tile_rows or tile_rows % coding.block[0] or not coding.companions.keys() <= _OF_BLOCKS:
        return False
    return all(_count_row_bytes(coding, tensor) for tensor in coding.companions.values())


def _count_row_bytes(coding: Coding, tensor: StoredTensor | HeldTensor) -> int:
    """Return the bytes of a companion for the blocks of one row; 0 where these are not whole bytes."""
    down, across = _count_blocks(coding)
    length = tensor.dtype.count_bytes(tensor.elements)
    known = {math.ceil(across * tensor.dtype.bits / 8), *(-(-across // per) for per in _PACKED)}
    return length // down if length % down == 0 and length // down in known else 0


def _count_blocks(coding: Coding) -> tuple[int, int]:
    """Return the blocks of the matrix, down and across."""
    (rows, columns), (height, width) = coding.matrix, coding.block
    return -(-rows // height), -(-columns // width)


def cut_coding(coding: Coding, rows: range) -> Coding:
    """Return the coding of some rows, whole blocks, as a matrix of their own."""
    if len(rows) == coding.matrix[0]:
        return coding
    blocks = range(rows.start // coding.block[0], -(-rows.stop // coding.block[0]))
    companions = {role: _cut(coding, tensor, blocks) for role, tensor in coding.companions.items()}
    return replace(coding, matrix=(len(rows), coding.matrix[1]), companions=companions)


def locate_rows(coding: Coding, role: str, rows: range) -> int:
    """Return the bytes of a companion before those of the blocks of some rows."""
    return rows.start // coding.block[0] * _count_row_bytes(coding, coding.companions[role])


def _cut(coding: Coding, tensor: StoredTensor | HeldTensor, blocks: range) -> StoredTensor | HeldTensor:
    if isinstance(tensor, HeldTensor):
        down, _ = _count_blocks(coding)
        return replace(tensor, values=tensor.values.reshape(down, -1)[blocks.start : blocks.stop])
    row_bytes = _count_row_bytes(coding, tensor)
    span = Span(tensor.span.path, tensor.span.offset + blocks.start * row_bytes, len(blocks) * row_bytes)
    return replace(tensor, shape=(len(blocks), row_bytes * 8 // tensor.dtype.bits), span=span)
