"""Orthogonal matrices from the numbers that are trained; all in float64."""

import numpy as np
from numpy.typing import NDArray

Matrices = NDArray[np.float64]
"""`(blocks, b, b)`."""


def count_entries(size: int) -> int:
    """Return how many numbers a skew matrix of this size has above its diagonal."""
    return size * (size - 1) // 2


def make_skew(entries: NDArray[np.float64]) -> Matrices:
    """Return skew matrices from the numbers above their diagonals, row by row: `(blocks, entries)`."""
    size = int((1 + (1 + 8 * entries.shape[1]) ** 0.5) / 2)
    skew = np.zeros((len(entries), size, size))
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = entries
    return skew - skew.transpose(0, 2, 1)


def project(skew: Matrices, eps: float) -> Matrices:
    """Return matrices of a Frobenius norm of at most eps / √blocks, as constrained OFT has them."""
    most = eps / np.sqrt(len(skew))
    norms = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
    return np.where(norms <= most, skew, skew * (most / np.where(norms == 0, 1, norms)))


def turn_by_cayley(skew: Matrices) -> Matrices:
    """Return (I − Q)·(I + Q)⁻¹."""
    one = np.eye(skew.shape[1])
    # X·(I + Q) = I − Q, transposed: (I + Q)ᵀ is I − Q.
    solved = np.linalg.solve((one + skew).transpose(0, 2, 1), (one - skew).transpose(0, 2, 1))
    return np.ascontiguousarray(solved.transpose(0, 2, 1))


def turn_by_neumann(skew: Matrices, terms: int, last: int) -> Matrices:
    """Return I + 2Q + 2Q² + ..., which approaches the Cayley transform.

    Args:
        skew: Q.
        terms: how many there are.
        last: the coefficient of the last one: 2 in PEFT until 0.17. Where it is 1, as since 0.18, three and four terms
            both end with Q³.
    """
    coefficients = [2.0] * (terms - 1)
    if last == 1 and terms > 2:
        coefficients = [2.0] * max(2, terms - 2) + [1.0]
    turned = np.broadcast_to(np.eye(skew.shape[1]), skew.shape).copy()
    power = np.broadcast_to(np.eye(skew.shape[1]), skew.shape)
    for coefficient in coefficients:
        power = power @ skew
        turned += coefficient * power
    return turned
