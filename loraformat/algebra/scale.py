"""Strengthen or weaken an adapter without touching its factors."""

import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from loraformat.adapter import Adapter
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
    names = [target.name for target in adapter.targets]
    problems = [
        Problem("LF706", pattern, "no target that it matches", f"one of {', '.join(names[:3])} ...")
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    scaled = []
    for target in adapter.targets:
        matching = [number for pattern, number in patterns.items() if fnmatchcase(target.name, pattern)]
        number = matching[-1] if matching else factor
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
