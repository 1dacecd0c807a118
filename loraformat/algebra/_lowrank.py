"""Singular values of a matrix that is known by its factors, and where to cut them.

Δ = B·A with B (out, rank) and A (rank, in) is never formed: QR of B and of Aᵀ, then the SVD of the core R_B·R_Aᵀ, which
has the size of the rank. Everything is float64.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

Matrix: TypeAlias = NDArray[np.float64]


class Svd(NamedTuple):
    """U·diag(s)·Vᵀ, the values from the largest down.

    Attributes:
        left: U (rows, count); the number of largest size in each column is positive.
        values: s (count,).
        right: Vᵀ (count, columns).
    """

    left: Matrix
    values: Matrix
    right: Matrix


def factor_svd(up: NDArray[Any], down: NDArray[Any]) -> Svd:
    """Return the SVD of `up @ down`; count = min(rows, rank, columns).

    Args:
        up: (rows, rank) of any float form.
        down: (rank, columns).
    """
    with _blas().limit(limits=1):  # Panels so narrow are faster without threads, and the same on every machine.
        left_base, left_core = np.linalg.qr(up.astype(np.float64))
        right_base, right_core = np.linalg.qr(down.astype(np.float64).T)
        left, values, right = np.linalg.svd(left_core @ right_core.T, full_matrices=False)
        return _orient(left_base @ left, values, right @ right_base.T)


@cache
def _blas() -> ThreadpoolController:
    """Return the handle of the BLAS libraries; looking for them takes longer than a small SVD."""
    return ThreadpoolController()


def _orient(left: Matrix, values: Matrix, right: Matrix) -> Svd:
    """Fix the signs, which an SVD leaves open and libraries choose differently."""
    peaks = left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])]
    signs = np.where(peaks < 0, -1.0, 1.0)
    return Svd(left * signs, values, right * signs[:, None])


@dataclass(frozen=True, slots=True)
class Cut:
    """How many singular values to keep; at least one is kept.

    Attributes:
        rank: at most so many; None sets no bound.
        rule: name of a rule in `RULES`, or None.
        threshold: the rule's number.
        dtype: number form of the factors that come out.
    """

    rank: int | None = None
    rule: str | None = None
    threshold: float = 0.0
    dtype: str = "float32"

    @property
    def is_none(self) -> bool:
        """Whether nothing says where to cut."""
        return self.rank is None and self.rule is None

    def choose(self, values: Matrix) -> int:
        """Return how many of `values` (count,), sorted from the largest down, are kept."""
        kept = len(values)
        if self.rule is not None:
            kept = RULES[self.rule](values, self.threshold) if values[0] > 0 else 1
        return max(1, min(kept, len(values), self.rank or len(values)))


def _by_energy(values: Matrix, share: float) -> int:
    """Keep the fewest with Σ kept σ² ≥ share·Σσ²."""
    return _by_error(values, float(np.sqrt(max(0.0, 1.0 - share))))


def _by_error(values: Matrix, error: float) -> int:
    """Keep the fewest with √(Σ left out σ²) ≤ error·√(Σσ²); summed from the small end, where the digits are."""
    tails = np.sqrt(np.cumsum(values[::-1] ** 2))[::-1]
    return int(np.count_nonzero(tails > error * tails[0] * (1 + 1e-12)))


def _by_ratio(values: Matrix, ratio: float) -> int:
    """Keep σ > σ₀/ratio."""
    return int(np.count_nonzero(values > values[0] / ratio))


def _by_norm(values: Matrix, share: float) -> int:
    """Keep the fewest with √(Σ kept σ²) ≥ share·√(Σσ²)."""
    return _by_energy(values, share**2)


def _by_sum(values: Matrix, share: float) -> int:
    """Keep the fewest with Σ kept σ ≥ share·Σσ."""
    tails = np.cumsum(values[::-1])[::-1]
    return int(np.count_nonzero(tails > (1.0 - share) * tails[0] * (1 + 1e-12)))


RULES: Final[Mapping[str, Callable[[Matrix, float], int]]] = MappingProxyType(
    {
        "energy": _by_energy,
        "max_error": _by_error,
        "sv_ratio": _by_ratio,
        "sv_fro": _by_norm,
        "sv_cumulative": _by_sum,
    }
)
"""How many values to keep, by rule. The last three are kohya's names; kohya keeps one value more than they say."""


class Truncated(NamedTuple):
    """A cut SVD as factors.

    Attributes:
        up: U·√s (rows, rank).
        down: √s·Vᵀ (rank, columns).
        error: ‖left out‖ / ‖all‖ in the Frobenius norm; 0.0 for a zero matrix.
    """

    up: Matrix
    down: Matrix
    error: float

    @property
    def rank(self) -> int:
        """How many singular values were kept."""
        return int(self.down.shape[0])


def truncate(svd: Svd, rank: int) -> Truncated:
    """Return the best approximation of rank `rank` (Eckart and Young), the values shared evenly by both factors."""
    roots = np.sqrt(svd.values[:rank])
    whole = float(np.linalg.norm(svd.values))
    error = float(np.linalg.norm(svd.values[rank:])) / whole if whole else 0.0
    return Truncated(svd.left[:, :rank] * roots, roots[:, None] * svd.right[:rank], error)


def compare_subspaces(first: Matrix, second: Matrix) -> float:
    """Return ‖XᵀY‖² / min(i, j) of two orthonormal bases X (n, i) and Y (n, j): 1 one lies in the other, 0 orthogonal.

    The measure φ(i, j) of arXiv 2106.09685, section 7.2.
    """
    shared = float(np.sum((first.T @ second) ** 2))
    return shared / int(min(first.shape[1], second.shape[1]))
