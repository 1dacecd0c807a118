"""The arithmetic of a merge: one tile of a weight at a time.

    read -> decode -> add the sum of all deltas, in float32 -> round once -> write

The sum of the deltas is made first and added once. What a tile needs is allocated once for each worker.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.dtypes import BY_NAME
from loraformat.encodings import ENCODINGS, Encoding
from loraformat.files import write_at
from loraformat.kinds import KINDS, AdditiveKind, Delta, ReplacingKind
from loraformat.plan import PlannedChange, PlannedWeight
from loraformat.rules import is_replacement
from loraformat.spans import StoredTensor

_SUMMED: Final = 8
"""Of tiles that rounding hardly touches, one in so many is summed up."""


@dataclass(frozen=True, slots=True)
class TileSums:
    """What one tile, or the tiles of one weight, add up to; float64.

    Attributes:
        kept: Σ Δ·(W′−W).
        wanted: Σ Δ².
        base: Σ W².
        overflowed: numbers that left the range of the stored form.
        not_finite: numbers of the base that were NaN or infinite before.
    """

    kept: float = 0.0
    wanted: float = 0.0
    base: float = 0.0
    overflowed: int = 0
    not_finite: int = 0

    def __add__(self, other: "TileSums") -> "TileSums":
        return TileSums(
            self.kept + other.kept,
            self.wanted + other.wanted,
            self.base + other.base,
            self.overflowed + other.overflowed,
            self.not_finite + other.not_finite,
        )

    @property
    def retained(self) -> float:
        """Share of the delta that survived rounding; 1.0 when there was none."""
        return self.kept / self.wanted if self.wanted else 1.0

    @property
    def relative(self) -> float:
        """‖Δ‖ / ‖W‖; 0.0 for a zero delta."""
        if not self.wanted:
            return 0.0
        return float(np.sqrt(self.wanted / self.base)) if self.base else float("inf")


class WeightWork:
    """One weight in progress: its deltas are read when its first tile is, and let go after its last.

    Args:
        weight: what to do.
        tensor: where the base has it.
        targets: the adapter targets, one for each change.
    """

    def __init__(self, weight: PlannedWeight, tensor: StoredTensor, targets: Sequence[Target]) -> None:
        self.weight = weight
        self.tensor = tensor
        self._targets = tuple(targets)
        self._lock = threading.Lock()
        self._deltas: tuple[Delta, ...] | None = None
        self.is_replaced = is_replacement(weight.changes[0].kind)
        encoding = ENCODINGS.find(weight.encoding)
        assert encoding is not None, "the plan names it"
        self.encoding: Encoding = encoding
        self.stored_form = BY_NAME[weight.dtype].numpy()
        self.work_form = encoding.work_dtype(BY_NAME[weight.dtype])
        self.runs_left = 0

    def deltas(self) -> tuple[Delta, ...]:
        """Return the deltas of the stored matrix, each with rows and columns as stored; or the one replacement."""
        with self._lock:
            if self._deltas is None:
                self._deltas = tuple(map(self._read_delta, self._targets, self.weight.changes))
            return self._deltas

    def finish_run(self) -> None:
        """Count one run of tiles as done; the last one lets the deltas go."""
        with self._lock:
            self.runs_left -= 1
            if self.runs_left == 0:
                self._deltas = None

    def _read_delta(self, target: Target, change: PlannedChange) -> Delta:
        kind = KINDS.find(target.kind)
        assert kind is not None, "the plan checked it"
        roles = [change.parameter] if self.is_replaced else list(target.factors)
        factors: Mapping[str, NDArray[Any]] = {
            role: target.factors[role].read().astype(self.work_form, copy=False) for role in roles
        }
        if self.is_replaced:
            delta = cast(ReplacingKind, kind).value(factors, change.parameter)
        else:
            delta = cast(AdditiveKind, kind).delta(target, factors, change.scale)
        return delta.transposed() if change.transposed else delta


class TileBuffers(threading.local):
    """Memory of one worker, reused from tile to tile; grows to the largest tile."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.uint8]] = {}

    def take(self, purpose: str, shape: tuple[int, int], form: np.dtype[Any]) -> NDArray[Any]:
        """Return uninitialised memory for `purpose` as an array of this shape and form."""
        nbytes = shape[0] * shape[1] * form.itemsize
        held = self._held.get(purpose)
        if held is None or held.nbytes < nbytes:
            held = self._held[purpose] = np.empty(nbytes, np.uint8)
        return held[:nbytes].view(form).reshape(shape)


def merge_tile(work: WeightWork, buffers: TileBuffers, rows: range, sink: int, sink_offset: int) -> TileSums:
    """Merge the stored rows `rows` of a weight and write them to the descriptor `sink`.

    Args:
        work: the weight.
        buffers: the worker's memory.
        rows: rows of the stored matrix; one tile.
        sink: descriptor of the output file.
        sink_offset: bytes from its start to the weight's first byte.

    Returns:
        The tile's sums. Where the stored form is the working form, rounding loses next to nothing: only every eighth
        tile has sums then, and the others only what overflowed.
    """
    plain = work.stored_form == work.work_form
    with np.errstate(over="ignore", invalid="ignore"):
        if plain and not work.is_replaced and rows.start // work.weight.tile_rows % _SUMMED:
            return _merge_in_place(work, buffers, rows, sink, sink_offset)
        return _merge_and_sum(work, buffers, rows, sink, sink_offset)


def _merge_in_place(work: WeightWork, buffers: TileBuffers, rows: range, sink: int, sink_offset: int) -> TileSums:
    """Merge a tile whose stored form is the working form, in two buffers, which is all that the caches like to hold."""
    shape, skipped_bytes = _place(work, rows)
    base = buffers.take("base", shape, work.work_form)
    merged = buffers.take("delta", shape, work.work_form)
    work.tensor.file.read_into(_as_bytes(base), work.tensor.span.offset + skipped_bytes)
    deltas = work.deltas()
    _sum_deltas(deltas, rows, merged, buffers.take("merged", shape, work.work_form) if len(deltas) > 1 else merged)
    np.add(base, merged, out=merged)
    write_at(sink, _as_bytes(merged).data, sink_offset + skipped_bytes)
    if math.isfinite(np.dot(merged.reshape(-1), merged.reshape(-1))):
        return TileSums()
    before = np.isfinite(base)
    overflowed = int(np.count_nonzero(before & ~np.isfinite(merged)))
    return TileSums(overflowed=overflowed, not_finite=int(np.count_nonzero(~before)))


def _merge_and_sum(work: WeightWork, buffers: TileBuffers, rows: range, sink: int, sink_offset: int) -> TileSums:
    """Merge a tile and compare what was written with what was wanted."""
    shape, skipped_bytes = _place(work, rows)
    plain = work.stored_form == work.work_form
    base = buffers.take("base", shape, work.work_form)
    merged = buffers.take("merged", shape, work.work_form)
    delta = buffers.take("delta", shape, work.work_form)
    read_to = base if plain else buffers.take("stored", shape, work.stored_form)
    write_from = merged if plain else read_to
    work.tensor.file.read_into(_as_bytes(read_to), work.tensor.span.offset + skipped_bytes)
    if not plain:
        work.encoding.decode(read_to, base)
    if work.is_replaced:
        _replace(work, rows, base, delta, merged)
    else:
        _sum_deltas(work.deltas(), rows, delta, merged)
        np.add(base, delta, out=merged)
    if not plain:
        work.encoding.encode(merged, write_from)
    write_at(sink, _as_bytes(write_from).data, sink_offset + skipped_bytes)
    if not plain:
        work.encoding.decode(write_from, merged)
    return _sum_up(base, delta, merged)


def _place(work: WeightWork, rows: range) -> tuple[tuple[int, int], int]:
    """Return a tile's shape, and the bytes between the weight's first and the tile's."""
    columns = work.weight.matrix[1]
    return (len(rows), columns), rows.start * columns * work.stored_form.itemsize


def _as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def _sum_deltas(deltas: Sequence[Delta], rows: range, out: NDArray[Any], scratch: NDArray[Any]) -> None:
    deltas[0].write_rows(rows.start, rows.stop, out)
    for delta in deltas[1:]:
        delta.write_rows(rows.start, rows.stop, scratch)
        np.add(out, scratch, out=out)


def _replace(work: WeightWork, rows: range, base: NDArray[Any], delta: NDArray[Any], merged: NDArray[Any]) -> None:
    """Write W + λ·(V − W) into `merged` and the change into `delta`; for λ = 1 the values themselves, unrounded."""
    (values,), (scale,) = work.deltas(), work.weight.scales
    values.write_rows(rows.start, rows.stop, merged)
    np.subtract(merged, base, out=delta)
    if scale != 1:
        np.multiply(delta, delta.dtype.type(scale), out=delta)
        np.add(base, delta, out=merged)


def _sum_up(base: NDArray[Any], delta: NDArray[Any], merged: NDArray[Any]) -> TileSums:
    """Return the sums of a tile; `merged` is overwritten.

    A number that overflowed makes the sums infinite or NaN, as does one of the base that was so before: only then is
    it looked for.
    """
    w, d, m = base.reshape(-1), delta.reshape(-1), merged.reshape(-1)
    np.subtract(m, w, out=m)
    sums = float(np.dot(m, d)), float(np.dot(d, d)), float(np.dot(w, w))
    if math.isfinite(sum(sums)):
        return TileSums(*sums)
    before = np.isfinite(w)
    overflowed = int(np.count_nonzero(before & ~np.isfinite(m)))
    return TileSums(*_sum_wide(w, d, m), overflowed, int(np.count_nonzero(~before)))


def _sum_wide(w: NDArray[Any], d: NDArray[Any], change: NDArray[Any]) -> tuple[float, float, float]:
    """Return the sums in float64, without the places that are not finite."""
    wide_d, wide_w, wide_change = d.astype(np.float64), w.astype(np.float64), change.astype(np.float64)
    good = np.isfinite(wide_change) & np.isfinite(wide_w)
    wide_d[~good] = wide_w[~good] = wide_change[~good] = 0.0
    return float(wide_change @ wide_d), float(wide_d @ wide_d), float(wide_w @ wide_w)
