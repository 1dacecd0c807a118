"""Merged weights in memory: computed by the engine of every merge."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from loraformat.bases import BaseModel, Weight
from loraformat.dtypes import BY_NAME
from loraformat.engine import Effort, carry_out
from loraformat.engine.jobs import Assignment
from loraformat.engine.sinks import MemorySink
from loraformat.engine.tile_sums import TileSums
from loraformat.images import Copy, FileImage, Fresh
from loraformat.output_forms import Order, index_weights, list_written
from loraformat.plan.weights import PlannedWeight
from loraformat.spans import Span
from loraformat.system import map_memory

Place: TypeAlias = Span | str
"""Where merged bytes go: over a tensor of the base, or into a new one of this name."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class HeldWeight:
    """A merged weight.

    Attributes:
        buffers: its new bytes, and those of its scales where they change, by where they go.
        sums: what its tiles add up to.
    """

    buffers: Mapping[Place, NDArray[np.uint8]]
    sums: TileSums

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return sum(buffer.nbytes for buffer in self.buffers.values())


def compute_weights(order: Order, base: BaseModel, effort: Effort) -> list[HeldWeight]:
    """Return the merged weights of a plan, bit for bit those that a merge writes.

    Raises:
        LoraformatError: as `engine.carry_out`.
    """
    if not order.plan.weights:
        return []
    sources = index_weights(base)
    rooms = [_list_rooms(weight, sources) for weight in order.plan.weights]
    pieces = {place: piece for room in rooms for place, piece in room.items()}
    buffers = {place: _reserve(piece.length) for place, piece in pieces.items()}
    image, sink = FileImage(base.path, list(pieces.values())), MemorySink(buffers.values())
    assignment = Assignment(order.plan, base, order.adapters, [image], [sink], checkpoint=order.checkpoint)
    (sums,) = carry_out([assignment], effort)
    return [
        HeldWeight({place: buffers[place] for place in room}, total) for room, total in zip(rooms, sums, strict=True)
    ]


def _list_rooms(weight: PlannedWeight, sources: Mapping[str, Weight]) -> Mapping[Place, Copy | Fresh]:
    """Return what of an output a weight is: over tensors of the base, or a new one."""
    if weight.new is not None:
        length = BY_NAME[weight.new.dtype].count_bytes(math.prod(weight.new.shape))
        sizes = {weight.new.name: length} | {
            each.copy_name: each.nbytes for each in weight.companions if each.copy_name
        }
        return {name: Fresh(name, size) for name, size in sizes.items()}
    written = list_written(weight, sources[weight.key]).values()
    return {each.span: Copy(each.file, each.span.offset, each.span.length) for each in written}


def _reserve(length: int) -> NDArray[np.uint8]:
    """Return memory that goes back to the system when it is let go; what malloc gives may not, among others' memory."""
    return np.frombuffer(map_memory(length), np.uint8)
