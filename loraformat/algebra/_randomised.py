"""The leading singular values of a large dense matrix, by block power iterations on a random start.

Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4, with three additions: the block grows until enough is
caught, the iterations end when they stop gaining, and what is left out is measured on the matrix itself, tile by tile,
so that the error is known rather than estimated. A block that would take a third of the short side gives way to the
eigenvectors of the short Gram matrix in float64.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraformat.algebra._lowrank import Matrix, Svd

_FIRST_BLOCK: Final = 64
_OVERSAMPLING: Final = 12
"""Directions beyond those asked for; Halko et al. find 5 to 10 enough."""
_MAX_ROUNDS: Final = 16
_GAIN: Final = 5e-4
"""Iterations end when one lowers the squared error by less than this share of it."""
_SINGLE: Final = 5e-7
_NOISE: Final = 2e-5
"""Share of ‖D‖² whose changes sums of single-precision products do not show."""
_DEPENDENT: Final = 1e-13
"""Eigenvalues of a Gram matrix below this share of the largest: directions that single precision does not have."""
_DENSE_SHARE: Final = 3
_TILE_ROWS: Final = 512


class Partial(NamedTuple):
    """The leading part of an SVD, and what it leaves out.

    Attributes:
        svd: U (rows, count), s (count,), Vᵀ (count, columns); float64.
        left_out: ‖D − U·diag(s)·Vᵀ‖ in the Frobenius norm, measured.
        norm: ‖D‖ in the Frobenius norm.
    """

    svd: Svd
    left_out: float
    norm: float

    def tails(self) -> Matrix:
        """Return the norm that is left out when the first k values are kept, for k from 0 to count; (count + 1,)."""
        beyond = np.concatenate([np.cumsum(self.svd.values[::-1] ** 2)[::-1], [0.0]])
        return np.sqrt(beyond + self.left_out**2)

    def cut(self, rank: int) -> "Partial":
        """Return its first `rank` values."""
        left, values, right = self.svd
        return Partial(Svd(left[:, :rank], values[:rank], right[:rank]), float(self.tails()[rank]), self.norm)


def leading_svd(
    matrix: NDArray[Any], rng: np.random.Generator, *, rank: int | None = None, leave: float = 0.0
) -> Partial:
    """Return the fewest leading singular values that leave out at most `leave`, or the first `rank` of them.

    Args:
        matrix: D (rows, columns), float32, finite.
        rng: where the random start is drawn from.
        rank: at most so many values; None sets no bound.
        leave: Frobenius norm that may be left out; at least 5e-7·‖D‖, which products in float32 cannot tell from 0.

    Returns:
        The values; their error is within about 0.1 % of the smallest that so many values can have, as long as the
        iterations converge, and stated in any case.
    """
    short = min(matrix.shape)
    bound = min(rank or short, short)
    norm = math.sqrt(_sum_squares(matrix))
    leave = max(leave, _SINGLE * norm)
    if norm <= leave:
        return Partial(_empty(matrix.shape), norm, norm)
    found: Partial | None = None
    size = min(bound, _FIRST_BLOCK) + _OVERSAMPLING
    while size * _DENSE_SHARE <= short:
        found = _iterate(matrix, rng, size, min(bound, size), leave, norm)
        enough = _fewest(found, leave, bound)
        if enough is not None:
            return found.cut(enough)
        size *= 2
    dense = _by_gram(matrix, norm)
    return dense.cut(_fewest(dense, leave, bound) or bound)


def _fewest(found: Partial, leave: float, bound: int) -> int | None:
    """Return how many values leave out no more than `leave`, or the bound if they are as many; None when too few."""
    fitting = np.flatnonzero(found.tails() <= leave)
    if fitting.size and fitting[0] <= bound:
        return int(fitting[0])
    return bound if bound + _OVERSAMPLING <= len(found.svd.values) else None


def _iterate(
    matrix: NDArray[Any], rng: np.random.Generator, size: int, kept: int, leave: float, norm: float
) -> Partial:
    """Return `size` values from a random start.

    Iterated until the first `kept` gain no more, or leave no more than `leave` and no fewer of them do.
    """
    start = rng.standard_normal((matrix.shape[1], size)).astype(matrix.dtype)
    base = _orthonormal(matrix @ start).astype(matrix.dtype)
    before, needed_before = math.inf, -1
    for _ in range(_MAX_ROUNDS):
        core = base.T @ matrix
        values = np.linalg.eigvalsh(core.astype(np.float64) @ core.T.astype(np.float64))[::-1]
        rest = norm**2 - np.cumsum(values[:kept])
        after, needed = float(rest[-1]), int(np.count_nonzero(rest > leave**2))
        settled = after <= leave**2 and needed == needed_before
        if settled or before - after <= _GAIN * max(after, leave**2, _NOISE * norm**2):
            break
        before, needed_before = after, needed
        base = _orthonormal(matrix @ _orthonormal(core.T).astype(matrix.dtype)).astype(matrix.dtype)
    return _finish(matrix, base, core, norm)


def _finish(matrix: NDArray[Any], base: NDArray[Any], core: NDArray[Any], norm: float) -> Partial:
    """Return the SVD of base @ core, and measure what it leaves of the matrix."""
    right = _orthonormal(core.T)
    inner, values, outer = np.linalg.svd(core.astype(np.float64) @ right, full_matrices=False)
    left_out = math.sqrt(sum_residual(matrix, base, core))
    return Partial(Svd(base.astype(np.float64) @ inner, values, outer @ right.T), left_out, norm)


def _by_gram(matrix: NDArray[Any], norm: float) -> Partial:
    """Return all singular values from the eigenvectors of the smaller of DDᵀ and DᵀD, in float64.

    Values below 1e-8 of the largest are rounding; the product is none the less a projection of D, and exact as such.
    """
    if matrix.shape[0] < matrix.shape[1]:
        turned = _by_gram(matrix.T, norm)
        return Partial(Svd(turned.svd.right.T, turned.svd.values, turned.svd.left.T), turned.left_out, norm)
    gram = np.zeros((matrix.shape[1], matrix.shape[1]))
    for _, tile in _tiles(matrix):
        gram += tile.T @ tile
    _, vectors = np.linalg.eigh(gram)
    right = np.ascontiguousarray(vectors[:, ::-1].T)
    left = np.empty((matrix.shape[0], right.shape[0]))
    for rows, tile in _tiles(matrix):
        np.matmul(tile, right.T, out=left[rows])
    values = np.linalg.norm(left, axis=0)
    order = np.argsort(-values, kind="stable")
    safe = np.where(values > 0, values, 1.0)
    return Partial(Svd((left / safe)[:, order], values[order], right[order]), 0.0, norm)


def sum_residual(matrix: NDArray[Any], left: NDArray[Any], right: NDArray[Any]) -> float:
    """Return ‖D − left @ right‖², tile by tile, the products in the form of the matrix, the sum in float64."""
    return _add_up(matrix, lambda rows: matrix[rows] - left[rows] @ right)


def _sum_squares(matrix: NDArray[Any]) -> float:
    return _add_up(matrix, lambda rows: matrix[rows])


def _add_up(matrix: NDArray[Any], take: Callable[[slice], NDArray[Any]]) -> float:
    """Return the sum of squares of what `take` gives for each tile of rows."""
    total = 0.0
    for rows in _row_slices(matrix):
        tile = take(rows).astype(np.float64, copy=False).reshape(-1)
        total += float(tile @ tile)
    return total


def _tiles(matrix: NDArray[Any]) -> Iterator[tuple[slice, Matrix]]:
    """Yield the tiles of rows in float64, each with its place."""
    for rows in _row_slices(matrix):
        yield rows, matrix[rows].astype(np.float64)


def _row_slices(matrix: NDArray[Any]) -> list[slice]:
    return [slice(start, start + _TILE_ROWS) for start in range(0, matrix.shape[0], _TILE_ROWS)]


def _orthonormal(block: NDArray[Any]) -> Matrix:
    """Return an orthonormal basis of a tall block's columns, those that depend on the others left out.

    Through the eigenvectors of its Gram matrix, twice: a few products of matrices, where Householder's method takes
    thousands of products with vectors.
    """
    wide = block.astype(np.float64)
    for _ in range(2):
        values, vectors = np.linalg.eigh(wide.T @ wide)
        kept = values > _DEPENDENT * values[-1]
        wide = wide @ (vectors[:, kept] / np.sqrt(values[kept]))
    return wide


def _empty(shape: tuple[int, ...]) -> Svd:
    return Svd(np.zeros((shape[0], 0)), np.zeros(0), np.zeros((0, shape[1])))
