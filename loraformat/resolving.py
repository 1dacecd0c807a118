"""Which weight each target of an adapter is, and how that is known: a table for people, and a map for `--map`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from loraformat.bases import BaseModel
from loraformat.evidence import Hints
from loraformat.matching import Match, find_expert
from loraformat.plan import WeightedAdapter
from loraformat.problems import Problem, count_problems
from loraformat.resolve import gather_clues, resolve
from loraformat.rules import check_adapter
from loraformat.viewing import choose_graphs

_Key: TypeAlias = tuple[str, str, tuple[int, int], str]


@dataclass(frozen=True, slots=True)
class ResolvedTarget:
    """One parameter of a target, and the weight that it is.

    Attributes:
        target: name of the target.
        parameter: `weight`, `bias` ...
        weight: name of the stored tensor.
        sites: ids of the sites that read it.
        rows: start and stop, and step where it is not 1, of the target's rows in the weight's canonical matrix
            `(out, in)`; None for all.
        expert: which of packed experts has that matrix; None for a weight of one.
        strategy: what found it.
        evidence: what it was found by.
        verified: what of its numbers was compared, and agrees.
        transposed: whether the stored matrix is the transpose of `(out, in)`.
        folded: whether it was multiplied by numbers, or its rows moved, before it was stored: a merge needs the torch
            checkpoint for them.
        section: start and stop of the target's own rows that the weight has; None for all.
        copies: names of tensors that have the same numbers, one for each further call of the module.
    """

    target: str
    parameter: str
    weight: str
    sites: tuple[str, ...]
    rows: tuple[int, ...] | None
    expert: int | None
    strategy: str
    evidence: str
    verified: tuple[str, ...]
    transposed: bool
    folded: bool
    section: tuple[int, int] | None = None
    copies: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Resolved:
    """What `resolve_targets` has found.

    Attributes:
        targets: those with a weight, sorted.
        problems: what is wrong with the others, and what is to be said.
    """

    targets: tuple[ResolvedTarget, ...]
    problems: tuple[Problem, ...]

    def __repr__(self) -> str:
        """Say what it is in one line."""
        return f"<Resolved: {len(self.targets)} targets with their weights; {count_problems(self.problems)}>"

    @property
    def is_whole(self) -> bool:
        """Whether every target has its weight."""
        return not any(problem.severity == "error" for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`; `--map` reads its `targets`."""
        return {
            "targets": [target.as_json() for target in self.targets],
            "problems": [dict(problem.as_json()) for problem in self.problems],
        }


def resolve_one(base: BaseModel, item: WeightedAdapter, hints: Hints, options: Mapping[str, Any]) -> Resolved:
    """Return which weight each target of one adapter is.

    Args:
        base: the opened base.
        item: the adapter.
        hints: what there is to find targets by, besides names.
        options: of `resolve`.
    """
    options = dict(options)
    base = choose_graphs(base, options.pop("graphs", ()))
    problems = check_adapter(item.adapter)
    if any(problem.severity == "error" for problem in problems):
        return Resolved((), tuple(problems))
    clues = gather_clues(item.adapter, base, hints, strip_prefix=options.get("strip_prefix"))
    found = resolve(item.adapter, base.sites, clues=clues, **options)
    divisors = {site.id: site.divisor for site in base.sites}
    described: dict[_Key, ResolvedTarget] = {}
    for match in found.matches:
        for name in dict.fromkeys((match.target.name, *match.also)):
            _add(described, _describe(match, name, divisors), match.sites[0].graph)
    return Resolved(tuple(described[key] for key in sorted(described)), (*problems, *found.problems))


def _add(described: dict[_Key, ResolvedTarget], each: ResolvedTarget, graph: str) -> None:
    """Add a target in a graph, or what further calls of its module read to what is known of it."""
    key = (each.target, each.parameter, each.section or (0, 0), graph)
    known = described.setdefault(key, each)
    if known is not each:
        copies = dict.fromkeys((*known.copies, each.weight, *each.copies))
        sites = tuple(dict.fromkeys((*known.sites, *each.sites)))
        described[key] = replace(known, sites=sites, copies=tuple(copies))


def _describe(match: Match, target: str, divisors: Mapping[str, float]) -> ResolvedTarget:
    return ResolvedTarget(
        target=target,
        parameter=match.want.parameter,
        weight=match.weight.name,
        sites=tuple(site.id for site in match.sites),
        rows=_find_rows(match),
        expert=find_expert(match.sites[0]),
        strategy=match.strategy,
        evidence=match.evidence,
        verified=match.verified,
        transposed=match.transposed,
        folded=bool(match.row_factors or match.row_order) or match.divisor != divisors[match.sites[0].id],
        section=match.section,
        copies=tuple(dict.fromkeys(weight.name for weight in match.weights[1:])),
    )


def _find_rows(match: Match) -> tuple[int, ...] | None:
    """Return the rows of the canonical matrix that a part of a stored one is."""
    if match.part is None:
        return None
    start, stop, step = match.part.columns if match.transposed else match.part.rows
    expert = find_expert(match.sites[0])
    first = expert * match.weight.tensor.shape[1] if expert is not None and not match.transposed else 0
    run = (start - first, stop - first)
    return run if step == 1 else (*run, step)
