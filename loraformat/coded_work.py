"""A quantised weight in progress: its codes are decoded with their scales, and encoded again with new ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.bases import Weight
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.encodings import CODED, Coder, Coding
from loraformat.plan import PlannedWeight
from loraformat.references import Floats, Likeness, place_references, put_references
from loraformat.sinks import Sink
from loraformat.tiles import TileBuffers, TileSums, change_tile, sum_up
from loraformat.weight_work import WeightWork, as_bytes, find_encoding

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
        self.coder = bind_coder(source.coding, source.tensor.dtype)
        self.references = place_references(weight, floats)
        self._any_rounding = floats.any_rounding
        super().__init__(weight, source.tensor, targets)
        self.base_rows = weight.matrix[0]

    def _choose_forms(self) -> None:
        """Set how numbers are stored and worked with."""
        self.stored_form = self.written_form = np.dtype(np.uint8)
        self.work_form = np.dtype(np.float32)
        if self.weight.new is not None:
            self.written_encoding = find_encoding(self.weight.new.encoding)
            self.float_form: np.dtype[Any] = BY_NAME[self.weight.new.dtype].numpy()

    @property
    def row_bytes(self) -> int:
        """Bytes of the codes of one row."""
        return self.weight.nbytes // self.weight.matrix[0]

    def read_base(self, rows: range, stored: NDArray[Any], out: NDArray[Any]) -> None:
        """Write the values of rows into `out: (rows, columns)`; `stored` is room for their codes.

        Where float numbers are to be had, these are the values.
        """
        self.coder.decode(self.read_codes(rows, stored), rows, out)
        put_references(self.references, rows, out)

    def check_references(self, buffers: TileBuffers) -> None:
        """Raise what speaks against the float numbers being those that were quantised; LF615, LF616, LF617."""
        if not self.references:
            return
        likeness = Likeness(self.weight.matrix)
        for rows in list_tiles(self.weight):
            shape = (len(rows), self.weight.matrix[1])
            decoded, floats = (buffers.take(name, shape, self.work_form) for name in ("base", "merged"))
            self.coder.decode(self.read_codes(rows, buffers.take("stored", shape, self.stored_form)), rows, decoded)
            np.copyto(floats, decoded)
            put_references(self.references, rows, floats)
            for placed in self.references:
                likeness.see(placed, rows, decoded, floats, self.coder.steps(rows))
        likeness.judge(self.weight, any_rounding=self._any_rounding)

    def read_codes(self, rows: range, room: NDArray[Any]) -> NDArray[Any]:
        """Return the codes of rows as they are stored, in `room`."""
        assert self.tensor is not None, "the plan says so"
        codes = room.reshape(-1)[: len(rows) * self.row_bytes].reshape(len(rows), self.row_bytes)
        self.tensor.file.read_into(as_bytes(codes), self.tensor.span.offset + rows.start * self.row_bytes)
        return codes


def bind_coder(coding: Coding, form: Dtype) -> Coder:
    """Return the coder of a weight."""
    encoding = CODED.find(coding.encoding)
    assert encoding is not None, "the base names it"
    return encoding.bind(coding, form)


def requantise(work: CodedWork, buffers: TileBuffers, places: Mapping[str, Place]) -> TileSums:
    """Merge a whole quantised weight: fit scales to the new values first, then encode these with them.

    Scales of a channel hang on all its numbers, so every tile is computed twice; memory is that of one tile.
    Float numbers in the place of what the codes stand for are compared with that before.

    Args:
        work: the weight.
        buffers: the worker's memory.
        places: where the codes go (the role ``), and the companions that are written, by role.
    """
    work.check_references(buffers)
    with np.errstate(over="ignore", invalid="ignore"):
        coder = _fit(work, buffers) if len(places) > 1 else work.coder
        sums = TileSums()
        for rows in list_tiles(work.weight):
            sums += _encode_tile(work, coder, buffers, rows, places[""])
    for role, values in coder.tensors().items():
        if role in places:
            places[role].sink.write(as_bytes(np.ascontiguousarray(values)).data, places[role].offset)
    return sums


def list_tiles(weight: PlannedWeight) -> list[range]:
    """Return the rows of each tile of a weight."""
    starts = range(0, weight.matrix[0], weight.tile_rows)
    return [range(start, min(start + weight.tile_rows, weight.matrix[0])) for start in starts]


def _fit(work: CodedWork, buffers: TileBuffers) -> Coder:
    fit = work.coder.start_afresh() if work.references else work.coder.start_fit()
    for rows in list_tiles(work.weight):
        _, merged, delta = change_tile(work, buffers, rows)
        fit.see(_room(work, buffers, rows), rows, merged, delta)
    return fit.finish()


def _encode_tile(work: CodedWork, coder: Coder, buffers: TileBuffers, rows: range, place: Place) -> TileSums:
    base, merged, delta = change_tile(work, buffers, rows)
    codes = _room(work, buffers, rows)
    coder.encode(merged, rows, codes)
    place.sink.write(as_bytes(codes).data, place.offset + rows.start * work.row_bytes)
    found = buffers.take("scratch", (len(rows), work.weight.matrix[1]), work.work_form)
    coder.decode(codes, rows, found)
    lost = int(np.count_nonzero(~np.isfinite(merged)))
    return sum_up(base, delta, merged, found) + TileSums(overflowed=lost)


def _room(work: CodedWork, buffers: TileBuffers, rows: range) -> NDArray[Any]:
    """Return where the codes of a tile lie: what it was read into."""
    whole = buffers.take("stored", (len(rows), work.weight.matrix[1]), work.stored_form)
    return whole.reshape(-1)[: len(rows) * work.row_bytes].reshape(len(rows), work.row_bytes)
