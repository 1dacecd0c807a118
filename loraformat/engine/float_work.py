"""A quantised weight that stands in floats in the output: decoded, changed, rounded once, and turned where need be."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.engine.coded_work import CodedWork, Place
from loraformat.engine.tile_sums import TileSums, sum_up
from loraformat.engine.tiles import TileBuffers, change_tile
from loraformat.engine.weight_work import as_bytes

PANEL_BYTES: Final = 8 << 20
"""Rows that are turned together: what they become lies in the file in runs of as many numbers as there are rows."""


def dequantise(work: CodedWork, buffers: TileBuffers, place: Place) -> TileSums:
    """Merge a whole quantised weight into floats.

    Args:
        work: the weight, whose plan has a new form.
        buffers: the worker's memory.
        place: where the floats go.

    Raises:
        RefusedError: as `requantise`.
    """
    new = work.weight.new
    assert new is not None, "the plan says so"
    write = _write_turned if new.turned else _write_rows
    sums = TileSums()
    with np.errstate(over="ignore", invalid="ignore"):
        for rows in _list_panels(work):
            panel: NDArray[Any] = np.empty((len(rows), work.weight.matrix[1] - new.padding), work.float_form)
            for start in range(rows.start, rows.stop, work.weight.tile_rows):
                tile = range(start, min(start + work.weight.tile_rows, rows.stop))
                sums += _fill(work, buffers, tile, panel[start - rows.start : tile.stop - rows.start])
            write(work, panel, rows, place)
    work.judge_references()
    return sums


def _list_panels(work: CodedWork) -> Iterator[range]:
    """Yield rows that are written together: whole tiles."""
    rows, columns = work.weight.matrix
    tile = work.weight.tile_rows
    step = tile * max(1, PANEL_BYTES // (tile * columns * work.float_form.itemsize))
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))


def _fill(work: CodedWork, buffers: TileBuffers, rows: range, panel: NDArray[Any]) -> TileSums:
    base, merged, delta = change_tile(work, buffers, rows)
    values = merged[:, : panel.shape[1]]
    encoded: NDArray[Any] = np.empty(values.shape, work.float_form)
    work.written_encoding.encode(np.ascontiguousarray(values), encoded)
    panel[...] = encoded
    found = buffers.take("scratch", (len(rows), work.weight.matrix[1]), work.work_form)
    found[...] = 0
    found[:, : panel.shape[1]] = encoded
    return sum_up(base, delta, merged, found)


def _write_rows(work: CodedWork, panel: NDArray[Any], rows: range, place: Place) -> None:
    place.sink.write(as_bytes(panel).data, place.offset + rows.start * panel.shape[1] * panel.itemsize)


def _write_turned(work: CodedWork, panel: NDArray[Any], rows: range, place: Place) -> None:
    """Write rows of a matrix, or of several one under the other, as columns of each."""
    assert work.weight.new is not None, "the plan says so"
    height, columns = work.weight.new.shape[-1], panel.shape[1]
    start = rows.start
    while start < rows.stop:
        number, own = divmod(start, height)
        stop = min(rows.stop, (number + 1) * height)
        turned = np.ascontiguousarray(panel[start - rows.start : stop - rows.start].T)
        offset = place.offset + number * height * columns * turned.itemsize
        if stop - start == height:
            place.sink.write(as_bytes(turned).data, offset)
        else:
            for column, line in enumerate(turned):
                place.sink.write(as_bytes(line).data, offset + (column * height + own) * turned.itemsize)
        start = stop
