"""Layers of a base as adapters count them: PEFT's `layer_replication` repeats some, and numbers all anew."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter
from loraformat.bases import BaseModel, LayeredBase
from loraformat.errors import error_for, refuse
from loraformat.plan import WeightedAdapter
from loraformat.plan.weights import NewForm, PlannedWeight

_REPEATED: Final = "LF245"
"""Stands against an adapter wherever layers are not repeated for it."""


def arrange_layers(base: BaseModel, weighted: Sequence[WeightedAdapter]) -> tuple[BaseModel, Sequence[WeightedAdapter]]:
    """Return a base with its layers where adapters have them, and the adapters without that wish.

    A base that was saved with its layers repeated stays as it is.

    Raises:
        LoraformatError: LF245 they cannot stand so; LF246 it cannot be told whether they do already.
    """
    wishes = {item.adapter.base.layers for item in weighted}
    if not any(wishes):
        return base, weighted
    if len(wishes) > 1:
        found = f"adapters of {len(wishes)} orders of the base's layers"
        raise refuse(_REPEATED, base.path, found, "one order")
    sources = [source for start, stop in wishes.pop() for source in range(start, stop)]
    settled = [replace(item, adapter=_settle(item.adapter)) for item in weighted]
    if not isinstance(base, LayeredBase):
        expected = "a checkpoint in safetensors, or a model folder"
        raise refuse(_REPEATED, base.path, f"a base of the format {base.format!r}", expected)
    layers = base.count_layers()
    if not isinstance(layers, int):
        raise error_for([layers])
    if max(sources) >= layers:
        expected = f"at least {max(sources) + 1}, which the adapter repeats"
        raise refuse(_REPEATED, base.path, f"{layers} layers", expected)
    if sources == list(range(layers)):
        return base, settled
    if len(sources) == layers:
        if base.is_repeated(sources):
            return base, settled
        found = f"{layers} layers, as many as the adapter makes of others, and none of them equal"
        raise refuse("LF246", base.path, found, "another number of layers, or layers that are repeated already")
    return base.with_layers(sources), settled


def _settle(adapter: Adapter) -> Adapter:
    """Return an adapter whose layers are those of its base."""
    problems = tuple(each for each in adapter.problems if each.code != _REPEATED)
    return replace(adapter, base=replace(adapter.base, layers=()), problems=problems)


def place_anew(weights: Sequence[PlannedWeight]) -> tuple[PlannedWeight, ...]:
    """Return the weights each with a place of its own in the output: the base may have one for several."""
    return tuple(
        replace(each, new=each.new or NewForm(each.name, each.dtype, each.shape, each.encoding)) for each in weights
    )
