"""What a merge did, in numbers: the receipt, and what the numbers say against it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from loraformat.apply.side_receipt import find_receipt
from loraformat.bases import BaseModel
from loraformat.engine.tile_sums import TileSums
from loraformat.errors import error_for, refuse
from loraformat.output_forms import choose_form
from loraformat.plan import Plan
from loraformat.plan.weights import PlannedWeight
from loraformat.problems import Problem, Severity
from loraformat.receipt import AppliedAdapter, MergedWeight, Receipt

_LONGEST_ROOM: Final = 9_999_999_999


def draft_receipt(plan: Plan, base: BaseModel) -> Receipt:
    """Return a receipt with the longest numbers it could have; its `room_bytes` is what it needs in a model."""
    longest = -1.23457e-05
    weights = [_record(weight, longest, longest, longest) for weight in plan.weights if weight.changes]
    draft = _compose_receipt(plan, base, weights, (), _LONGEST_ROOM)
    room = len(choose_form(plan, base).encode_receipt(draft.embedded_text())) + 64 + 8 * len(weights)
    return replace(draft, room_bytes=room)


def _record(weight: PlannedWeight, retained: float, relative: float, error: float) -> MergedWeight:
    return MergedWeight(
        weight.name, weight.targets, weight.scales, retained, relative, error, weight.copied_from, weight.added
    )


def check_untouched(plan: Plan, base: BaseModel) -> None:
    """Refuse to take float numbers from a checkpoint of weights that a merge has changed since (LF618).

    What that merge added would be gone, and too small beside the steps of codes to be seen in them.
    """
    wanted = {weight.name for weight in plan.weights if any(change.references for change in weight.changes)}
    record: object = find_receipt(base)
    while wanted and isinstance(record, Mapping):
        weights = record.get("weights")
        names = [each.get("name") for each in weights if isinstance(each, Mapping)] if isinstance(weights, list) else []
        again = sorted(wanted.intersection(name for name in names if isinstance(name, str)))
        if again:
            raise refuse("LF618", again[0], "a weight that an earlier merge has changed", "the base's own")
        record = record.get("parent")


def _compose_receipt(
    plan: Plan, base: BaseModel, weights: Sequence[MergedWeight], problems: Sequence[Problem], room_bytes: int
) -> Receipt:
    return Receipt(
        output=str(plan.output),
        base=plan.base,
        plan_sha256=plan.sha256,
        adapters=tuple(AppliedAdapter(a.name, a.sha256, a.weight, a.targets) for a in plan.adapters),
        weights=tuple(weights),
        unmatched=plan.unmatched,
        problems=tuple(problems),
        parent=find_receipt(base),
        room_bytes=room_bytes,
        options=plan.options,
    )


def finish_receipt(
    plan: Plan,
    base: BaseModel,
    sums: Sequence[TileSums],
    min_retained: float,
    warn_retained: float,
    room_bytes: int,
) -> Receipt:
    """Return the receipt, or raise what the numbers say against the merge; `room_bytes` is its draft's."""
    pairs = list(zip(plan.weights, sums, strict=True))
    found = [problem for weight, total in pairs for problem in _judge(weight, total, min_retained, warn_retained)]
    errors = [problem for problem in found if problem.severity == "error"]
    if errors:
        raise error_for(errors)
    weights = [
        _record(w, *map(_shorten, (total.retained, total.relative, total.error))) for w, total in pairs if w.changes
    ]
    return _compose_receipt(plan, base, weights, [*plan.problems, *found], room_bytes)


def _judge(weight: PlannedWeight, sums: TileSums, min_retained: float, warn_retained: float) -> list[Problem]:
    """Return what the numbers of one merged weight say."""
    problems = []
    if sums.overflowed > 0:
        found = f"{sums.overflowed} numbers beyond the range of {weight.written_dtype}"
        problems.append(Problem("LF503", weight.name, found, "numbers that it holds"))
    if sums.not_finite:
        found = f"{sums.not_finite} numbers of the base"
        problems.append(Problem("LF502", weight.name, found, "finite numbers", severity="warning"))
    # Replaced values are rounded, not lost: only a change can drown in the weight that it is added to.
    if sums.retained < max(min_retained, warn_retained) and not weight.is_replaced:
        severity: Severity = "error" if sums.retained < min_retained else "warning"
        found = f"{sums.retained:.3f} of the delta survives rounding to {weight.written_dtype}"
        problems.append(
            Problem("LF504", weight.name, found, f"at least {max(min_retained, warn_retained)}", severity=severity)
        )
    return problems


def _shorten(number: float) -> float:
    return float(f"{number:.6g}")
