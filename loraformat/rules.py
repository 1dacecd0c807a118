"""What can be wrong with an adapter, whatever the base. Rules return problems; they do not raise."""

import math

import numpy as np

from loraformat.adapter import Adapter, Target
from loraformat.kinds import KINDS, Nature
from loraformat.problems import Problem


def check_adapter(adapter: Adapter, *, allow_zero: bool = False) -> list[Problem]:
    """Return everything that stands against merging `adapter`, and what is odd about it; reads its factors.

    Args:
        adapter: the adapter.
        allow_zero: accept scales of zero.
    """
    problems = list(adapter.problems)
    for target in adapter.targets:
        problems += _check_target(target, allow_zero=allow_zero)
    return problems


def _check_target(target: Target, *, allow_zero: bool) -> list[Problem]:
    kind = KINDS.find(target.kind)
    if kind is None or kind.nature is not Nature.ADDITIVE:
        known = ", ".join(KINDS.names())
        roles = ", ".join(sorted(target.factors))
        return [Problem("LF209", target.name, f"the kind {target.kind!r} (tensors {roles})", f"one of {known}")]
    problems = kind.check(target)
    if any(problem.severity == "error" for problem in problems):
        return problems
    if not math.isfinite(target.scale):
        return [*problems, Problem("LF207", target.name, f"scale {target.scale}", "a finite number")]
    if target.scale == 0 and not allow_zero:
        return [*problems, Problem("LF208", target.name, "scale 0", "a scale other than 0, or --allow-zero")]
    return problems + _check_numbers(target)


def _check_numbers(target: Target) -> list[Problem]:
    """Return problems of the factors' numbers: not finite, or a product that is surely zero."""
    problems = []
    silent = False
    for role, factor in target.factors.items():
        with np.errstate(over="ignore"):
            values = factor.read().astype(np.float32)
        finite = np.isfinite(values)
        if not finite.all():
            bad = np.argwhere(~finite)
            found = f"{len(bad)} of {values.size} numbers, the first at {tuple(int(i) for i in bad[0])}"
            problems.append(Problem("LF501", f"{target.name}: {role}", found, "finite numbers"))
        silent = silent or not values.any()
    if silent and not problems:
        problems.append(Problem("LF214", target.name, "a factor of zeros", severity="warning"))
    return problems
