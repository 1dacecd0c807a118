"""Values of a weight's own size, taken from their file as they are wanted: an embedding table is never held whole."""

import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import PartialFactor, ScalingRule, Target
from loraformat.kinds import Delta
from loraformat.kinds._matrices import Values
from loraformat.limits import STREAM_BYTES
from loraformat.problems import Problem


@dataclass(frozen=True, slots=True)
class Stream:
    """A stored tensor as a matrix, times a number, read row by row.

    Attributes:
        source: the tensor.
        rows: rows of the stored matrix that are meant.
        columns: its columns.
        scale: multiplier; 1 leaves the numbers as they are to the last bit.
        turned: whether the transpose is meant. Its rows are columns of the file, which are read some at a time.
    """

    source: PartialFactor
    rows: range
    columns: range
    scale: float = 1.0
    turned: bool = False
    _held: threading.local = field(default_factory=threading.local, init=False, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        shape = len(self.rows), len(self.columns)
        return shape[::-1] if self.turned else shape

    def transposed(self) -> "Stream":
        """Return the transposed values."""
        return replace(self, turned=not self.turned)

    def part(self, rows: slice, columns: slice) -> "Stream":
        """Return some of its rows and columns."""
        if self.turned:
            rows, columns = columns, rows
        return replace(self, rows=self.rows[rows], columns=self.columns[columns])

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        if not self.turned:
            self._put(self.source.read_part(self.rows[start:stop], self.columns), out)
            return
        while start < stop:
            first, block = self._find_block(start)
            count = min(stop, first + block.shape[1]) - start
            self._put(block[:, start - first : start - first + count].T, out[:count])
            start, out = start + count, out[count:]

    def _put(self, values: NDArray[Any], out: NDArray[Any]) -> None:
        if self.scale == 1:
            np.copyto(out, values, casting="same_kind")
        else:
            np.copyto(out, values.astype(np.float64) * self.scale, casting="same_kind")

    def _find_block(self, column: int) -> tuple[int, NDArray[Any]]:
        """Return the columns of the file around one, of about `STREAM_BYTES`, and the first; kept for the next tile."""
        step = max(1, STREAM_BYTES // (self.source.dtype.numpy().itemsize * max(1, len(self.rows))))
        first = column // step * step
        if getattr(self._held, "first", None) != first:
            self._held.block = self.source.read_part(self.rows, self.columns[first : first + step])
            self._held.first = first
        return first, self._held.block


def make_values(factor: NDArray[Any] | PartialFactor, scale: float = 1.0) -> Delta:
    """Return a factor as a matrix of its first dimension and the rest, times `scale` with one rounding."""
    if not isinstance(factor, np.ndarray):
        rows, elements = factor.shape[0], factor.elements
        return Stream(factor, range(rows), range(elements // max(1, rows)), scale)
    matrix = np.ascontiguousarray(factor.reshape(factor.shape[0], -1))
    return Values(matrix if scale == 1 else (matrix.astype(np.float64) * scale).astype(matrix.dtype))


def check_multiplier(target: Target) -> list[Problem]:
    """Return problems of a target of values, which have no rank: one that is stated, or a rule that divides by it."""
    problems = []
    if target.rank:
        problems.append(Problem("LF205", target.name, f"rank {target.rank} stated", "rank 0: values have none"))
    if target.scaling.rule is not ScalingRule.MULTIPLIER:
        found = f"the rule {target.scaling.rule.value!r}, which divides by a rank"
        problems.append(Problem("LF122", target.name, found, f"the rule {ScalingRule.MULTIPLIER.value!r}"))
    return problems
