"""Merged weights that sessions have in memory, and take over from one another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.bases import BaseModel
from loraformat.engine import Effort
from loraformat.engine.held_weights import HeldWeight, Place, compute_weights
from loraformat.engine.jobs import index_targets
from loraformat.output_forms import Order
from loraformat.plan import Plan, WeightedAdapter
from loraformat.strict_json import write_canonical

_Key: TypeAlias = tuple[Any, ...]


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
        computed = compute_weights(replace(order, plan=replace(plan, weights=tuple(missing))), base, effort)
        fresh = iter(computed)
        weights = [known or next(fresh) for known in held]
        self._held.update({key: weight for key, weight in zip(keys, weights, strict=True) if key})
        return MergedWeights(weights, computed)


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
