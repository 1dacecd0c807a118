"""What can be wrong with an adapter, whatever the base. Rules return problems; they do not raise."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Adapter, Factor, Target, read_runs
from loraformat.kinds import KINDS, Nature
from loraformat.problems import Problem

_LISTED: Final = 8
"""Targets of which one message each is said; the rest shares one."""


def check_adapter(adapter: Adapter, *, allow_zero: bool = False) -> list[Problem]:
    """Return everything that stands against merging `adapter`, and what is odd about it; reads its factors.

    Args:
        adapter: the adapter.
        allow_zero: accept scales of zero.
    """
    problems = list(adapter.problems)
    for target in adapter.targets:
        problems += _check_target(target, allow_zero=allow_zero)
    for code in ("LF214", "LF216"):
        problems = _gather(problems, code, len(adapter.targets))
    return problems


def check_shapes(adapter: Adapter) -> list[Problem]:
    """Return what the kinds say of their targets' slots, roles, shapes and number forms; reads no factor."""
    known = ((target, KINDS.find(target.kind)) for target in adapter.targets)
    return [problem for target, kind in known if kind is not None for problem in kind.check(target)]


def is_mergeable(kind: str) -> bool:
    """Say whether this version can merge adapters of a kind."""
    known = KINDS.find(kind)
    return known is not None


def refuse_kind(kind: str, where: str, found: str) -> Problem:
    """Return the problem of a kind that this version cannot merge."""
    return Problem("LF209", where, f"the kind {kind!r} ({found})", f"one of {', '.join(KINDS.names())}")


def _check_target(target: Target, *, allow_zero: bool) -> list[Problem]:
    kind = KINDS.find(target.kind)
    if kind is None or not is_mergeable(target.kind):
        return [refuse_kind(target.kind, target.name, f"tensors {', '.join(sorted(target.factors))}")]
    problems = kind.check(target)
    if any(problem.severity == "error" for problem in problems):
        return problems
    if not math.isfinite(target.scale):
        return [*problems, Problem("LF207", target.name, f"scale {target.scale}", "a finite number")]
    if target.scale == 0 and not allow_zero:
        return [*problems, Problem("LF208", target.name, "scale 0", "a scale other than 0, or --allow-zero")]
    if target.scale < 0:
        problems.append(Problem("LF216", target.name, f"scale {target.scale:g}", severity="note"))
    return problems + _check_numbers(target)


def _check_numbers(target: Target) -> list[Problem]:
    """Return problems of the factors' numbers: not finite, or a product that is surely zero."""
    problems = []
    silent = False
    kind = KINDS.find(target.kind)
    is_added = kind is not None and kind.nature is Nature.ADDITIVE
    for role, factor in target.factors.items():
        broken, first, used = _survey(read_runs(factor), factor.shape)
        if broken:
            problems.append(_describe_broken(f"{target.name}: {role}", factor, broken, first))
        is_beside = role.startswith("base_layer.") or role.endswith(".bias")
        silent = silent or (is_added and factor.dtype.family == "float" and not used and not is_beside)
    if silent and not problems:
        problems.append(Problem("LF214", target.name, "a factor of zeros", severity="warning"))
    return problems


def watch_numbers(where: str, factor: Factor, found: list[Problem]) -> Callable[[], NDArray[Any]]:
    """Return a function that reads a tensor, for a writer, and adds to `found` that it has NaN or infinities (LF501).

    Args:
        where: the tensor's name.
        factor: the tensor.
        found: grows when the function is called.
    """

    def read() -> NDArray[Any]:
        values = factor.read()
        broken, first, _ = _survey([values], factor.shape) if factor.dtype.family == "float" else (0, (), True)
        if broken:
            found.append(_describe_broken(where, factor, broken, first))
        return values

    return read


def _describe_broken(where: str, factor: Factor, broken: int, first: tuple[int, ...]) -> Problem:
    return Problem("LF501", where, f"{broken} of {factor.elements} numbers, the first at {first}", "finite numbers")


def _survey(runs: Iterable[NDArray[Any]], shape: tuple[int, ...]) -> tuple[int, tuple[int, ...], bool]:
    """Return how many numbers are not finite as float32, where the first of them is, and whether any is not zero."""
    broken, passed, used = 0, 0, False
    first: tuple[int, ...] = ()
    for values in runs:
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = values.astype(np.float32, copy=False).reshape(-1)
            if 0 < np.dot(narrow, narrow) < math.inf:  # One pass says both of nearly all factors.
                used, passed = True, passed + values.size
                continue
            finite = np.isfinite(narrow)
        if not finite.all():
            places = np.flatnonzero(~finite)
            first = first if broken else tuple(map(int, np.unravel_index(passed + places[0], shape)))
            broken += len(places)
        with np.errstate(invalid="ignore"):
            used = used or bool(values.any())
        passed += values.size
    return broken, first, used


def _gather(problems: Sequence[Problem], code: str, targets: int) -> list[Problem]:
    """Return the problems with all but the first few of one code in one: an untrained adapter is one finding."""
    places = [place for place, problem in enumerate(problems) if problem.code == code]
    rest = frozenset(places[_LISTED:])
    if not rest:
        return list(problems)
    found = f"the same, so that it holds for {len(places)} of {targets} targets"
    summary = Problem(code, f"{len(rest)} more targets", found, severity=problems[places[0]].severity)
    return [*(problem for place, problem in enumerate(problems) if place not in rest), summary]
