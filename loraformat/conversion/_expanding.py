"""LoRA of slices of a fused weight as plain LoRA of the whole: B with rows of zeros, one rank for each slice.

Only numbers are moved, so that the change is the same to the last bit, also where the slices are interleaved by groups
of heads as BLOOM and Falcon have their `query_key_value`.
"""

from collections.abc import Mapping, Set
from dataclasses import replace
from itertools import accumulate
from typing import Any, Final

from loraformat.adapter import Adapter, Factor, Scaling, ScalingRule, Target
from loraformat.derived import derive
from loraformat.operations import Concatenate, Take
from loraformat.schemes._grouped import FUSED, Groups, place_rows

_KIND: Final = "merged_linear"
_PLAIN: Final = "lora"
_DOWN: Final = "lora_A.weight"
_UP: Final = "lora_B.weight"


def expand_slices(adapter: Adapter, kinds: Set[str]) -> Adapter:
    """Return the adapter with its `merged_linear` targets as `lora`, where that is among the kinds and they are not."""
    sliced = [target for target in adapter.targets if target.kind == _KIND]
    if not sliced or _KIND in kinds or _PLAIN not in kinds:
        return adapter
    targets = tuple(_expand(target) if target.kind == _KIND else target for target in adapter.targets)
    known = adapter.provenance.get(FUSED)
    parts = {target.name: _name_parts(target) for target in sliced if target.options.get("groups", 1) == 1}
    fused = {**(known if isinstance(known, Mapping) else {}), **parts}
    return replace(adapter, targets=targets, provenance={**adapter.provenance, FUSED: fused})


def _read_slices(target: Target) -> tuple[Groups, int]:
    """Return the slices, and in how many groups they are interleaved; their shapes have been checked."""
    options: Mapping[str, Any] = target.options
    enabled, sizes = options["enable_lora"], options.get("sizes")
    present = tuple(index for index, flag in enumerate(enabled) if flag)
    rows = target.factors[_UP].shape[0]
    return Groups(tuple(sizes or [rows // len(present)] * len(enabled)), present), int(options.get("groups", 1))


def _name_parts(target: Target) -> dict[str, int]:
    rank = target.factors[_UP].shape[1]
    return {str(part): rank for part in _read_slices(target)[0].present}


def _expand(target: Target) -> Target:
    slices, groups = _read_slices(target)
    up = place_rows(target.factors[_UP], slices)
    factors = {**target.factors, _UP: up if groups == 1 else _interleave(up, slices.sizes, groups)}
    count, rank = len(slices.present), target.factors[_UP].shape[1]
    scaling = Scaling(ScalingRule.MULTIPLIER, target.scale)
    if target.scaling.rule is ScalingRule.ALPHA_OVER_RANK and target.rank == rank:
        scaling = replace(target.scaling, value=target.scaling.value * count)
    options = {name: value for name, value in target.options.items() if name not in ("enable_lora", "sizes", "groups")}
    return replace(
        target, kind=_PLAIN, factors=factors, rank=rank * count, scaling=scaling, options=options, fingerprint=None
    )


def _interleave(up: Factor, sizes: tuple[int, ...], groups: int) -> Factor:
    """Return rows that lie slice below slice as q q k v, q q k v ...: for every group its share of each slice."""
    starts = [0, *accumulate(sizes)]
    pieces = [
        derive(Take(start + group * (size // groups), start + (group + 1) * (size // groups)), up)
        for group in range(groups)
        for start, size in zip(starts, sizes, strict=False)
    ]
    return derive(Concatenate(), *pieces)
