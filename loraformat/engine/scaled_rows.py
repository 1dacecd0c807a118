"""A change of a weight whose rows were multiplied by numbers, or moved, before they were stored.

Folding BatchNorm does the one, rearranging the rows of a head for another kind of rotation the other.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
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


@dataclass(frozen=True, slots=True)
class OrderedRows:
    """A delta with its rows, or columns, in another order.

    Attributes:
        values: the delta.
        order: `(rows,)` which row of `values` each row is; `(columns,)` where it is by columns.
        axis: 0 for rows, 1 for columns.
    """

    values: Delta
    order: NDArray[np.intp]
    axis: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        rows, columns = self.values.shape
        return (rows, len(self.order)) if self.axis else (len(self.order), columns)

    def transposed(self) -> "OrderedRows":
        """Return the delta of the transposed matrix."""
        return OrderedRows(self.values.transposed(), self.order, 1 - self.axis)

    def part(self, rows: slice, columns: slice) -> "OrderedRows":
        """Return some of its rows and columns."""
        rest = [rows, columns]
        order, rest[self.axis] = self.order[rest[self.axis]], slice(0, self.values.shape[self.axis], 1)
        return OrderedRows(self.values.part(*rest), order, self.axis)

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        if self.axis:
            scratch = np.empty((stop - start, self.values.shape[1]), out.dtype)
            self.values.write_rows(start, stop, scratch)
            np.take(scratch, self.order, axis=1, out=out)
            return
        wanted = self.order[start:stop]
        ends = [*(np.flatnonzero(np.diff(wanted) != 1) + 1), len(wanted)]
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            if end > begin:
                self.values.write_rows(int(wanted[begin]), int(wanted[end - 1]) + 1, out[begin:end])
