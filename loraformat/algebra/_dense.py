"""Changes that have no factors, tile by tile: pruned and dropped ones, and the best low-rank form of what comes out.

The matrix is made again for each pass over it, so that no more than a tile of it is held: once to find thresholds, once
for its Gram matrix on the shorter side, once to project it on the directions that are kept.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loraformat.algebra._lowrank import Cut, Svd, Truncated, truncate
from loraformat.kinds import Delta
from loraformat.limits import TILE_BYTES

Tile: TypeAlias = NDArray[np.float32]
Tiles: TypeAlias = Iterator[Tile]
Sparsify: TypeAlias = Callable[[Delta, float, str], Tiles]
"""Takes a change, the share of its numbers to keep, and a seed; yields what is left of it, tile by tile."""

_FLOAT32_BYTES: Final = 4
_DOMAIN: Final = "loraformat-drop-1"


def walk(delta: Delta) -> Tiles:
    """Yield the change (rows, columns) in tiles of whole rows, float32."""
    rows, columns = delta.shape
    step = max(1, TILE_BYTES // (_FLOAT32_BYTES * columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        tile = np.empty((stop - start, columns), np.float32)
        delta.write_rows(start, stop, tile)
        yield tile


def keep_largest(delta: Delta, density: float, seed: str) -> Tiles:
    """Yield the change with all but the largest int(density · count) numbers set to 0; equals of the last stay too."""
    del seed
    rows, columns = delta.shape
    kept = int(density * rows * columns)
    limit = find_threshold(delta, kept)
    for tile in walk(delta):
        tile[np.abs(tile) < limit] = 0
        yield tile


def find_threshold(delta: Delta, kept: int) -> np.float32:
    """Return the `kept`-th largest absolute number of a change; infinity for none.

    Bits of float32 numbers that are not negative sort as the numbers do: the upper half is found by counting, then the
    lower half among those that share it.
    """
    if kept <= 0:
        return np.float32(np.inf)
    upper, before = _descend(_count_bits(delta, 16, None), kept)
    lower, _ = _descend(_count_bits(delta, 0, upper), kept - before)
    return np.uint32((upper << 16) | lower).view(np.float32)


def _count_bits(delta: Delta, shift: int, upper: int | None) -> NDArray[np.int64]:
    counts = np.zeros(1 << 16, np.int64)
    for tile in walk(delta):
        bits = np.abs(tile).reshape(-1).view(np.uint32)
        if upper is not None:
            bits = bits[bits >> 16 == upper]
        counts += np.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
    return counts


def _descend(counts: NDArray[np.int64], kept: int) -> tuple[int, int]:
    """Return the half that the `kept`-th largest number has, and how many numbers lie above it."""
    above = np.cumsum(counts[::-1])[::-1]
    half = int(np.count_nonzero(above >= kept)) - 1
    return half, int(above[half] - counts[half])


def drop_random(delta: Delta, density: float, seed: str) -> Tiles:
    """Yield the change with each number kept by chance `density` and divided by it, the others 0.

    The chances come from Philox, keyed with a digest of `seed`: the same on every platform, and whatever else is done.
    """
    digest = hashlib.sha256(f"{_DOMAIN}\n{seed}".encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    limit = round(density * 2**32)
    for tile in walk(delta):
        rows, columns = tile.shape
        words = bits.random_raw(rows * ((columns + 1) // 2)).astype("<u8").view("<u4").reshape(rows, -1)
        tile[words[:, :columns] >= limit] = 0
        tile /= np.float32(density)
        yield tile


def add(parts: Sequence[Tile], weights: Sequence[float]) -> Tile:
    """Return Σ wᵢxᵢ."""
    total = parts[0] * np.float32(weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total += part * np.float32(weight)
    return total


def elect(parts: Sequence[Tile], weights: Sequence[float]) -> Tile:
    """Return, in each place, the mean of those wᵢxᵢ whose sign is that of their sum; a sum of 0 counts as positive."""
    weighted = np.stack([part * np.float32(weight) for part, weight in zip(parts, weights, strict=True)])
    chosen = np.sign(weighted) == np.where(weighted.sum(axis=0) >= 0, np.float32(1), np.float32(-1))
    mean: Tile = (weighted * chosen).sum(axis=0) / np.maximum(chosen.sum(axis=0), 1).astype(np.float32)
    return mean


def cut_tiles(shape: tuple[int, int], passes: Callable[[], Tiles], cut: Cut) -> Truncated:
    """Return the best low-rank form of a matrix that is made tile by tile.

    The Gram matrix of the columns is summed in float64 and has its eigenvectors taken: exact up to singular values of
    about 1e-8 of the largest.

    Args:
        shape: (rows, columns); memory goes with columns², so that columns should be the shorter side.
        passes: makes the tiles, in order, the same each time.
        cut: how many values to keep.
    """
    rows, columns = shape
    gram = np.zeros((columns, columns))
    for tile in passes():
        wide = tile.astype(np.float64)
        gram += wide.T @ wide
    squares, vectors = np.linalg.eigh(gram)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    rank = min(cut.choose(values), rows)
    right = vectors[:, ::-1][:, :rank]
    images = np.concatenate([tile.astype(np.float64) @ right for tile in passes()])
    norms = np.where(values[:rank] > 0, values[:rank], 1.0)
    return truncate(Svd(images / norms, values, right.T), rank)


def transposed(truncated: Truncated) -> Truncated:
    """Return the transposed matrix."""
    return Truncated(truncated.down.T, truncated.up.T, truncated.error)
