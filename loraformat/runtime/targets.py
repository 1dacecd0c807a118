"""Which node of a model each target of an adapter acts on, and whether its change can be added while the model runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.bases import BaseModel, Site
from loraformat.errors import error_for
from loraformat.evidence import Hints
from loraformat.kinds import KINDS, AdditiveKind, Change, Nature
from loraformat.kinds._matrices import LowRankDelta
from loraformat.matching import Match
from loraformat.plan import WeightedAdapter
from loraformat.problems import Problem
from loraformat.resolve import gather_clues, resolve
from loraformat.rules import check_adapter

_ELSEWHERE: Final = (
    "Merge it, or open a session with it (loraformat.runtime.session). To leave the target out, which changes what the "
    "adapter does: --allow-unmatched PATTERN."
)


class ServeOptions(TypedDict, total=False):
    """How targets find their nodes.

    Attributes:
        allow_unmatched: glob patterns of targets that may be left out, when the model lacks them or cannot serve them.
        strip_prefix: removed from the front of the targets' names.
        ignore_fingerprints: accept weights that do not match the fingerprint of their target.
    """

    allow_unmatched: Sequence[str]
    strip_prefix: str | None
    ignore_fingerprints: bool


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """One change of one target, and the node whose product it is added to.

    Attributes:
        target: the target.
        change: what its kind does to the weight, `(out, in, *kernel)`.
        rank: columns of the thin matrices.
        sites: where the node, or each of several, applies the weight.
        section: rows of the change that are added here, first and last, the latter excluded; None for all.
        rows: where in the node's product they are added, first and last.
        out: columns of the node's product.
        gains: what the stored weight is a multiple of the module's by, `(1,)` or one for each row.
        weight: how strongly the user wants the adapter.
    """

    target: Target
    change: Change
    rank: int
    sites: tuple[Site, ...]
    section: tuple[int, int] | None
    rows: tuple[int, int]
    out: int
    gains: tuple[float, ...]
    weight: float

    @property
    def is_whole(self) -> bool:
        """Whether the node is the target's module and nothing else."""
        return self.section is None and self.rows == (0, self.out)

    def read_product(self) -> LowRankDelta:
        """Return the change as a product of two factors in float32, scales and gains folded into the left one."""
        product = _read_delta(self.target, self.change, self.target.scale * self.weight)
        assert isinstance(product, LowRankDelta), "checked when it was matched"
        left = product.left[slice(*self.section)] if self.section else product.left
        return LowRankDelta((left * np.array(self.gains)[:, None]).astype(left.dtype), product.right)


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """What becomes of an adapter's targets.

    Attributes:
        name: the adapter's name.
        served: its changes.
        left_out: names of targets that were left out, as allowed.
        problems: what is to be said; none of them an error.
    """

    name: str
    served: tuple[Served, ...]
    left_out: tuple[str, ...]
    problems: tuple[Problem, ...]


def serve(
    base: BaseModel,
    sites: Sequence[Site],
    item: WeightedAdapter,
    hints: Hints,
    options: ServeOptions,
    judge: Callable[[Served], Problem | None],
) -> ServedAdapter:
    """Find the nodes that the targets of one adapter act on.

    Args:
        base: the model.
        sites: those of its `BranchableGraph`.
        item: the adapter.
        hints: what there is to find targets by, besides names.
        options: how.
        judge: says what else stands against a change.

    Raises:
        LoraformatError: with every target that cannot be served, by name.
    """
    problems = check_adapter(item.adapter)
    _raise_errors(problems)
    allowed = options.get("allow_unmatched", ())
    prefix = options.get("strip_prefix")
    clues = gather_clues(item.adapter, base, hints, strip_prefix=prefix)
    careless = options.get("ignore_fingerprints", False)
    found = resolve(
        item.adapter, sites, clues=clues, allow_unmatched=allowed, strip_prefix=prefix, ignore_fingerprints=careless
    )
    problems += found.problems
    divisors = {site.id: site.divisor for site in sites}
    served: list[Served] = []
    left_out = list(found.unmatched)
    for match in found.matches:
        outcome = _serve(match, divisors, item.weight)
        outcome = judge(outcome) or outcome if isinstance(outcome, Served) else outcome
        if isinstance(outcome, Served):
            served.append(outcome)
        elif any(fnmatchcase(match.target.name, glob) for glob in allowed):
            left_out.append(match.want.name)
        else:
            problems.append(outcome)
    if not served and not any(problem.severity == "error" for problem in problems):
        problems.append(Problem("LF401", item.name, "none of its targets, all left out on request", "at least one"))
    _raise_errors(problems)
    return ServedAdapter(item.name, tuple(served), tuple(left_out), tuple(problems))


def _raise_errors(problems: Sequence[Problem]) -> None:
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise error_for(errors)


def _find_rank(match: Match) -> int | Problem:
    """Return the rank of a change, or why it is no product of two thin matrices (LF821)."""
    target, change = match.target, match.change
    found = ""
    if change.nature is not Nature.ADDITIVE:
        found = "saved values" if change.nature is Nature.REPLACEMENT else f"a {change.nature}"
    elif change.parameter != "weight":
        found = f"a change of the {change.parameter}"
    else:
        product = None if change.streams else _read_delta(target, change, 1.0)
        if isinstance(product, LowRankDelta):
            return int(product.right.shape[0])
        found = "a change that is no product of two thin matrices"
    return Problem("LF821", match.want.name, f"{found} ({target.kind})", "W + B·A", _ELSEWHERE)


def _check_slot(match: Match) -> Problem | None:
    """Return a problem where a parameter is not read as a Linear's weight is."""
    turned = {site.transposed.get(SlotKind.LINEAR) for site in match.sites}
    if match.want.change.slot is not SlotKind.PARAMETER or turned == {match.transposed}:
        return None
    return Problem("LF820", match.want.name, "a parameter that is no matrix of a Linear", "a module", _ELSEWHERE)


def _read_delta(target: Target, change: Change, scale: float) -> object:
    factors = {role: _read_factor(target, role) for role in change.roles}
    return cast(AdditiveKind, KINDS.find(target.kind)).delta(target, change, factors, scale)


def _read_factor(target: Target, role: str) -> NDArray[Any]:
    factor = target.factors[role]
    values = factor.read()
    return values.astype(np.float32, copy=False) if factor.dtype.family == "float" else values


def _serve(match: Match, divisors: Mapping[str, float], weight: float) -> Served | Problem:
    rank = _find_rank(match)
    if isinstance(rank, Problem):
        return rank
    if match.row_order:
        return Problem("LF821", match.want.name, "a weight whose rows were moved", "W + B·A", _ELSEWHERE)
    misfit = _check_slot(match)
    if misfit is not None:
        return misfit
    change, part = match.change, match.part
    rows = match.section[1] - match.section[0] if match.section else change.shape[0]
    place, out = (0, rows), rows
    if part is not None:
        start, stop, _ = part.columns if match.transposed else part.rows
        place, out = (start, stop), part.matrix[1 if match.transposed else 0]
    gain = divisors[match.sites[0].id] / match.divisor
    gains = match.row_factors or (1.0,)
    return Served(
        match.target,
        change,
        rank,
        match.sites,
        match.section,
        place,
        out,
        tuple(gain * each for each in gains),
        weight,
    )
