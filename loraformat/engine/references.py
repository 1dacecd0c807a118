"""The float numbers of a weight that the base has in a few bits, from the checkpoint that it was made from.

They are put in the place of what the codes stand for, so that the merged weight is rounded once. Before, they are
compared with the codes: only of the very weight that was quantised may the rounding be done anew.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from loraformat.bases import Weight
from loraformat.engine.scaled_rows import OrderedRows, ScaledRows
from loraformat.engine.weight_work import Placed
from loraformat.errors import refuse
from loraformat.kinds import Delta, Nature
from loraformat.plan.changes import PlannedChange, PlannedReference
from loraformat.plan.weights import PlannedWeight
from loraformat.spans import StoredTensor

_NO_WEIGHTS: Final[Mapping[str, Weight]] = {}
_STEP_SHARE: Final = 0.5 + 1 / 16
"""Numbers are rounded to the nearest code; what lies further off, by more than scales of 16 bits explain, was not."""
_MOST_STRAYS: Final = 1 / 32
"""Quantisers cut off what lies beyond their last code: one number in some hundreds."""
_LEAST_COSINE: Final = 0.9
_MULTIPLIED: Final = 0.05
_NOISE: Final = 0.7
_SUMS: Final = ("ij,ij->i", "ij,ij->j")


@dataclass(frozen=True, slots=True)
class Floats:
    """Where float numbers are to be had.

    Attributes:
        weights: the checkpoint's, by key.
        any_rounding: whether codes may be other than the nearest ones.
    """

    weights: Mapping[str, Weight] = field(default_factory=lambda: _NO_WEIGHTS)
    any_rounding: bool = False


@dataclass(frozen=True, slots=True)
class StoredValues:
    """A stored matrix, or some of its rows and columns, read as tiles need it; a `Delta`.

    Attributes:
        tensor: the tensor.
        matrix: rows and columns of it as a matrix.
        rows: rows of the stored matrix.
        columns: its columns.
        turned: whether it is meant transposed.
    """

    tensor: StoredTensor
    matrix: tuple[int, int]
    rows: range
    columns: range
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        shape = len(self.rows), len(self.columns)
        return shape[::-1] if self.turned else shape

    def transposed(self) -> "StoredValues":
        """Return the transpose."""
        return replace(self, turned=not self.turned)

    def part(self, rows: slice, columns: slice) -> "StoredValues":
        """Return some of its rows and columns."""
        own, others = (columns, rows) if self.turned else (rows, columns)
        return replace(self, rows=self.rows[own], columns=self.columns[others])

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        if self.turned:
            out[...] = self._read(self.rows, self.columns[start:stop]).T
        else:
            out[...] = self._read(self.rows[start:stop], self.columns)

    def _read(self, rows: range, columns: range) -> NDArray[Any]:
        if self.tensor.is_contiguous:
            return replace(self.tensor, shape=self.matrix).read_part(rows, columns)
        whole = self.tensor.read().reshape(self.matrix)
        return whole[rows.start : rows.stop : rows.step, columns.start : columns.stop : columns.step]


def place_references(weight: PlannedWeight, floats: Floats) -> tuple[Placed, ...]:
    """Return the float numbers of a weight, where the plan has some, each where it lies in the stored matrix."""
    found: dict[tuple[Any, ...], Placed] = {}
    for change in weight.changes:
        for reference in change.references:
            values = _open(reference, floats)
            for placed in _place(weight, change, reference, values):
                found.setdefault((reference.key, placed.rows, placed.columns), placed)
    return tuple(found.values())


def _open(reference: PlannedReference, floats: Floats) -> Delta:
    tensor, rows, columns = floats.weights[reference.key].tensor, range(*reference.rows), range(*reference.columns)
    values = StoredValues(tensor, reference.matrix, rows, columns, turned=reference.transposed)
    if reference.divisor == 1:
        return values
    return ScaledRows(values, np.full(values.shape[0], 1 / reference.divisor))


def _place(
    weight: PlannedWeight, change: PlannedChange, reference: PlannedReference, values: Delta
) -> Iterator[Placed]:
    """Yield the rows of the module that both the checkpoint's tensor and the base's weight hold."""
    held = reference.section or (0, values.shape[0])
    lines = range(*change.part.rows) if change.part is not None else range(weight.matrix[0])
    columns = range(*change.part.columns) if change.part is not None else range(weight.matrix[1])
    own = lines if not change.transposed else columns
    first = change.section[0] if change.section is not None else 0
    start, stop = max(held[0], first), min(held[1], first + len(own))
    if start >= stop:
        return
    values = values.part(slice(start - held[0], stop - held[0], 1), slice(0, values.shape[1], 1))
    if change.row_factors:
        values = ScaledRows(values, np.array(change.row_factors[start:stop]))
    if change.row_order:
        values = OrderedRows(values, np.array(change.row_order))
    own = own[start - first : stop - first]
    where = (own, columns) if not change.transposed else (lines, own)
    yield Placed(values.transposed() if change.transposed else values, Nature.REPLACEMENT, 1.0, *where)


def put_references(references: Sequence[Placed], rows: range, out: NDArray[Any]) -> None:
    """Write the float numbers of the stored rows `rows` into `out: (rows, columns)`; the others stay."""
    for placed in references:
        meeting = placed.meet(rows)
        if meeting is not None:
            own, lines = meeting
            cast(Delta, placed.values).write_rows(own.start, own.stop, out[lines, placed.column_slice])


class Likeness:
    """How what codes stand for is like the float numbers that they are said to be of.

    Args:
        matrix: rows and columns of the stored matrix.
    """

    def __init__(self, matrix: tuple[int, int]) -> None:
        self._count = self._strays = 0
        self._squares = 0.0
        self._products = tuple(np.zeros(size) for size in matrix)
        self._references = tuple(np.zeros(size) for size in matrix)

    def see(
        self, placed: Placed, rows: range, decoded: NDArray[Any], floats: NDArray[Any], steps: NDArray[Any]
    ) -> None:
        """Take in a tile: what its codes stand for, the float numbers, and the distances of codes."""
        meeting = placed.meet(rows)
        if meeting is None:
            return
        lines = meeting[1]
        d, w = decoded[lines, placed.column_slice], floats[lines, placed.column_slice]
        reach = np.broadcast_to(steps, decoded.shape)[lines, placed.column_slice] * np.float32(_STEP_SHARE)
        self._count += d.size
        self._strays += int(np.count_nonzero(np.abs(d - w) > reach))
        self._squares += float(np.einsum("ij,ij->", d, d))
        places = slice(rows.start + lines.start, rows.start + lines.stop, lines.step), placed.column_slice
        for axis, place in enumerate(places):
            self._products[axis][place] += np.einsum(_SUMS[axis], d, w)
            self._references[axis][place] += np.einsum(_SUMS[axis], w, w)

    def judge(self, weight: PlannedWeight, *, any_rounding: bool) -> None:
        """Raise what speaks against the float numbers.

        Raises:
            RefusedError: LF615 they are other ones, LF616 they were multiplied before they were quantised, LF617 the
                codes are not the nearest ones.
        """
        names = ", ".join(dict.fromkeys(each.name for change in weight.changes for each in change.references))
        expected = f"codes of {names} of the base checkpoint"
        lengths = float(np.sqrt(self._squares * self._references[0].sum()))
        cosine = float(self._products[0].sum()) / lengths if lengths else 1.0
        if not cosine >= _LEAST_COSINE:
            raise refuse("LF615", weight.name, f"codes of numbers whose cosine with its own is {cosine:.3f}", expected)
        share = self._strays / max(1, self._count)
        if share <= _MOST_STRAYS:
            return
        for axis, lines in enumerate(("rows", "columns")):
            spread = self._measure_spread(axis)
            if spread:
                raise refuse("LF616", weight.name, f"{lines} of which half are multiplied by {spread:.0%}", expected)
        if not any_rounding:
            found = f"{share:.1%} of the codes more than half a step from its numbers"
            raise refuse("LF617", weight.name, found, f"the nearest {expected}")

    def _measure_spread(self, axis: int) -> float:
        """Return by how much most rows, or columns, differ from multiples of 1; 0 where noise explains it."""
        known = self._references[axis] > 0
        spread = float(np.median(np.abs(self._products[axis][known] / self._references[axis][known] - 1)))
        each = self._count / np.count_nonzero(known)
        return spread if spread > _MULTIPLIED + _NOISE / np.sqrt(each) else 0.0
