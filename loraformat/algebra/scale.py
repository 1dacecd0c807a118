"""Strengthen or weaken an adapter without touching its factors."""

import math
from collections.abc import Mapping
from dataclasses import replace

from loraformat.adapter import Adapter
from loraformat.algebra._patterns import check_patterns, choose_number
from loraformat.algebra._refusals import refuse_addition
from loraformat.algebra._targets import nature_of, rescale
from loraformat.errors import error_for
from loraformat.kinds import Nature
from loraformat.problems import Problem


def scale_adapter(adapter: Adapter, factor: float = 1.0, targets: Mapping[str, float] | None = None) -> Adapter:
    """Return `adapter` with its alphas and multipliers times `factor`; no tensor is read or changed.

    Args:
        adapter: what to scale. The λ of values that replace is scaled too.
        factor: for every target.
        targets: glob pattern of target names to the factor that these have instead; the last that matches counts.

    Raises:
        LoraformatError: LF207 a number that is not finite, LF702 a kind whose effect is not a multiple of its scale,
            LF706 a pattern that matches nothing.
    """
    patterns = dict(targets or {})
    problems = check_patterns(adapter, patterns)
    scaled = []
    for target in adapter.targets:
        chosen = choose_number(patterns, target.name)
        number = factor if chosen is None else chosen
        if number == 1:
            scaled.append(target)
        elif nature_of(target) is Nature.FUNCTION_OF_BASE:
            problems.append(refuse_addition(target))
        elif not math.isfinite(target.scaling.value * number):
            found = f"{target.scaling.value:g} times {number:g}"
            problems.append(Problem("LF207", target.name, found, "a finite number", "Give a finite factor."))
        else:
            scaled.append(rescale(target, number))
    if problems:
        raise error_for(problems)
    return replace(adapter, targets=tuple(scaled), sha256="" if scaled != list(adapter.targets) else adapter.sha256)
