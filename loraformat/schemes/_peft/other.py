"""Folders of PEFT's types other than LORA: with the configuration they came with, or a new one where the type allows.

PEFT makes factors of the shapes that its configuration says, and loads no others. So whatever is written is read once
more, without its numbers, and must say what the adapter says.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from loraformat.adapter import Adapter, ScalingRule, Target
from loraformat.errors import LoraformatError
from loraformat.problems import Problem
from loraformat.schemes._lora_config import exact_pattern
from loraformat.schemes._peft.config import PeftConfig
from loraformat.schemes._peft.groups import REPLACE
from loraformat.schemes._peft.kronecker import stated_rank
from loraformat.schemes._peft.order import take_once
from loraformat.schemes._peft.type import PeftType
from loraformat.schemes._peft.writing import Folder, begin_config, find_raw, is_covered, place
from loraformat.strict_json import JsonValue

BASE_BIAS: Final = "base_layer.bias"
_SAME: Final = 1e-12
_LORA_KINDS: Final = frozenset({"lora", "dora", "tokens"})
Targets = Mapping[str, Target]
Config = dict[str, JsonValue]


def find_type(adapter: Adapter, types: Mapping[str, PeftType]) -> str | None:
    """Return the `peft_type` that an adapter came with, or that its kinds are of; None where it is LORA's."""
    kinds = {target.kind for target in adapter.targets} - {REPLACE}
    stated = find_raw(adapter).get("peft_type")
    if isinstance(stated, str) and stated in types and not kinds & _LORA_KINDS:
        return stated
    return next((name for name, row in types.items() if row.complete and kinds == {row.kind}), None)


def fill_other(adapter: Adapter, targets: Targets, name: str, row: PeftType) -> Folder:
    """Return the folder of `peft_type` `name` for targets by the path of their module."""
    where = adapter.source or "the adapter"
    raw = find_raw(adapter)
    own = ("weight", "bias", BASE_BIAS) if raw.get("bias", "none") != "none" else ("weight", "bias")
    tensors, problems = place(targets, {role: role for role in own} | {role: end for end, role in row.roles.items()})
    stow = row.stow or take_once(row.shared)
    shared, torn = stow(tensors, PeftConfig(raw, "adapter_config.json", True))
    problems += torn
    if raw and not _find_against(row, raw, targets):
        return Folder(tensors, dict(raw), problems, shared)
    if row.complete is None:
        found = f"targets that are not those of its configuration, of peft_type {name!r}"
        return Folder(tensors, {}, [*problems, Problem("LF312", where, found, "the configuration of the training run")])
    config = begin_config(adapter) | _describe(targets, name)
    factored = {each: target for each, target in targets.items() if target.kind != REPLACE}
    against = row.complete(factored, config) or _find_against(row, config, targets)
    return Folder(tensors, config, [*problems, *against])


def _find_against(row: PeftType, fields: Mapping[str, Any], targets: Targets) -> list[Problem]:
    """Return the targets that a reader of this configuration would take for something else."""
    config = PeftConfig(fields, "adapter_config.json", True)
    factored = {name: target for name, target in targets.items() if target.kind != REPLACE}
    try:
        again = {
            name: row.read_target(name, target.factors, config, len(factored)) for name, target in factored.items()
        }
        return [problem for name, target in factored.items() for problem in _compare(name, target, again[name], config)]
    except LoraformatError as error:
        return list(error.problems)


def _compare(name: str, target: Target, again: Target | Problem, config: PeftConfig) -> Iterator[Problem]:
    if isinstance(again, Problem):
        yield again
        return
    both = [(each.kind, each.slot, each.rank, dict(each.options)) for each in (target, again)]
    if both[0] != both[1] or not math.isclose(again.scale, target.scale, rel_tol=_SAME):
        found, expected = (f"{each.kind}, rank {each.rank}, scale {each.scale:g}" for each in (target, again))
        options = [f", {dict(each.options)}" if each.options else "" for each in (target, again)]
        yield Problem("LF312", target.name, found + options[0], f"{expected}{options[1]}, as PEFT reads it")
    elif not is_covered(config, name):
        yield Problem("LF312", target.name, "a name that target_modules does not say", "one of its own")


def _describe(targets: Targets, name: str) -> Config:
    """Return the fields that types with rank and alpha have in common."""
    factored = {each: target for each, target in targets.items() if target.kind != REPLACE}
    ranks = {each: stated_rank(target) for each, target in factored.items()}
    alphas = {each: _alpha(target, ranks[each]) for each, target in factored.items()}
    rank, alpha = _usual(ranks.values()), _usual(alphas.values())
    saved: list[JsonValue] = [*sorted(set(targets) - set(factored))]
    return {
        "peft_type": name,
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {exact_pattern(each): own for each, own in ranks.items() if own != rank},
        "alpha_pattern": {exact_pattern(each): own for each, own in alphas.items() if own != alpha},
        "target_modules": sorted(factored),
        "modules_to_save": saved or None,
    }


def _usual(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _alpha(target: Target, rank: int) -> int | float:
    is_alpha = target.rank and target.scaling.rule is ScalingRule.ALPHA_OVER_RANK
    value = target.scaling.value if is_alpha else target.scale * rank
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else value
