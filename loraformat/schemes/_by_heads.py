"""MiniMax-H3's fused q, k and v: by heads in its own shards and DiffSynth-Studio's files, else one below the other.

Names and shapes are the same in both orders. What tells the files apart is the name of PEFT's adapter in their keys,
which no other tool writes beside these names; adapters are held with q, k and v one below the other, as all others have
them. Source: diffusers 0.42, loaders/lora_conversion_utils.py and single_file_utils.py.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter, Factor, Target
from loraformat.derived import derive
from loraformat.problems import Problem
from loraformat.row_orders import GroupHeads
from loraformat.schemes._naming import split_component
from loraformat.spellings import read_names

_SPELLED: Final = ("minimax-h3-transformer", "native")
_HEAD_ROWS: Final = 128
"""Rows of a head in every released model."""
_FUSED: Final = re.compile(r"(?:token_refiner\.)?blocks\.\d+\.attn\.qkv_proj")
_WRITTEN: Final = re.compile(r"\.lora_[AB]\.default\.weight$")
_ROLES: Final = ("lora_B.weight", "lora_B.bias", "lora_magnitude_vector")


def are_by_heads(keys: Iterable[str]) -> bool:
    """Say whether the keys of a file's tensors are those that DiffSynth-Studio writes."""
    return any(map(_WRITTEN.search, keys))


def find_fused(adapter: Adapter) -> frozenset[str]:
    """Return the targets whose rows may stand in either order."""
    fused = frozenset(target.name for target in adapter.targets if _FUSED.fullmatch(_path(target)))
    if not fused:
        return fused
    readings = read_names(map(_path, adapter.targets))
    known = any(not each.missed and (each.table.name, each.spelling) == _SPELLED for each in readings)
    return fused if known else frozenset()


def stack_heads(adapter: Adapter) -> Adapter:
    """Return an adapter whose rows are by heads with q, k and v one below the other; LF315 where heads do not fit."""
    fused = find_fused(adapter)
    found = [target for target in adapter.targets if target.name in fused]
    if not found:
        return adapter
    group = 3 * _HEAD_ROWS
    unfit = [
        Problem("LF315", target.name, f"{factor.shape[0]} rows", f"a multiple of {group}, for q, k and v of every head")
        for target in found
        for factor in _list_rows(target)
        if factor.shape[0] % group
    ]
    said = f"{len(found)} modules such as {found[0].name}, by heads"
    problems = unfit or [Problem("LF328", adapter.source, said, "q, k and v one below the other", severity="note")]
    turned = adapter if unfit else _turn(adapter, fused, lambda operation: operation.undo())
    return replace(turned, problems=(*adapter.problems, *problems))


def interleave_heads(adapter: Adapter) -> Adapter:
    """Return an adapter with q, k and v one below the other with its rows by heads."""
    return _turn(adapter, find_fused(adapter), lambda operation: operation)


def _turn(adapter: Adapter, fused: frozenset[str], choose: Callable[[GroupHeads], GroupHeads]) -> Adapter:
    targets = tuple(_turn_target(target, choose) if target.name in fused else target for target in adapter.targets)
    return replace(adapter, targets=targets)


def _turn_target(target: Target, choose: Callable[[GroupHeads], GroupHeads]) -> Target:
    factors = dict(target.factors)
    for role in _ROLES:
        if role in factors:
            heads = factors[role].shape[0] // (3 * _HEAD_ROWS)
            factors[role] = derive(choose(GroupHeads(heads, heads, _HEAD_ROWS)), factors[role])
    return replace(target, factors=factors)


def _list_rows(target: Target) -> list[Factor]:
    return [target.factors[role] for role in _ROLES if role in target.factors]


def _path(target: Target) -> str:
    return split_component(target.name)[1]
