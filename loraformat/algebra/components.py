"""Leading directions of a covariance, plain, smooth or sparse."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.algebra._lowrank import Matrix

_MAX_ROUNDS: Final = 200
_SETTLED: Final = 1e-8


@dataclass(frozen=True, slots=True)
class Structure:
    """What components should be like; at most one of the two is other than 0.

    Attributes:
        smoothness: λ of the roughness penalty, 0 for none: components maximise vᵀCv / (vᵀv + λ·Σ(vᵢ₊₁ − vᵢ)²)
            (Silverman, Annals of Statistics 24, 1996). For inputs whose order means something: positions, frequencies.
        sparsity: share of its largest number that a component's numbers must exceed to be other than 0, in [0, 1)
            (iterative thresholding: Ma, Annals of Statistics 41, 2013).
    """

    smoothness: float = 0.0
    sparsity: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return what was asked for."""
        asked = {"smoothness": self.smoothness, "sparsity": self.sparsity}
        return {name: number for name, number in asked.items() if number}


PLAIN: Final = Structure()


def leading_components(covariance: NDArray[Any], count: int, structure: Structure) -> Matrix:
    """Return the leading directions as rows of length 1, (count, in); the number of largest size in each is positive.

    Plain ones are orthonormal. Smooth ones are made so afterwards, which leaves them in the same space; sparse ones are
    only nearly orthogonal, for that would fill their zeros.

    Args:
        covariance: (in, in), symmetric and without negative eigenvalues.
        count: how many, at most in.
        structure: what they should be like.
    """
    rows = _smooth(covariance, count, structure.smoothness) if structure.smoothness else _plain(covariance, count)
    if structure.sparsity:
        rows = _sparsify(covariance, rows, structure.sparsity)
    peaks = rows[np.arange(count), np.abs(rows).argmax(axis=1)]
    return rows * np.where(peaks < 0, -1.0, 1.0)[:, None]


def _plain(matrix: NDArray[Any], count: int) -> Matrix:
    _, vectors = np.linalg.eigh(matrix)
    return np.ascontiguousarray(vectors[:, ::-1][:, :count].T)


def _smooth(covariance: NDArray[Any], count: int, penalty: float) -> Matrix:
    """Solve C v = μ (I + λ·DᵀD) v, D the first differences, through the Cholesky factor of the right side."""
    size = covariance.shape[0]
    difference = np.diff(np.eye(size), axis=0)
    triangle = np.linalg.cholesky(np.eye(size) + penalty * difference.T @ difference)
    half = np.linalg.solve(triangle, covariance)
    whitened = np.linalg.solve(triangle, half.T)
    found = np.linalg.solve(triangle.T, _plain((whitened + whitened.T) / 2, count).T)
    return np.ascontiguousarray(np.linalg.qr(found)[0].T)


def _sparsify(covariance: NDArray[Any], rows: Matrix, share: float) -> Matrix:
    """Iterate: multiply by C, shrink each direction softly towards 0, make the directions orthonormal again."""
    for _ in range(_MAX_ROUNDS):
        before = rows
        rows = np.linalg.qr(_shrink(rows @ covariance, share).T)[0].T
        change = np.abs(np.abs(np.sum(before * rows, axis=1)) - 1.0).max()
        if change < _SETTLED:
            break
    shrunk = _shrink(rows, share)
    unit: Matrix = shrunk / np.linalg.norm(shrunk, axis=1, keepdims=True)
    return unit


def _shrink(rows: Matrix, share: float) -> Matrix:
    """Return sign(v)·max(|v| − t, 0), t a share of each row's largest number."""
    limits = share * np.abs(rows).max(axis=1, keepdims=True)
    shrunk: Matrix = np.sign(rows) * np.maximum(np.abs(rows) - limits, 0.0)
    return shrunk
