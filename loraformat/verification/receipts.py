"""Whether a receipt says what its plan, made again and carried out, gives."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

from loraformat.engine.tile_sums import TileSums
from loraformat.plan import Plan
from loraformat.problems import Problem
from loraformat.receipt import Statement

_LISTED: Final = 8
_TOLERANCE: Final = 1e-4
"""Receipts have six digits, and other processors sum in another order."""


def check_receipt(statement: Statement | None, plan: Plan, sums: Sequence[TileSums]) -> Iterator[Problem]:
    """Yield what of a receipt is not as its plan, made again and carried out, has it.

    Args:
        statement: what it says; None for a model without one.
        plan: the plan.
        sums: those of the plan's weights; nothing where they could not be computed.
    """
    where = f"{plan.output}: receipt"
    if statement is None:
        yield Problem("LF803", where, "no receipt", "the receipt of a merge")
        return
    stated = [(sha256, weight) for _, sha256, weight in statement.adapters]
    found = [(adapter.sha256, adapter.weight) for adapter in plan.adapters]
    if stated != found:
        yield Problem("LF803", f"{where}: adapters", _list_adapters(found), _list_adapters(stated))
    if statement.base["structure_sha256"] != plan.base["structure_sha256"]:
        yield Problem("LF803", f"{where}: base", "a base of another structure", "the base that the receipt names")
        return
    names = [adapter.name for adapter in plan.adapters]
    same_names = statement.base == plan.base and names == [name for name, *_ in statement.adapters]
    if stated == found:
        if same_names and statement.plan_sha256 != plan.sha256:
            yield Problem("LF803", f"{where}: plan_sha256", statement.plan_sha256, plan.sha256)
        yield from _check_weights(statement, plan, sums, where)


def _check_weights(statement: Statement, plan: Plan, sums: Sequence[TileSums], where: str) -> Iterator[Problem]:
    """Yield where the receipt's numbers of merged weights are not those of the merge made again."""
    changed = {weight.name: weight for weight in plan.weights if weight.changes}
    if statement.weights.keys() != changed.keys():
        differing = sorted(statement.weights.keys() ^ changed.keys())
        yield Problem("LF803", f"{where}: weights", ", ".join(differing[:_LISTED]), "the merged weights")
        return
    totals = {weight.name: total for weight, total in zip(plan.weights, sums, strict=bool(sums))}
    for name, weight in changed.items():
        record = statement.weights[name]
        expected: dict[str, Any] = {"targets": list(weight.targets), "scales": list(weight.scales)}
        expected |= {"copied_from": weight.copied_from or None, "added": weight.added or None}
        if name in totals:
            total = totals[name]
            expected |= {"retained": total.retained, "relative": total.relative, "error": total.error}
        for field, value in expected.items():
            if not _agrees(record.get(field), value):
                found = f"{record.get(field)!r:.80}"
                yield Problem("LF803", f"{where}: weights: {name}: {field}", found, f"{value!r:.80}")


def _agrees(stated: object, computed: object) -> bool:
    """Say whether a number of a receipt, which is rounded, is the computed one; infinite ones stand as null."""
    if not isinstance(computed, float):
        return stated == computed
    if not math.isfinite(computed):
        return stated is None
    is_number = isinstance(stated, int | float) and not isinstance(stated, bool)
    return is_number and math.isclose(cast(float, stated), computed, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE**2)


def _list_adapters(adapters: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{sha256[:12]}... with weight {weight}" for sha256, weight in adapters) or "none"
