"""The arithmetic of a merge: one tile of a weight at a time.

    read -> decode -> change, in float32 -> round once -> write

Replaced values come first, a function of the base next, and the sum of all deltas is made apart and added once. What a
tile needs is allocated once for each worker.
"""

import threading
from dataclasses import replace
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from loraformat.engine.sinks import Sink
from loraformat.engine.tile_sums import TileSums, count_broken, is_in_range, sum_up
from loraformat.engine.weight_work import Placed, WeightWork, as_bytes
from loraformat.kinds import Delta, Nature, WeightMap

_SUMMED: Final = 8
"""Of the tiles of a large weight that is only added to, one in so many is summed up."""

_ROWS_SKIPPED: Final = 32
"""And of the rows of such a tile at most one in so many."""

_ALL_SUMMED: Final = 2
"""A weight of fewer tiles than this times `_SUMMED` has more of them summed up, and one of so few all."""

_NUMBERS_SUMMED: Final = 1 << 17
"""As many numbers of a weight are summed up at least, or all of them."""

_SHAPES_HELD: Final = 64


class TileBuffers(threading.local):
    """Memory of one worker, reused from tile to tile; grows to the largest tile."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.uint8]] = {}
        self._shaped: dict[tuple[str, tuple[int, int], np.dtype[Any]], NDArray[Any]] = {}

    def take(self, purpose: str, shape: tuple[int, int], form: np.dtype[Any]) -> NDArray[Any]:
        """Return uninitialised memory for `purpose` as an array of this shape and form."""
        shaped = self._shaped.get((purpose, shape, form))
        if shaped is not None:
            return shaped
        nbytes = shape[0] * shape[1] * form.itemsize
        held = self._held.get(purpose)
        if held is None or held.nbytes < nbytes or len(self._shaped) > _SHAPES_HELD:
            self._shaped.clear()
            held = self._held[purpose] = np.empty(nbytes, np.uint8)
        shaped = self._shaped[purpose, shape, form] = held[:nbytes].view(form).reshape(shape)
        return shaped


def merge_rows(work: WeightWork, buffers: TileBuffers, run: range, sink: Sink, sink_offset: int) -> TileSums:
    """Merge the stored rows `run` of a weight, tile by tile, and write them to `sink`.

    Args:
        work: the weight.
        buffers: the worker's memory.
        run: rows of the stored matrix, whole tiles.
        sink: the output file.
        sink_offset: bytes from its start to the weight's first byte.

    Returns:
        The sums of the run. Of a large weight that is only added to, some rows are summed up, and of the others only
        what overflowed is counted.
    """
    sums = TileSums()
    height, columns = work.weight.tile_rows, work.weight.matrix[1]
    row_bytes = columns * work.written_form.itemsize
    merge = _add_tile if work.is_plain_sum else _change_and_sum
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(run.start, run.stop, height):
            rows = range(start, min(start + height, run.stop))
            sums += merge(work, buffers, rows, sink, sink_offset + start * row_bytes)
    return sums


def _add_tile(work: WeightWork, buffers: TileBuffers, rows: range, sink: Sink, offset: int) -> TileSums:
    """Merge a tile that is only added to, in the fewest buffers: the caches like to hold no more."""
    shape = (len(rows), work.weight.matrix[1])
    stored = buffers.take("stored", shape, work.stored_form)
    work.read_stored(rows, stored)
    merged = _sum_deltas(work, buffers, rows, shape)
    some = _choose_rows(work, rows)
    kept = _keep_rows(work, buffers, stored, merged, some) if some is not None else None
    work.encoding.add(stored, merged)
    written = _round(work, buffers, merged)
    sums = TileSums()
    if kept is not None and some is not None:
        wanted = _keep(buffers, "some wanted", merged[some])
        sums = sum_up(*kept, wanted, _read_back(work, buffers, wanted, written[some]))
    if not is_in_range(merged, written):
        broken = _count_broken(work, rows, written)
        sums = replace(sums, overflowed=broken.overflowed, not_finite=broken.not_finite)
    sink.write(as_bytes(written).data, offset)
    return sums


def _count_broken(work: WeightWork, rows: range, written: NDArray[Any]) -> TileSums:
    """Count by the base as it is before the tile is written: the sink may be the base."""
    base: NDArray[Any] = np.empty(written.shape, work.work_form)
    work.read_base(rows, np.empty(written.shape, work.stored_form), base)
    return count_broken(base, np.isfinite(written.astype(np.float64)))


def _keep_rows(
    work: WeightWork, buffers: TileBuffers, stored: NDArray[Any], deltas: NDArray[Any], some: slice
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return some rows of the base and of the delta, before the one is added to the other."""
    delta = _keep(buffers, "some deltas", deltas[some])
    base = buffers.take("some of the base", cast(tuple[int, int], delta.shape), work.work_form)
    work.encoding.decode(stored[some], base)
    return base, delta


def _keep(buffers: TileBuffers, purpose: str, rows: NDArray[Any]) -> NDArray[Any]:
    """Return a copy of some rows, in the worker's own memory: what is taken anew for each tile costs page faults."""
    kept = buffers.take(purpose, cast(tuple[int, int], rows.shape), rows.dtype)
    np.copyto(kept, rows)
    return kept


def _change_and_sum(work: WeightWork, buffers: TileBuffers, rows: range, sink: Sink, offset: int) -> TileSums:
    """Merge a tile whatever is done to it, and compare what was written with what was wanted."""
    base, merged, delta = change_tile(work, buffers, rows)
    written = _round(work, buffers, merged)
    sink.write(as_bytes(written).data, offset)
    return sum_up(base, delta, merged, _read_back(work, buffers, merged, written))


def _read_back(work: WeightWork, buffers: TileBuffers, merged: NDArray[Any], written: NDArray[Any]) -> NDArray[Any]:
    """Return the values that were written: `merged` itself where the output holds the working form."""
    if written.dtype == merged.dtype:
        return merged
    found = buffers.take("scratch", cast(tuple[int, int], merged.shape), work.work_form)
    work.written_encoding.decode(written, found)
    return found


def change_tile(work: WeightWork, buffers: TileBuffers, rows: range) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the rows of the base, what becomes of them before rounding, and the difference; in the buffers."""
    shape = (len(rows), work.weight.matrix[1])
    base = _read_base(work, buffers, rows, shape)
    if work.is_plain_sum:
        delta = _sum_deltas(work, buffers, rows, shape)
        return base, np.add(base, delta, out=buffers.take("merged", shape, base.dtype)), delta
    return base, *_compose(work, buffers, rows, base)


def _choose_rows(work: WeightWork, rows: range) -> slice | None:
    """Return which rows of a tile are summed up: all of a small weight, some of some tiles of a large one, or None."""
    height, (total, columns) = work.weight.tile_rows, work.weight.matrix
    every = max(1, min(_SUMMED, total // height // _ALL_SUMMED))
    if rows.start // height % every:
        return None
    step = max(1, min(_ROWS_SKIPPED, total * columns // every // _NUMBERS_SUMMED))
    return slice(None, None, step - 1 | 1)  # Odd: what repeats in a weight, such as heads, is met everywhere.


def _read_base(work: WeightWork, buffers: TileBuffers, rows: range, shape: tuple[int, int]) -> NDArray[Any]:
    base = buffers.take("base", shape, work.work_form)
    stored = base if work.stored_form == work.work_form else buffers.take("stored", shape, work.stored_form)
    work.read_base(rows, stored, base)
    return base


def _sum_deltas(work: WeightWork, buffers: TileBuffers, rows: range, shape: tuple[int, int]) -> NDArray[Any]:
    """Return the sum of all deltas, of a weight that they are only added to, each to the whole matrix."""
    delta = buffers.take("delta", shape, work.work_form)
    first, *others = work.placed()
    cast(Delta, first.values).write_rows(rows.start, rows.stop, delta)
    for placed in others:
        scratch = buffers.take("scratch", shape, work.work_form)
        cast(Delta, placed.values).write_rows(rows.start, rows.stop, scratch)
        np.add(delta, scratch, out=delta)
    return delta


def _compose(
    work: WeightWork, buffers: TileBuffers, rows: range, base: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the tile with everything done to it, and how much that changed it."""
    shape = cast(tuple[int, int], base.shape)
    delta, merged = buffers.take("delta", shape, base.dtype), buffers.take("merged", shape, base.dtype)
    scratch = buffers.take("scratch", shape, base.dtype)
    np.copyto(merged, base)
    added = [placed for placed in work.placed() if placed.nature is Nature.ADDITIVE]
    for placed in work.placed():
        if placed.nature is not Nature.ADDITIVE:
            _put(placed, rows, base, merged, scratch, work.base_rows)
    if any(placed.meet(rows) for placed in added):
        delta[...] = 0
        for placed in added:
            _accumulate(placed, rows, delta, scratch)
        np.add(merged, delta, out=merged)
    return merged, np.subtract(merged, base, out=delta)


def _put(
    placed: Placed, rows: range, base: NDArray[Any], merged: NDArray[Any], scratch: NDArray[Any], base_rows: int
) -> None:
    """Write V or f(W), or with a weight λ what lies between, W + λ·(V − W), into its part of `merged`.

    For λ = 1 these are the values themselves, unrounded. Rows that the base lacks have nothing to lie between.
    """
    meeting = placed.meet(rows)
    if meeting is None:
        return
    own, (sink, source) = meeting[0], (array[meeting[1], placed.column_slice] for array in (merged, base))
    values = scratch.reshape(-1)[: sink.size].reshape(sink.shape)
    if placed.nature is Nature.REPLACEMENT:
        cast(Delta, placed.values).write_rows(own.start, own.stop, values)
    else:
        cast(WeightMap, placed.values).write_rows(own.start, own.stop, np.ascontiguousarray(source), values)
    if placed.weight != 1:
        have = sum(row < base_rows for row in placed.rows[own.start : own.stop])
        between = values[:have]
        np.subtract(between, source[:have], out=between)
        np.multiply(between, between.dtype.type(placed.weight), out=between)
        np.add(source[:have], between, out=between)
    np.copyto(sink, values)


def _accumulate(placed: Placed, rows: range, delta: NDArray[Any], scratch: NDArray[Any]) -> None:
    meeting = placed.meet(rows)
    if meeting is None:
        return
    sink = delta[meeting[1], placed.column_slice]
    values = scratch.reshape(-1)[: sink.size].reshape(sink.shape)
    cast(Delta, placed.values).write_rows(meeting[0].start, meeting[0].stop, values)
    np.add(sink, values, out=sink)


def _round(work: WeightWork, buffers: TileBuffers, merged: NDArray[Any]) -> NDArray[Any]:
    """Return the rounded tile: `merged` itself where the output holds the working form."""
    if work.written_form == work.work_form:
        return merged
    written = buffers.take("stored", cast(tuple[int, int], merged.shape), work.written_form)
    work.written_encoding.encode(merged, written)
    return written
