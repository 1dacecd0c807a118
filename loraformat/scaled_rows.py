"""A change of a weight whose rows were multiplied by numbers before they were stored, as folding BatchNorm does."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from loraformat.kinds import Delta


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """A delta with each row, or column, multiplied.

    Attributes:
        values: the delta.
        factors: `(rows,)` float64; `(columns,)` where it is by columns.
        axis: 0 for rows, 1 for columns.
    """

    values: Delta
    factors: NDArray[Any]
    axis: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.values.shape

    def transposed(self) -> "ScaledRows":
        """Return the delta of the transposed matrix."""
        return ScaledRows(self.values.transposed(), self.factors, 1 - self.axis)

    def part(self, rows: slice, columns: slice) -> "ScaledRows":
        """Return some of its rows and columns."""
        return ScaledRows(self.values.part(rows, columns), self.factors[(rows, columns)[self.axis]], self.axis)

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        self.values.write_rows(start, stop, out)
        factors = self.factors if self.axis else self.factors[start:stop, None]
        out *= factors.astype(out.dtype)
