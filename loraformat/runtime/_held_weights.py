"""Merged weights in memory: computed by the engine of every merge, and taken over where a session has kept them."""

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.bases import BaseModel, Weight
from loraformat.dtypes import BY_NAME
from loraformat.engine import Effort, carry_out
from loraformat.engine.jobs import Assignment, index_targets
from loraformat.engine.sinks import MemorySink
from loraformat.engine.tile_sums import TileSums
from loraformat.images import Copy, FileImage, Fresh
from loraformat.output_forms import Order, index_weights, list_written
from loraformat.plan import Plan, WeightedAdapter
from loraformat.plan.weights import PlannedWeight
from loraformat.runtime._served_graph import Place
from loraformat.strict_json import write_canonical

_Key: TypeAlias = tuple[Any, ...]


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


@dataclass(frozen=True, slots=True)
class MergedWeights:
    """The weights of one plan.

    Attributes:
        weights: in the plan's order.
        computed: those of them that were computed; the others a session had kept.
    """

    weights: Sequence[HeldWeight]
    computed: Sequence[HeldWeight]

    @property
    def buffers(self) -> Mapping[Place, NDArray[np.uint8]]:
        """All new bytes by where they go."""
        return {place: buffer for weight in self.weights for place, buffer in weight.buffers.items()}


class WeightShelf:
    """The merged weights that living sessions of one base have kept."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[_Key, HeldWeight] = WeakValueDictionary()

    def merge(self, order: Order, base: BaseModel, effort: Effort) -> MergedWeights:
        """Return the merged weights of a plan, bit for bit those that a merge writes.

        Args:
            order: the plan, and its adapters.
            base: the opened base.
            effort: how much of the machine to take.

        Raises:
            LoraformatError: as `engine.carry_out`.
        """
        plan, adapters = order.plan, order.adapters
        keys = list(_list_keys(plan, adapters))
        held = [self._held.get(key) if key else None for key in keys]
        missing = [weight for weight, known in zip(plan.weights, held, strict=True) if known is None]
        computed = _compute(replace(order, plan=replace(plan, weights=tuple(missing))), base, effort)
        fresh = iter(computed)
        weights = [known or next(fresh) for known in held]
        self._held.update({key: weight for key, weight in zip(keys, weights, strict=True) if key})
        return MergedWeights(weights, computed)


def _compute(order: Order, base: BaseModel, effort: Effort) -> list[HeldWeight]:
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
    return np.frombuffer(mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def _list_keys(plan: Plan, adapters: Sequence[WeightedAdapter]) -> Iterator[_Key]:
    """Yield, for each weight, what decides its bytes; nothing for one that an adapter without a file changes."""
    targets = index_targets(adapters)
    for weight in plan.weights:
        digests = [adapters[change.adapter].adapter.sha256 for change in weight.changes]
        if not all(digests):
            yield ()
            continue
        own = (targets[change.adapter][change.target] for change in weight.changes)
        changes = tuple(replace(change, adapter=0) for change in weight.changes)
        yield replace(weight, changes=changes, evidence=""), *digests, *map(_describe_target, own)


def _describe_target(target: Target) -> _Key:
    """Return what a target says beside its numbers."""
    factors = tuple(sorted((role, factor.name, factor.shape) for role, factor in target.factors.items()))
    return target.kind, target.slot, factors, write_canonical(dict(target.options))
