"""What singular values and singular directions say: dimensions of a change, and how much two changes share.

The measures of section 7 of the LoRA paper (Hu et al., arXiv 2106.09685). `docs/analysis.md` explains each.
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.algebra._lowrank import Matrix

_NOTHING: Final = 1e-9
"""Singular values below this share of the largest are rounding of zeros, and have no directions of their own."""


def find_directions(factor: NDArray[Any]) -> NDArray[np.float32]:
    """Return the right singular directions of a wide factor as columns, (columns, count), the strongest first.

    Directions of values that are zero but for rounding are left out: they would be arbitrary.

    Args:
        factor: A (rank, in), or Bᵀ (rank, out).
    """
    base, triangle = np.linalg.qr(factor.astype(np.float64).T)
    inner, values, _ = np.linalg.svd(triangle, full_matrices=False)
    count = int(np.count_nonzero(values > _NOTHING * values[0])) if values[0] > 0 else 0
    directions: NDArray[np.float32] = (base @ inner[:, :count]).astype(np.float32)
    return directions


def compare_directions(first: NDArray[Any], second: NDArray[Any]) -> Matrix:
    """Return φ(i, j) = ‖X_iᵀ·Y_j‖² / min(i, j) for all i and j, (count of X, count of Y).

    X_i are the first i columns of X. 1 says that the smaller space lies in the larger one, 0 that they are orthogonal;
    for random spaces of n dimensions about max(i, j)/n is to be expected.

    Args:
        first: X (n, count), orthonormal columns.
        second: Y (n, count).
    """
    shared = np.square(first.T.astype(np.float64) @ second.astype(np.float64))
    sums = shared.cumsum(axis=0).cumsum(axis=1)
    smaller = np.minimum.outer(np.arange(1, sums.shape[0] + 1), np.arange(1, sums.shape[1] + 1))
    return sums / smaller


def effective_rank(values: Matrix) -> float:
    """Return exp(H(p)) of p = σ/Σσ (Roy and Vetterli, EUSIPCO 2007): how many directions seem in use; 0.0 for zero."""
    total = float(np.sum(values))
    if not total:
        return 0.0
    shares = values[values > 0] / total
    return math.exp(-float(np.sum(shares * np.log(shares))))


def stable_rank(values: Matrix) -> float:
    """Return ‖Δ‖_F² / ‖Δ‖₂²: how many directions as strong as the strongest would have as much energy; 0.0 for zero."""
    return float(np.sum(np.square(values / values[0]))) if len(values) and values[0] > 0 else 0.0


def project(weight: NDArray[Any], left: NDArray[Any], right: NDArray[Any]) -> float:
    """Return ‖UᵀWV‖ in the Frobenius norm: how strong a weight is between two subspaces.

    Args:
        weight: W (out, in).
        left: U (out, count), orthonormal columns.
        right: V (in, count).
    """
    inner = left.astype(weight.dtype, copy=False).T @ weight
    return float(np.linalg.norm(inner.astype(np.float64) @ right.astype(np.float64)))
