"""A quantised weight in progress: its codes are decoded with their scales, and encoded again with new ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.bases import Weight
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.encodings import CODED, Coder, Coding, Fit
from loraformat.engine.references import Floats, Likeness, place_references, put_references
from loraformat.engine.sinks import Sink
from loraformat.engine.tile_sums import TileSums, sum_up
from loraformat.engine.tiles import TileBuffers, change_tile
from loraformat.engine.weight_work import WeightWork, as_bytes, find_encoding
from loraformat.plan.weights import PlannedWeight
from loraformat.planning.coded_rows import can_cut, cut_coding, locate_rows

_NO_FLOATS: Final = Floats()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes.

    Attributes:
        sink: the output file.
        offset: bytes from its start.
    """

    sink: Sink
    offset: int


class CodedWork(WeightWork):
    """One quantised weight in progress.

    Args:
        weight: what to do.
        source: the base's weight, which is quantised.
        targets: the adapter targets, one for each change.
        floats: where float numbers are to be had, of weights that the plan takes them for.
    """

    def __init__(
        self, weight: PlannedWeight, source: Weight, targets: Sequence[Target], floats: Floats = _NO_FLOATS
    ) -> None:
        assert source.coding is not None, "the plan says so"
        self.coding, self._form = source.coding, source.tensor.dtype
        if weight.is_copy:
            self.coding = replace(source.coding, zeros_fixed="")
        self.is_cut = can_cut(source.coding, weight.tile_rows)
        self._bound: tuple[int, Coder] | None = None
        self.references = place_references(weight, floats)
        self._likeness = Likeness(weight.matrix)
        self._any_rounding = floats.any_rounding
        super().__init__(weight, source.tensor, targets)
        self.base_rows = weight.matrix[0]

    def _choose_forms(self) -> None:
        """Set how numbers are stored and worked with."""
        wide = self.weight.nbytes > self.weight.matrix[0] * self.weight.matrix[1]  # Scales lie between the codes.
        self.stored_form = self.written_form = np.dtype(np.uint16 if wide else np.uint8)
        self.work_form = np.dtype(np.float32)
        if self.weight.new is not None and self.weight.is_dequantised:
            self.written_encoding = find_encoding(self.weight.new.encoding)
            self.float_form: np.dtype[Any] = BY_NAME[self.weight.new.dtype].numpy()

    @property
    def row_bytes(self) -> int:
        """Bytes of the codes of one row."""
        return self.weight.nbytes // self.weight.matrix[0]

    def coder_at(self, rows: range) -> tuple[Coder, range]:
        """Return the coder of rows of one tile, and which of its rows they are."""
        tile = rows.start // self.weight.tile_rows if self.is_cut else 0
        if self._bound is None or self._bound[0] != tile:
            self._bound = tile, bind_coder(cut_coding(self.coding, self._tile(tile)), self._form)
        start = tile * self.weight.tile_rows
        return self._bound[1], range(rows.start - start, rows.stop - start)

    def _tile(self, number: int) -> range:
        height, step = self.weight.matrix[0], self.weight.tile_rows
        return range(number * step, min((number + 1) * step, height)) if self.is_cut else range(height)

    def read_base(self, rows: range, stored: NDArray[Any], out: NDArray[Any]) -> None:
        """Write the values of rows into `out: (rows, columns)`; `stored` is room for their codes.

        Where float numbers are to be had, these are the values, and they are compared with what the codes stand for.
        """
        coder, own = self.coder_at(rows)
        coder.decode(self.read_codes(rows, stored), own, out)
        if self.references:
            decoded = out.copy()
            put_references(self.references, rows, out)
            for placed in self.references:
                self._likeness.see(placed, rows, decoded, out, coder.steps(own, decoded))

    def judge_references(self) -> None:
        """Raise what speaks against the float numbers being those that were quantised; LF615, LF616, LF617."""
        if self.references:
            self._likeness.judge(self.weight, any_rounding=self._any_rounding)

    def read_codes(self, rows: range, room: NDArray[Any]) -> NDArray[Any]:
        """Return the codes of rows as they are stored, in `room`."""
        assert self.tensor is not None, "the plan says so"
        codes = room.reshape(-1).view(np.uint8)[: len(rows) * self.row_bytes].reshape(len(rows), self.row_bytes)
        self.tensor.file.read_into(as_bytes(codes), self.tensor.span.offset + rows.start * self.row_bytes)
        return codes


def bind_coder(coding: Coding, form: Dtype) -> Coder:
    """Return the coder of a weight."""
    encoding = CODED.find(coding.encoding)
    assert encoding is not None, "the base names it"
    return encoding.bind(coding, form)


def requantise(work: CodedWork, buffers: TileBuffers, places: Mapping[str, Place]) -> TileSums:
    """Merge a whole quantised weight: fit scales to the new values first, then encode these with them.

    Where scales hang on the numbers of a tile alone, each tile is done by itself. Scales of a channel may hang on all
    tiles; then each is computed twice. Memory is that of one tile.

    Args:
        work: the weight.
        buffers: the worker's memory.
        places: where the codes go (the role ``), and the companions that are written, by role.

    Raises:
        RefusedError: LF615, LF616, LF617 float numbers in the place of what the codes stand for are others.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        sums = (_requantise_tiles if work.is_cut else _requantise_whole)(work, buffers, places)
    work.judge_references()
    return sums


def _requantise_whole(work: CodedWork, buffers: TileBuffers, places: Mapping[str, Place]) -> TileSums:
    coder, _ = work.coder_at(range(work.weight.matrix[0]))
    if len(places) > 1:
        coder = _fit_whole(work, coder, buffers)
    sums = TileSums()
    for rows in list_tiles(work.weight):
        sums += _encode_tile(work, coder, buffers, (rows, rows), places[""], *change_tile(work, buffers, rows))
    _write_companions(work, coder, range(work.weight.matrix[0]), places)
    return sums


def _requantise_tiles(work: CodedWork, buffers: TileBuffers, places: Mapping[str, Place]) -> TileSums:
    sums = TileSums()
    for rows in list_tiles(work.weight):
        coder, own = work.coder_at(rows)
        changed = change_tile(work, buffers, rows)
        if len(places) > 1:
            coder = _fit_tile(work, coder, _room(work, buffers, rows), own, *changed[1:])
        sums += _encode_tile(work, coder, buffers, (rows, own), places[""], *changed)
        _write_companions(work, coder, rows, places)
    return sums


def list_recoded(work: CodedWork, buffers: TileBuffers) -> Iterator[NDArray[np.float32]]:
    """Yield, tile by tile, what stands in the output less what the base's codes stand for: `(rows, columns)`.

    Where float numbers are at hand, the codes that come of them differ from the base's by more than is added.
    """
    fits = any(each.is_written for each in work.weight.companions) and not work.weight.is_dequantised
    first, _ = work.coder_at(range(work.weight.matrix[0]))
    whole = _fit_whole(work, first, buffers) if fits and not work.is_cut else first
    for rows in list_tiles(work.weight):
        coder, own = work.coder_at(rows)
        _, merged, delta = change_tile(work, buffers, rows)
        codes, new = _room(work, buffers, rows), merged.copy()
        before = np.empty_like(new)
        coder.decode(codes, own, before)
        if not work.weight.is_dequantised:
            after = whole if not work.is_cut else _fit_tile(work, coder, codes, own, merged, delta) if fits else coder
            after.encode(merged, own, codes)
            after.decode(codes, own, new)
        yield np.subtract(new, before, out=new).astype(np.float32)


def _fit_whole(work: CodedWork, coder: Coder, buffers: TileBuffers) -> Coder:
    fit = _start_fit(work, coder)
    for rows in list_tiles(work.weight):
        _, merged, delta = change_tile(work, buffers, rows)
        fit.see(_room(work, buffers, rows), rows, merged, delta)
    return fit.finish()


def _fit_tile(
    work: CodedWork, coder: Coder, codes: NDArray[Any], own: range, merged: NDArray[Any], delta: NDArray[Any]
) -> Coder:
    fit = _start_fit(work, coder)
    fit.see(codes, own, merged, delta)
    return fit.finish()


def _start_fit(work: CodedWork, coder: Coder) -> Fit:
    return coder.start_afresh() if work.references else coder.start_fit()


def _write_companions(work: CodedWork, coder: Coder, rows: range, places: Mapping[str, Place]) -> None:
    """Write scales and zero points of rows, those that may change."""
    assert places.keys() - {""} <= coder.tensors().keys(), "the plan has what the coder writes"
    for role, values in coder.tensors().items():
        if role in places:
            place, before = places[role], locate_rows(work.coding, role, rows) if work.is_cut else 0
            place.sink.write(as_bytes(np.ascontiguousarray(values)).data, place.offset + before)


def list_tiles(weight: PlannedWeight) -> list[range]:
    """Return the rows of each tile of a weight."""
    starts = range(0, weight.matrix[0], weight.tile_rows)
    return [range(start, min(start + weight.tile_rows, weight.matrix[0])) for start in starts]


def _encode_tile(
    work: CodedWork,
    coder: Coder,
    buffers: TileBuffers,
    rows: tuple[range, range],
    place: Place,
    base: NDArray[Any],
    merged: NDArray[Any],
    delta: NDArray[Any],
) -> TileSums:
    """Write the codes of a tile, whose rows are those of the weight and those of the coder."""
    whole, own = rows
    codes = _room(work, buffers, whole)
    coder.encode(merged, own, codes)
    place.sink.write(as_bytes(codes).data, place.offset + whole.start * work.row_bytes)
    found = buffers.take("scratch", (len(own), work.weight.matrix[1]), work.work_form)
    coder.decode(codes, own, found)
    lost = int(np.count_nonzero(~np.isfinite(merged)))
    return sum_up(base, delta, merged, found) + TileSums(overflowed=lost)


def _room(work: CodedWork, buffers: TileBuffers, rows: range) -> NDArray[Any]:
    """Return where the codes of a tile lie: what it was read into."""
    whole = buffers.take("stored", (len(rows), work.weight.matrix[1]), work.stored_form)
    return whole.reshape(-1).view(np.uint8)[: len(rows) * work.row_bytes].reshape(len(rows), work.row_bytes)
