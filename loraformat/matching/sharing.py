"""Weights that several parts of a model read: when a change of one of them may be made.

A change is sound when everything that reads the tensor is meant to change alike: the target leads to all of it, or
several targets lead to all of it and say the same (PEFT saves tied tables, and the factors of tied modules, on both
sides), or it is of a kind that a library applies to all tied tables, and nothing but tables and heads reads it.
Otherwise what is meant to change gets a copy of its own where the base can have one, as graphs can; or, for tables that
the configuration ties, the tables part on request; or it is refused.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind
from loraformat.bases import Site
from loraformat.kinds import Nature
from loraformat.matching import Match
from loraformat.problems import Problem

_LISTED: Final = 8
_UNTIE: Final = (
    "config.json ties both tables (tie_word_embeddings). With --untie (untie=True) the output gets two of them, and "
    "tie_word_embeddings becomes false."
)
_TWINS: Final = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
"""The factors of a linear layer, and those of the embedding that make the same change of a tied table, transposed."""


def settle_sharing(
    matches: Sequence[Match], sites: Iterable[Site], *, untie: bool
) -> tuple[list[Match], list[Problem]]:
    """Return the matches that stand, and what is wrong with the others or was done about them.

    Args:
        matches: of one adapter.
        sites: the base's.
        untie: whether tables that the configuration ties may part.
    """
    sites = list(sites)
    tied = {site.id: site for site in sites if site.tied}
    settled: list[Match] = []
    problems: list[Problem] = []
    groups: dict[tuple[Any, ...], list[Match]] = defaultdict(list)
    for match in matches:
        if not _find_strangers(match):
            settled.append(match)
        else:
            groups[_readers(match), match.want.parameter, match.want.change.nature].append(match)
    for group in groups.values():
        kept, found = _settle(group, tied, sites, untie=untie)
        settled += kept
        problems += found
    return settled, problems


def _readers(match: Match) -> frozenset[str]:
    return frozenset().union(*(weight.consumers for weight in match.weights))


def _find_strangers(match: Match) -> list[str]:
    return sorted(_readers(match) - {site.id for site in match.sites})


def _settle(
    group: list[Match], tied: Mapping[str, Site], sites: Sequence[Site], *, untie: bool
) -> tuple[list[Match], list[Problem]]:
    first, names = group[0], " and ".join(dict.fromkeys(match.target.name for match in group))
    covered = {site.id for match in group for site in match.sites}
    if len(group) == 1 and first.want.change.shared and all(name in tied for name in _find_strangers(first)):
        return [_reach_all(first, tied)], []
    if len(group) == 1 and first.want.change.shared and not untie:
        alike = _list_alike(first, sites)
        if _readers(first) <= alike.keys():
            found = f"{first.weight.name!r} is also read by {', '.join(_find_strangers(first)[:_LISTED])}"
            return [_reach_all(first, alike)], [Problem("LF648", names, found, severity="note")]
    if covered >= _readers(first) and all(_say_the_same(first, other) for other in group[1:]):
        note = Problem("LF411", names, f"the same change of {first.weight.name!r}, made once", severity="note")
        also = tuple(dict.fromkeys(match.target.name for match in group))
        kept = _one_for_each_weight(group)
        return [replace(match, sites=_sites_of(match, group), also=also) for match in kept], [note]
    if not all(name in tied for name in _readers(first)):
        return _copy_or_refuse(group, untie=untie)
    if not untie:
        return [], [_report_sharing(match, group, _UNTIE) for match in group]
    note = Problem("LF412", names, f"{first.weight.name!r} is tied to another table; each is changed alone")
    return [replace(match, apart=match.sites[0].tied) for match in group], [replace(note, severity="note")]


def _copy_or_refuse(group: Sequence[Match], *, untie: bool) -> tuple[list[Match], list[Problem]]:
    """Return the matches that get a copy of their weight, with a note on each, and what is wrong with the others."""
    kept: list[Match] = []
    problems: list[Problem] = []
    for match in group:
        if (match.want.change.shared and not untie) or not all(site.own_name for site in match.sites):
            mend = next((site.part_mend for site in match.sites if site.part_mend), "")
            problems.append(_report_sharing(match, group, mend))
            continue
        kept.append(replace(match, apart=match.sites[0].own_name))
        found = f"{match.weight.name!r} is also read by {', '.join(_find_strangers(match)[:_LISTED])}"
        problems.append(Problem("LF417", match.want.name, found, severity="note"))
    return kept, problems


def _report_sharing(match: Match, group: Iterable[Match], mend: str) -> Problem:
    """Return the refusal of one match of a group: others read its tensor, or others of the group change it."""
    rivals = [other for other in group if other is not match]
    changed = {site.id for other in rivals for site in other.sites}
    untouched = [name for name in _find_strangers(match) if name not in changed]
    if untouched:
        found = f"the tensor {match.weight.name!r} is also read by {', '.join(untouched[:_LISTED])}"
        return Problem("LF402", match.want.name, found, "a tensor that nothing else reads", mend)
    others = ", ".join(dict.fromkeys(other.target.name for other in rivals[:_LISTED]))
    found = f"{others} changes the same tensor, {match.weight.name!r}, in another way"
    return Problem("LF402", match.want.name, found, "the same change of all that reads it", mend)


def _list_alike(match: Match, sites: Iterable[Site]) -> Mapping[str, Site]:
    """Return the sites that read a match's tensor as it does, by their ids: tied tables in one tensor of a graph."""
    manner = match.weight.key, match.transposed, match.divisor, match.part, match.section
    return {site.id: site for site in sites if _read_in_manner(site) == manner and site.parameter == "weight"}


def _read_in_manner(site: Site) -> tuple[Any, ...]:
    turned = site.transposed.get(SlotKind.PARAMETER, site.transposed.get(SlotKind.LINEAR))
    return (site.weight.key if site.weight is not None else "", turned, site.divisor, site.part, site.section)


def _reach_all(match: Match, tied: Mapping[str, Site]) -> Match:
    """Return the match with all tables that are tied to its own, those with a tensor of their own too."""
    sites = [tied[name] for name in sorted(_readers(match))]
    weights = {site.weight.key: site.weight for site in (*match.sites, *sites) if site.weight is not None}
    every = {site.id: site for site in (*match.sites, *sites)}
    return replace(match, sites=tuple(every.values()), weights=tuple(weights.values()))


def _one_for_each_weight(group: Iterable[Match]) -> list[Match]:
    return list({match.weight.key: match for match in reversed(list(group))}.values())[::-1]


def _sites_of(match: Match, group: Iterable[Match]) -> tuple[Site, ...]:
    """Return the sites of all matches, the match's own first."""
    return tuple({site.id: site for site in (*match.sites, *(s for other in group for s in other.sites))}.values())


def _say_the_same(one: Match, other: Match) -> bool:
    """Say whether two changes of one table are equal: the same numbers, at the same scale."""
    if one.target.kind != other.target.kind or one.target.options != other.target.options:
        return False
    if one.want.change.nature is Nature.ADDITIVE and one.target.scale != other.target.scale:
        return False
    roles, others = one.want.change.roles, other.want.change.roles
    if set(roles) == set(others) and one.transposed == other.transposed:
        return all(np.array_equal(_read(one, role), _read(other, role)) for role in roles)
    twins = _TWINS | {embedding: linear for linear, embedding in _TWINS.items()}
    pairs = [(role, twins.get(role)) for role in roles]
    if {twin for _, twin in pairs} != set(others):
        return False
    return all(np.array_equal(_read(one, role), _read(other, twin).T) for role, twin in pairs if twin is not None)


def _read(match: Match, role: str) -> NDArray[Any]:
    return match.target.factors[role].read()
