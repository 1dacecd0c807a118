"""What stands against an operation: other bases, kinds that do not add, shapes that disagree, numbers that are none."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter, Target
from loraformat.algebra._targets import nature_of, weight_change
from loraformat.kinds import Nature
from loraformat.problems import Problem
from loraformat.rules import check_adapter

_WHY: Final[Mapping[str, str]] = {
    "dora": "a DoRA rescales W + Δ to trained lengths, so that what it adds depends on the base and on other changes",
    "ia3": "IA³ multiplies the weight, and products do not add",
    "oft": "OFT rotates the weight, and rotations do not add",
    "boft": "BOFT rotates the weight, and rotations do not add",
}
_ONE_BY_ONE: Final = (
    "Merge such adapters into the base one after another, in the order that you mean: `loraformat merge base first "
    "-o step`, then `loraformat merge step second`."
)


def check_numbers(adapter: Adapter) -> list[Problem]:
    """Return the errors of an adapter's own shapes, scales and numbers; reads its factors.

    Targets whose kind does not add have problems of their own, and are left out here.
    """
    additive = tuple(target for target in adapter.targets if nature_of(target) is not Nature.FUNCTION_OF_BASE)
    found = check_adapter(replace(adapter, targets=additive), allow_zero=True)
    return [problem for problem in found if problem.severity == "error"]


def refuse_addition(target: Target) -> Problem:
    """Return the problem of a target that is a function of the base where changes are summed, scaled or cut."""
    why = _WHY.get(target.kind, "its effect is a function of the base's weight")
    if any(role.startswith("base_layer.") for role in target.factors):
        why = "it brings values of the base's own beside its change, and they replace what the change is added to"
    return Problem("LF702", target.name, f"the kind {target.kind!r}: {why}", "a change that is added", _ONE_BY_ONE)


def check_same_base(adapters: Sequence[Adapter]) -> list[Problem]:
    """Return problems of adapters that say that they were trained on different bases."""
    problems = []
    for field in ("name", "revision"):
        said = {value: name_of(a) for a in adapters if (value := getattr(a.base, field)) is not None}
        if len(said) > 1:
            found = "; ".join(f"{value} ({name})" for value, name in said.items())
            problems.append(Problem("LF701", f"the bases' {field}", found, "one base"))
            break  # Models of different names have different revisions.
    return problems + _check_fingerprints(adapters)


def _check_fingerprints(adapters: Sequence[Adapter]) -> list[Problem]:
    first: dict[str, tuple[Target, str]] = {}
    differing: dict[str, str] = {}
    for adapter in adapters:
        for target in adapter.targets:
            if target.fingerprint is None:
                continue
            known, owner = first.setdefault(target.name, (target, name_of(adapter)))
            assert known.fingerprint is not None, "only such are kept"
            same = known.fingerprint.shape == target.fingerprint.shape
            if not same or not known.fingerprint.matches(target.fingerprint.samples):
                differing[target.name] = f"{owner} and {name_of(adapter)}"
    if not differing:
        return []
    name, owners = next(iter(differing.items()))
    found = f"fingerprints of {owners} that differ, at {len(differing)} targets"
    return [Problem("LF701", name, found, "one base")]


def check_alike(adapters: Sequence[Adapter]) -> list[Problem]:
    """Return problems of targets of one name that expect different slots, shapes or natures of change."""
    groups: dict[str, list[tuple[str, Target]]] = defaultdict(list)
    for adapter in adapters:
        for target in adapter.targets:
            groups[target.name].append((name_of(adapter), target))
    problems = []
    for name, members in groups.items():
        said = {_describe(target): owner for owner, target in members}
        strange = any(nature_of(target) is Nature.FUNCTION_OF_BASE for _, target in members)
        if len(said) > 1 and not strange:  # Of those there is something better to say.
            found = "; ".join(f"{text} ({owner})" for text, owner in said.items())
            problems.append(Problem("LF704", name, found, "one slot, shape and nature of change"))
    return problems


def _describe(target: Target) -> str:
    nature = nature_of(target)
    if nature is Nature.FUNCTION_OF_BASE:
        return f"the kind {target.kind}"
    if nature is Nature.ADDITIVE:
        change = weight_change(target)
        return f"a change of the {change.parameter} of {target.slot.value} {list(change.shape)}"
    shapes = (f"{role} {list(factor.shape)}" for role, factor in sorted(target.factors.items()))
    options = f" with {dict(target.options)}" if target.options else ""
    return f"values that replace ({target.kind}), {', '.join(shapes)}{options}"


def name_of(adapter: Adapter) -> str:
    """Return what messages call an adapter."""
    return adapter.source or "an adapter in memory"
