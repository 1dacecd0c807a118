"""Cut the ranks of an adapter by the singular values of its changes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter, Target
from loraformat.algebra._cutting import cut_target, stays_dense
from loraformat.algebra._lowrank import Cut
from loraformat.algebra._patterns import check_patterns, choose_number
from loraformat.algebra._refusals import check_numbers, refuse_addition
from loraformat.algebra._sums import DIFFERENCE
from loraformat.algebra._targets import is_weight_alone, nature_of, pair_roles
from loraformat.algebra.reduction import Reduction
from loraformat.errors import error_for
from loraformat.kinds import Nature
from loraformat.problems import Problem

FORMS: Final = ("float32", "float16", "bfloat16", "float64")
"""What cut factors may be rounded to."""

Report = Callable[[Reduction], object]


def resize_adapter(
    adapter: Adapter, cut: Cut, ranks: Mapping[str, int] | None = None, report: Report | None = None
) -> Adapter:
    """Return `adapter` with each change in the best form of a lower rank; a target that loses nothing stays as it is.

    Args:
        adapter: what to resize. Values that replace pass; other additive kinds become LoRAs.
        cut: where to cut.
        ranks: glob pattern of target names to the rank that these have at most instead of that of `cut`; the last
            that matches counts.
        report: told of each target whose rank was looked at.

    Raises:
        LoraformatError: LF501 NaN, LF702 a kind that is no sum, LF706 a pattern that matches nothing.
    """
    patterns = dict(ranks or {})
    problems = [*check_patterns(adapter, patterns), *check_numbers(adapter)]
    problems += [refuse_addition(t) for t in adapter.targets if nature_of(t) is Nature.FUNCTION_OF_BASE]
    problems += [Problem("LF705", name, f"rank {low}", "at least 1") for name, low in patterns.items() if low < 1]
    if not problems:
        problems = [found for target in adapter.targets for found in _check_factors(target)]
    if problems:
        raise error_for(problems)
    resized = tuple(_resize(target, _cut_for(target, cut, patterns), report) for target in adapter.targets)
    return replace(adapter, targets=resized, sha256="")


def _check_factors(target: Target) -> list[Problem]:
    if nature_of(target) is not Nature.ADDITIVE or pair_roles(target) is not None or is_weight_alone(target):
        return []
    if target.kind == DIFFERENCE:
        return []
    found = f"the kind {target.kind!r}, which changes something beside a weight, or tells not all of its size"
    return [Problem("LF703", target.name, found, "a change of a weight alone, or a LoRA")]


def _cut_for(target: Target, cut: Cut, patterns: Mapping[str, int]) -> Cut:
    rank = choose_number(patterns, target.name)
    return cut if rank is None else replace(cut, rank=rank)


def _resize(target: Target, cut: Cut, report: Report | None) -> Target:
    if nature_of(target) is not Nature.ADDITIVE or stays_dense([target], cut):
        return target
    kept, reduction = cut_target(target, cut)
    if report is not None:
        report(reduction)
    return kept


def make_cut(rank: int | None, dtype: str, **rules: float | None) -> Cut:
    """Return the cut for a rank and at most one rule, by the names of `RULES`, to factors of a number form.

    Raises:
        RefusedError: LF705 two rules, a number out of its range, a form that factors do not have.
    """
    given = {name: number for name, number in rules.items() if number is not None}
    problems = []
    if len(given) > 1:
        problems.append(Problem("LF705", " and ".join(given), "two rules", "one rule, beside a rank if you like"))
    if dtype not in FORMS:
        problems.append(Problem("LF705", "dtype", repr(dtype), f"one of {', '.join(FORMS)}"))
    if rank is not None and rank < 1:
        problems.append(Problem("LF705", "rank", str(rank), "at least 1"))
    for name, number in given.items():
        low, high = (1.0, math.inf) if name == "sv_ratio" else (0.0, 1.0)
        if not low <= number <= high or not math.isfinite(number):
            problems.append(Problem("LF705", name, f"{number:g}", f"a number from {low:g} to {high:g}"))
    if problems:
        raise error_for(problems)
    rule, threshold = next(iter(given.items()), (None, 0.0))
    return Cut(rank, rule, threshold, dtype)
