"""One weight in progress: what changes it, placed on the rows and columns of its stored matrix."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import PartialFactor, Target
from loraformat.dtypes import BY_NAME
from loraformat.encodings import ENCODINGS, Encoding
from loraformat.engine.base_values import BaseValues
from loraformat.engine.scaled_rows import OrderedRows, ScaledRows
from loraformat.kinds import BESIDE, KINDS, AdditiveKind, Change, Delta, MappingKind, Nature, ReplacingKind, WeightMap
from loraformat.limits import STREAM_BYTES
from loraformat.plan.changes import PlannedChange
from loraformat.plan.weights import PlannedWeight
from loraformat.spans import StoredTensor

_FORM_BYTES: Final = 4
_MATRIX_AXES: Final = 2


@dataclass(frozen=True, slots=True)
class Placed:
    """A change of a weight, and where in the stored matrix it lies.

    Attributes:
        values: the delta, the new values, or the function of the base; its matrix is that of `rows` and `columns`.
        nature: which of the three.
        weight: the user's multiplier, for natures that `values` does not have it in.
        rows: rows of the stored matrix.
        columns: its columns.
    """

    values: Delta | WeightMap
    nature: Nature
    weight: float
    rows: range
    columns: range

    def meet(self, tile: range) -> tuple[range, slice] | None:
        """Return which of its own rows lie in `tile`, and which rows of the tile these are; None for none."""
        step = self.rows.step
        first = max(0, -((self.rows.start - tile.start) // step))
        stop = min(len(self.rows), -((self.rows.start - tile.stop) // step))
        if first >= stop:
            return None
        start = self.rows[first] - tile.start
        return range(first, stop), slice(start, start + (stop - first - 1) * step + 1, step)

    @property
    def column_slice(self) -> slice:
        """Its columns as a slice of the stored matrix's."""
        return slice(self.columns.start, self.columns.stop, self.columns.step)


class WeightWork:
    """One weight in progress: its changes are read when its first tile is, and let go after its last.

    Args:
        weight: what to do.
        tensor: where the base has it; None for a weight that the base lacks.
        targets: the adapter targets, one for each change.
        neighbours: the base's tensors by key, for changes that are computed from another one as well.
    """

    def __init__(
        self,
        weight: PlannedWeight,
        tensor: StoredTensor | None,
        targets: Sequence[Target],
        neighbours: Mapping[str, StoredTensor] = MappingProxyType({}),
    ) -> None:
        self.weight = weight
        self.tensor = tensor
        self._targets = tuple(targets)
        self._neighbours = neighbours
        self._lock = threading.Lock()
        self._placed: tuple[Placed, ...] | None = None
        self._choose_forms()
        self.base_rows = _count_base_rows(weight)
        self.base_columns = _count_base_columns(weight)
        self.is_plain_sum = all(
            change.nature is Nature.ADDITIVE and change.part is None for change in weight.changes
        ) and bool(weight.changes)
        self.runs_left = 0

    def _choose_forms(self) -> None:
        """Set how numbers are stored and worked with."""
        weight = self.weight
        self.encoding = find_encoding(weight.encoding)
        self.written_encoding = find_encoding(weight.new.encoding) if weight.new else self.encoding
        self.stored_form = BY_NAME[weight.dtype].numpy()
        self.written_form = BY_NAME[weight.written_dtype].numpy()
        wide = {self.encoding.work_dtype(BY_NAME[weight.dtype])}
        wide.add(self.written_encoding.work_dtype(BY_NAME[weight.written_dtype]))
        self.work_form: np.dtype[Any] = max(wide, key=lambda form: form.itemsize)

    def placed(self) -> tuple[Placed, ...]:
        """Return the changes: replacements first, then functions of the base, then what is added."""
        with self._lock:
            if self._placed is None:
                self._placed = tuple(map(self._place, self._targets, self.weight.changes))
            return self._placed

    def finish_run(self) -> None:
        """Count one run of tiles as done; the last one lets the changes go."""
        with self._lock:
            self.runs_left -= 1
            if self.runs_left == 0:
                self._placed = None

    def read_stored(self, rows: range, out: NDArray[Any]) -> None:
        """Write rows of the base into `out: (rows, columns)` of the stored form; zeros where the base has none."""
        have = max(0, min(rows.stop, self.base_rows) - rows.start)
        if have and self.base_columns < out.shape[1]:
            own: NDArray[Any] = np.empty((have, self.base_columns), out.dtype)
            self._read_rows(range(rows.start, rows.start + have), own)
            out[:have, : self.base_columns] = own
            out[:have, self.base_columns :] = 0
        elif have:
            self._read_rows(range(rows.start, rows.start + have), out[:have])
        out[have:] = 0

    def read_base(self, rows: range, stored: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows of the base into `out: (rows, columns)` of the work form; zeros where the base has none.

        Args:
            rows: rows of the stored matrix.
            stored: room for them in the stored form; `out` itself where that is the work form.
            out: where they go.
        """
        self.read_stored(rows, stored)
        if stored is not out:
            self.encoding.decode(stored, out)

    def _read_rows(self, rows: range, out: NDArray[Any]) -> None:
        """Write stored rows into `out`; a view that is no run of bytes is read whole."""
        assert self.tensor is not None, "the plan says so"
        if self.tensor.is_contiguous:
            skipped_bytes = rows.start * out.shape[1] * self.stored_form.itemsize
            self.tensor.file.read_into(as_bytes(out), self.tensor.span.offset + skipped_bytes)
        else:
            out[...] = self.tensor.read().reshape(-1, out.shape[1])[rows.start : rows.stop]

    def _place(self, target: Target, change: PlannedChange) -> Placed:
        values = self._read(target, change)
        if change.transposed:
            values = values.transposed()
        rows, columns = self.weight.matrix
        where = (range(rows), range(columns))
        if change.part is not None:
            where = (range(*change.part.rows), range(*change.part.columns))
        placed = Placed(values, change.nature, change.weight, *where)
        if change.nature is not Nature.FUNCTION_OF_BASE:
            return placed
        prepared = cast(WeightMap, values).prepare(self._survey(placed))
        return Placed(prepared, change.nature, change.weight, *where)

    def _read(self, target: Target, planned: PlannedChange) -> Delta | WeightMap:
        """Return what the kind makes of the factors, in the canonical orientation."""
        kind = KINDS.find(target.kind)
        assert kind is not None, "the plan checked it"
        change = _find_change(kind.changes(target), planned)
        change = replace(change, shape=planned.shape or change.shape, extent=planned.extent)
        factors = {role: self._read_factor(target, role, change) for role in change.roles}
        if planned.beside is not None:
            near = planned.beside
            factors[BESIDE] = BaseValues(self._neighbours[near.key], self.work_form, near.transposed)
        if change.nature is Nature.FUNCTION_OF_BASE:
            return cast(MappingKind, kind).map(target, change, factors)
        if change.nature is Nature.REPLACEMENT:
            values = cast(ReplacingKind, kind).value(target, change, factors)
        else:
            values = cast(AdditiveKind, kind).delta(target, change, factors, planned.scale)
        if planned.row_factors:
            values = ScaledRows(values, np.array(planned.row_factors))
        if planned.section:
            values = values.part(slice(*planned.section, 1), slice(0, values.shape[1], 1))
        return OrderedRows(values, np.array(planned.row_order)) if planned.row_order else values

    def _read_factor(self, target: Target, role: str, change: Change) -> Any:
        """Return a factor in the work form; whole numbers (indices) as they are, and what streams unread."""
        factor = target.factors[role]
        if change.streams and isinstance(factor, PartialFactor):
            return factor
        values = factor.read()
        return values.astype(self.work_form, copy=False) if factor.dtype.family == "float" else values

    def _survey(self, placed: Placed) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield the base's rows under a change, tile by tile, as `WeightMap.prepare` takes them."""
        columns, step = self.weight.matrix[1], self.weight.tile_rows
        out: NDArray[Any] = np.empty((step, columns), self.work_form)
        stored = out if self.stored_form == self.work_form else np.empty((step, columns), self.stored_form)
        for start in range(0, self.weight.matrix[0], step):
            tile = range(start, min(start + step, self.weight.matrix[0]))
            meeting = placed.meet(tile)
            if meeting is not None:
                self.read_base(tile, stored[: len(tile)], out[: len(tile)])
                yield meeting[0].start, out[: len(tile)][meeting[1], placed.column_slice]


def count_held(target: Target, planned: PlannedChange) -> int:
    """Return how many numbers of a change's factors are in memory at once."""
    kind = KINDS.find(target.kind)
    assert kind is not None, "the plan checked it"
    change = _find_change(kind.changes(target), planned)
    factors = [target.factors[role] for role in change.roles]
    if change.streams and all(isinstance(factor, PartialFactor) for factor in factors):
        return sum(min(factor.elements, STREAM_BYTES // _FORM_BYTES) for factor in factors)
    return sum(factor.elements for factor in factors)


def as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the bytes of a contiguous array, as an array over the same memory."""
    return array.reshape(-1).view(np.uint8)


def find_encoding(name: str) -> Encoding:
    """Return the encoding of a name that a plan has."""
    encoding = ENCODINGS.find(name)
    assert encoding is not None, "the plan names it"
    return encoding


def _find_change(changes: Sequence[Change], planned: PlannedChange) -> Change:
    return next(each for each in changes if (each.parameter, each.nature) == (planned.parameter, planned.nature))


def _count_base_rows(weight: PlannedWeight) -> int:
    """Return how many rows of the output's matrix the base has numbers for."""
    if weight.new is None:
        return weight.matrix[0]
    if not weight.new.has_base:
        return 0
    return weight.shape[0] * (weight.matrix[0] // weight.new.shape[0]) if weight.shape else 1


def _count_base_columns(weight: PlannedWeight) -> int:
    """Return how many columns of the output's matrix the base has numbers for."""
    new = weight.new
    if new is None or weight.is_coded or not len(weight.shape) == len(new.shape) == _MATRIX_AXES:
        return weight.matrix[1]
    return weight.shape[1]
