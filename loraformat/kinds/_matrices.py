"""Matrices that kinds hand out: products of factors, and given values. Both write some rows at a time."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """The matrix `left @ right`, formed only row by row.

    Attributes:
        left: (rows, rank), the scale folded in.
        right: (rank, columns).
    """

    left: NDArray[Any]
    right: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.left.shape[0], self.right.shape[1]

    def transposed(self) -> "LowRankDelta":
        """Return the transposed change."""
        return LowRankDelta(np.ascontiguousarray(self.right.T), np.ascontiguousarray(self.left.T))

    def part(self, rows: slice, columns: slice) -> "LowRankDelta":
        """Return some of its rows and columns."""
        return LowRankDelta(np.ascontiguousarray(self.left[rows]), np.ascontiguousarray(self.right[:, columns]))

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        np.matmul(self.left[start:stop], self.right, out=out)


@dataclass(frozen=True, slots=True)
class Values:
    """Given values as a matrix, taken row by row.

    Attributes:
        matrix: (rows, columns).
    """

    matrix: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def transposed(self) -> "Values":
        """Return the transposed values."""
        return Values(np.ascontiguousarray(self.matrix.T))

    def part(self, rows: slice, columns: slice) -> "Values":
        """Return some of its rows and columns."""
        return Values(self.matrix[rows, columns])

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        np.copyto(out, self.matrix[start:stop])


def scale_product(left: NDArray[Any], right: NDArray[Any], scale: float) -> LowRankDelta:
    """Return s·left·right; the scale is folded into the left factor in float64, rounded once.

    Args:
        left: (rows, rank), further axes of size one.
        right: (rank, columns), where further axes belong to the columns.
        scale: s.
    """
    flat = right.reshape(right.shape[0], -1)
    scaled = (left.reshape(left.shape[0], -1).astype(np.float64) * scale).astype(flat.dtype)
    return LowRankDelta(np.ascontiguousarray(scaled), np.ascontiguousarray(flat))
