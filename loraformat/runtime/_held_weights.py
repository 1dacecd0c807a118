"""Merged weights in memory: computed by the engine of every merge, and taken over where a session has kept them."""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.bases import BaseModel
from loraformat.engine import Assignment, Effort, carry_out, index_targets
from loraformat.images import Copy, FileImage
from loraformat.output_forms import Order, index_weights, list_written
from loraformat.plan import Plan, WeightedAdapter
from loraformat.sinks import MemorySink
from loraformat.spans import Span
from loraformat.strict_json import write_canonical
from loraformat.tiles import TileSums

_Key: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class HeldWeight:
    """A merged weight.

    Attributes:
        buffers: its new bytes, and those of its scales where they change, by the spans of the base that they replace.
        sums: what its tiles add up to.
    """

    buffers: Mapping[Span, NDArray[np.uint8]]
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
    def buffers(self) -> Mapping[Span, NDArray[np.uint8]]:
        """All new bytes by the spans of the base that they replace."""
        return {span: buffer for weight in self.weights for span, buffer in weight.buffers.items()}


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
        computed = _compute(replace(plan, weights=tuple(missing)), base, adapters, effort)
        fresh = iter(computed)
        weights = [known or next(fresh) for known in held]
        self._held.update({key: weight for key, weight in zip(keys, weights, strict=True) if key})
        return MergedWeights(weights, computed)


def _compute(plan: Plan, base: BaseModel, adapters: Sequence[WeightedAdapter], effort: Effort) -> list[HeldWeight]:
    if not plan.weights:
        return []
    sources = index_weights(base)
    written = [list(list_written(weight, sources[weight.key]).values()) for weight in plan.weights]
    spans = {tensor.span: tensor for tensors in written for tensor in tensors}
    buffers = {span: _reserve(span.length) for span in spans}
    pieces = [Copy(tensor.file, span.offset, span.length) for span, tensor in spans.items()]
    image = FileImage(base.path, pieces)
    (sums,) = carry_out([Assignment(plan, base, adapters, [image], [MemorySink(buffers.values())])], effort)
    return [
        HeldWeight({tensor.span: buffers[tensor.span] for tensor in tensors}, total)
        for tensors, total in zip(written, sums, strict=True)
    ]


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
