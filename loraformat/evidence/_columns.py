"""Some columns of stored weights, for comparing them with those of a torch checkpoint."""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind
from loraformat.bases import Site
from loraformat.matching import Want
from loraformat.spans import Part, StoredTensor

_TILE_BYTES: Final = 1 << 22
_MATRIX: Final = 2


def is_coded(site: Site) -> bool:
    """Say whether a site's weight is quantised."""
    return site.weight is not None and site.weight.coding is not None


def is_comparable(want: Want, site: Site) -> bool:
    """Say whether a whole stored matrix, or an expert's, may be a target's weight, or have it among its rows."""
    shape = _find_shape(want, site)
    if len(shape) != _MATRIX:
        return bool(shape) and shape == want.shape
    return _has_columns(want, shape) and shape[0] >= want.shape[0]


def is_smaller(want: Want, site: Site) -> bool:
    """Say whether a whole stored matrix may have some rows of a target's weight."""
    shape = _find_shape(want, site)
    return len(shape) == _MATRIX and _has_columns(want, shape) and shape[0] < want.shape[0] and not is_coded(site)


def _has_columns(want: Want, shape: tuple[int, ...]) -> bool:
    return len(want.shape) == _MATRIX and shape[1] == want.shape[1]


def _find_shape(want: Want, site: Site) -> tuple[int, ...]:
    """Return the canonical shape of a whole stored matrix or kernel, or of an expert's; empty for anything else."""
    weight = site.weight
    if (
        weight is None
        # One of packed experts is a matrix of its own.
        or (site.part and not is_coded(site) and len(weight.tensor.shape) == _MATRIX)
        or site.section
        or want.change.slot not in site.transposed
        or site.parameter != "weight"
        or min(want.shape) < 0  # What the factors do not tell, the names must.
    ):
        return ()
    shape = site.stored_shape()
    return shape[::-1] if len(shape) == _MATRIX and site.transposed[want.change.slot] else shape


def read_columns(site: Site, slot: SlotKind, columns: Sequence[int]) -> NDArray[np.float32]:
    """Return `(rows, len(columns))` float32 of the canonical matrix `(out, in * kernel)` that a site applies.

    Memory is that of the result and one tile.
    """
    assert site.weight is not None, "chosen so"
    tensor = site.weight.tensor
    part = site.part or _whole(tensor)
    if site.transposed[slot]:
        lines = range(*part.rows)
        read = [_read_rows(tensor, part.matrix, lines[column], 1)[0, slice(*part.columns)] for column in columns]
        return np.stack(read, axis=1)
    chosen = np.asarray(range(*part.columns))[list(columns)]
    step = max(1, _TILE_BYTES // (part.matrix[1] * tensor.dtype.numpy().itemsize))
    first, stop, stride = part.rows
    tiles = [
        _read_rows(tensor, part.matrix, start, min(step, stop - start))[:, chosen] for start in range(first, stop, step)
    ]
    return np.concatenate(tiles)[::stride]


def _whole(tensor: StoredTensor) -> Part:
    matrix = (tensor.shape[0], math.prod(tensor.shape[1:]))
    return Part(matrix, (0, matrix[0], 1), (0, matrix[1], 1))


def _read_rows(tensor: StoredTensor, matrix: tuple[int, int], start: int, count: int) -> NDArray[np.float32]:
    """Return rows of a stored matrix as float32."""
    if not tensor.is_contiguous:
        rows: NDArray[Any] = tensor.read().reshape(matrix)[start : start + count]
    else:
        rows = np.empty((count, matrix[1]), tensor.dtype.numpy())
        tensor.file.read_into(rows.reshape(-1).view(np.uint8), tensor.span.offset + start * matrix[1] * rows.itemsize)
    with np.errstate(over="ignore"):
        return rows.astype(np.float32)
