"""Experts whose factors lie in one tensor: A `(experts, rank, in)`, B `(experts, out, rank)`, as mlx-lm and GGUF have.

Each expert is a target of its own, so that a scheme with one module for each holds it as well.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter, Factor, SlotKind, Target
from loraformat.derived import KeptFactor, LastRead, derive
from loraformat.limits import MAX_EXPERTS
from loraformat.operations import Concatenate, Reshape, Take
from loraformat.problems import Problem

EXPERTS_A: Final = "experts_A"
EXPERTS_B: Final = "experts_B"
"""The roles of the two tensors, between a scheme's table and its targets."""
_PAIR: Final = {EXPERTS_A: "lora_A.weight", EXPERTS_B: "lora_B.weight"}
Namer = Callable[[str], tuple[str, int] | None]
"""From a target's name to the stack that it belongs to and its number there; None for what is no expert."""


def is_stack(factor: Factor) -> bool:
    """Say whether a tensor holds the factors of several experts."""
    return len(factor.shape) == 3


def take_expert(factor: Factor, expert: int, last: LastRead) -> Factor:
    """Return one expert's matrix; a stack of one is for all."""
    if factor.shape[0] == 1:
        return derive(Reshape(factor.shape[1:]), factor)
    return derive(Reshape(factor.shape[1:]), derive(Take(expert, expert + 1), KeptFactor(factor, last)))


def part_stacks(adapter: Adapter, name: Callable[[str, int], str]) -> Adapter:
    """Return the adapter with a target for every expert, called by `name` from the stack's name and its number."""
    targets: list[Target] = []
    problems: list[Problem] = []
    last = LastRead()
    for target in adapter.targets:
        if not {EXPERTS_A, EXPERTS_B} & set(target.factors):
            targets.append(target)
            continue
        problem = _check_stack(target)
        if problem is not None:
            problems.append(problem)
            continue
        for expert in range(target.factors[EXPERTS_A].shape[0]):
            factors = {plain: take_expert(target.factors[role], expert, last) for role, plain in _PAIR.items()}
            own = name(target.name, expert)
            targets.append(replace(target, name=own, slot=SlotKind.LINEAR, factors=factors))
    ordered = tuple(sorted(targets, key=lambda target: target.name))
    return replace(adapter, targets=ordered, problems=(*adapter.problems, *problems))


def _check_stack(target: Target) -> Problem | None:
    expected = "A (experts, rank, in) and B (experts, out, rank)"
    shapes = {role: factor.shape for role, factor in target.factors.items()}
    if set(shapes) != set(_PAIR):
        return Problem("LF201", target.name, f"{', '.join(sorted(shapes))} of experts", expected)
    (count, rank, _), (other, _, columns) = shapes[EXPERTS_A], shapes[EXPERTS_B]
    if count != other or rank != columns or not 0 < count <= MAX_EXPERTS:
        found = f"A {shapes[EXPERTS_A]} and B {shapes[EXPERTS_B]}"
        return Problem("LF203", target.name, found, f"{expected}, at most {MAX_EXPERTS} experts")
    return None


def join_stacks(targets: Sequence[Target], find: Namer) -> tuple[list[Target], list[Problem]]:
    """Return the targets with those of experts put together, and the stacks that cannot be made."""
    stacks: dict[str, dict[int, Target]] = defaultdict(dict)
    others: list[Target] = []
    for target in targets:
        place = find(target.name)
        if place is None or target.kind not in ("lora", "dora"):
            others.append(target)
        else:
            stacks[place[0]][place[1]] = target
    problems: list[Problem] = []
    for name, experts in stacks.items():
        problem = check_experts(name, experts)
        if problem is not None:
            problems.append(problem)
        else:
            others.append(_join(name, [experts[number] for number in sorted(experts)]))
    return sorted(others, key=lambda target: target.name), problems


def check_experts(name: str, experts: Mapping[int, Target]) -> Problem | None:
    """Return what keeps experts, by their numbers, from lying in one tensor."""
    first = experts[min(experts)]
    if first.kind != "lora" or set(first.factors) != set(_PAIR.values()):
        found = f"an expert with {', '.join(sorted(first.factors))}"
        return Problem("LF312", name, found, "A and B alone, in a tensor of all experts")
    if sorted(experts) != list(range(len(experts))):
        missing = next(number for number in range(max(experts)) if number not in experts)
        return Problem("LF134", name, f"{len(experts)} experts, without number {missing}", "all experts of the module")
    forms = {_describe(target) for target in experts.values()}
    if len(forms) > 1:
        return Problem("LF134", name, " and ".join(sorted(map(str, forms))[:2]), "experts of one form and one rank")
    return None


def _describe(target: Target) -> str:
    factors = ", ".join(f"{role} {each.dtype.name} {each.shape}" for role, each in sorted(target.factors.items()))
    return f"{target.kind} of scale {target.scale:g}: {factors}"


def _join(name: str, experts: Sequence[Target]) -> Target:
    """Return the target of a stack."""
    factors: dict[str, Factor] = {
        role: derive(Concatenate(), *(_as_sheet(target.factors[plain]) for target in experts))
        for role, plain in _PAIR.items()
    }
    return replace(experts[0], name=name, factors=factors, fingerprint=None)


def _as_sheet(factor: Factor) -> Factor:
    return derive(Reshape((1, *factor.shape)), factor)
