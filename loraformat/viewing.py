"""In which graphs of a base of several a target is looked for, under which name, and what is said of the others.

A user may choose some of the graphs (`--graphs`). The others still have a say in whose a target is by its name: one of
theirs is left out, and said to be, rather than looked for where it does not belong.

A target must be merged wherever its module is: in every form that a folder has of a model, in a decoder with a cache
and in one without. So it is looked for in each graph by itself. Names decide between graphs as they do within one:
where one has the target's very name, those that only have one that ends so have another module.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

from loraformat.bases import TENSOR_NAME, BaseModel, Site, View, ViewedBase
from loraformat.errors import refuse
from loraformat.evidence import MappedWeight
from loraformat.matching import Match, Want
from loraformat.matching.mismatches import LISTED, list_nameless
from loraformat.matching.site_index import RENAMED, SiteIndex
from loraformat.problems import Problem
from loraformat.schemes._naming import COMPONENTS, split_component

_EXACT: Final = 0
_RENAMED: Final = 1
_NESTED: Final = 2
_NOTHING: Final = 3
_HALVES: Final = ("encoder", "decoder")
_PARTS: Final = frozenset(COMPONENTS) - {"diffusion_model"}


@dataclass(frozen=True, slots=True)
class Search:
    """What is looked for in one graph.

    Attributes:
        view: the graph.
        names: of each target, the name to look for.
        wants: what is looked for.
        lacking: targets that the graph surely lacks, as what its layers do shows.
    """

    view: View
    names: dict[str, str] = field(default_factory=dict)
    wants: list[Want] = field(default_factory=list)
    lacking: set[str] = field(default_factory=set)


def plan_searches(
    views: Sequence[View], wants: Sequence[Want], names: Mapping[str, str]
) -> tuple[list[Search], list[Problem]]:
    """Return what to look for in each graph, and the targets that several parts of a pipeline could be meant by.

    Args:
        views: the graphs.
        wants: of one adapter.
        names: of each target, the name to look for in a base.
    """
    searches = [Search(view) for view in views]
    chosen = {view.component for view in views if view.is_chosen}
    components = {view.component for view in views} - {""}
    indexes = [
        {parameter: SiteIndex(view.sites, parameter) for parameter in {want.parameter for want in wants}}
        for view in views
    ]
    problems: list[Problem] = []
    for want in wants:
        found = [
            _choose_name(names[want.target.name], view, components, index[want.parameter])
            for view, index in zip(views, indexes, strict=True)
        ]
        best = min((rank for _, rank in found), default=_NOTHING)
        meant = {view.component for view, (_, rank) in zip(views, found, strict=True) if rank == best < _NOTHING}
        meant = meant & chosen or meant
        if len(meant) > 1:
            listed = ", ".join(sorted(meant))
            mend = "Put the part's name before the targets', or merge into that part alone."
            problems.append(Problem("LF404", want.name, f"a module in each of {listed}", "a module in one", mend))
            continue
        for search, (name, rank) in zip(searches, found, strict=True):
            if name is not None and (rank in (best, _NOTHING)) and meant <= {search.view.component}:
                search.names[want.target.name] = name
                search.wants.append(want)
    return [search for search in searches if search.view.is_chosen], problems


def choose_graphs(base: BaseModel, patterns: Sequence[str]) -> BaseModel:
    """Return a base, of which a merge is about some graphs alone; the base itself where no pattern is given.

    Args:
        base: the opened base.
        patterns: of files from the base's folder, or names of folders there: all graphs below them.

    Raises:
        RefusedError: LF633 a base of one model, or a pattern that no graph meets.
    """
    if not patterns:
        return base
    if not isinstance(base, ViewedBase):
        raise refuse("LF633", base.path, f"a base of the format {base.format!r}", "a folder of several models")
    names = [view.graph for view in base.views]
    for pattern in patterns:
        if not any(_is_meant(name, pattern) for name in names):
            listed = ", ".join(names[:LISTED]) + (" ..." if len(names) > LISTED else "")
            raise refuse("LF633", f"--graphs {pattern}", "none of them", f"a pattern for some of {listed}")
    return base.choose_graphs({name for name in names if any(_is_meant(name, pattern) for pattern in patterns)})


def _is_meant(graph: str, pattern: str) -> bool:
    return fnmatchcase(graph, pattern) or fnmatchcase(graph, f"{pattern.rstrip('/')}/*")


def leave_out(missing: Sequence[Want], views: Sequence[View], names: Mapping[str, str]) -> list[Want]:
    """Return those of the targets that were found nowhere that graphs have which were not chosen.

    Args:
        missing: what the chosen graphs have under no name.
        views: the graphs.
        names: of each target, the name to look for in a base.
    """
    components = {view.component for view in views} - {""}
    others = [(view, SiteIndex(view.sites, "weight")) for view in views if not view.is_chosen]
    near = [site for view in views if view.is_chosen for site in view.sites]

    def is_elsewhere(want: Want) -> bool:
        return any(
            _choose_name(names[want.target.name], view, components, index)[1] < _NOTHING for view, index in others
        )

    return [want for want in missing if is_elsewhere(want) and not list_nameless(want, near)]


def report_left_out(wants: Sequence[Want]) -> list[Problem]:
    """Return the note of targets that are left out with the graphs that have them."""
    if not wants:
        return []
    said = ", ".join(want.name for want in wants[:LISTED]) + (" ..." if len(wants) > LISTED else "")
    return [
        Problem("LF634", "--graphs", f"{len(wants)} targets of graphs that were not chosen: {said}", severity="note")
    ]


def _choose_name(name: str, view: View, components: Iterable[str], index: SiteIndex) -> tuple[str | None, int]:
    """Return what to look for in a graph, and how well a name there meets it; None for another part's target."""
    first, _, rest = name.partition(".")
    if view.component and first in components:
        if first != view.component:
            return None, _NOTHING
        name = rest
    elif view.component and split_component(name)[0] in _PARTS:  # Of a part that this pipeline lacks.
        return None, _NOTHING
    rank = _rank(index, name)
    if rank == _NOTHING and view.half in name.split("."):
        alone = name.split(f"{view.half}.", 1)[-1]
        if _rank(index, alone) == _EXACT:
            return alone, _EXACT
    return name, rank


def _rank(index: SiteIndex, name: str) -> int:
    found = index.find(name)
    if not found:
        return _NOTHING
    relation = found[0].relation
    return _EXACT if not relation else _RENAMED if relation.startswith(RENAMED) else _NESTED


def choose_mapped(
    mapped: Mapping[tuple[str, str], Sequence[MappedWeight]], view: View, views: Sequence[View]
) -> Mapping[tuple[str, str], Sequence[MappedWeight]]:
    """Return what a user's map says of one graph, and what it says of none; weights are called `<file>:<name>`."""
    others = tuple(f"{each.graph}:" for each in views if each is not view)
    own = {key: [each for each in entries if not each.weight.startswith(others)] for key, entries in mapped.items()}
    return {key: entries for key, entries in own.items() if entries}


def report_absent(searches: Sequence[Search], matches: Sequence[Match], allowed: Sequence[str]) -> list[Problem]:
    """Return what is to be said of graphs that lack targets which others have.

    A graph may lack a module, as a decoder with a cache computes no keys of the encoder's states. Where weights have no
    name that would fit, it may have it all the same, and would stay as it was: that is refused (LF460).

    Args:
        searches: what was looked for, graph by graph.
        matches: what was found in all of them.
        allowed: patterns of names of targets that may be left out.
    """
    problems: list[Problem] = []
    found = {(match.sites[0].graph, match.target.name) for match in matches}
    somewhere = {match.target.name: match for match in matches}
    for search in searches:
        graph, looked_for = search.view.graph, {want.target.name for want in search.wants}
        absent = [match.want for name, match in somewhere.items() if name in looked_for and (graph, name) not in found]
        absent = [want for want in absent if not _is_of_other_half(want, search.view)]
        if not absent:
            continue
        if all(site.evidence == TENSOR_NAME for site in search.view.sites):  # It has no other weights than it names.
            lost = [want for want in absent if not is_allowed(want, allowed)]
            problems += [_report_lack(want, somewhere[want.target.name], graph) for want in lost[:LISTED]]
            continue
        claimed = {site.id for match in matches for site in match.sites}
        free = [site for site in search.view.sites if site.id not in claimed]
        unsure = [want for want in absent if want.target.name not in search.lacking]
        doubtful = [want for want in unsure if list_nameless(want, free) and not is_allowed(want, allowed)]
        problems += [_report_doubt(want, graph, free) for want in doubtful[:LISTED]]
        if not doubtful:
            said = ", ".join(want.name for want in absent[:LISTED]) + (" ..." if len(absent) > LISTED else "")
            problems.append(Problem("LF461", graph, f"{len(absent)} targets that it lacks: {said}", severity="note"))
    return problems


def _is_of_other_half(want: Want, view: View) -> bool:
    parts = want.target.name.split(".")
    return bool(view.half) and view.half not in parts and any(half in parts for half in _HALVES)


def is_allowed(want: Want, allowed: Sequence[str]) -> bool:
    """Say whether a pattern names a target that may be left out, or its parameter."""
    return any(fnmatchcase(name, glob) for name in (want.target.name, want.name) for glob in allowed)


def _report_lack(want: Want, other: Match, graph: str) -> Problem:
    """Return the error for a component's form that lacks what another has: one would be adapted, and the other not."""
    return Problem("LF833", want.name, f"in {other.sites[0].graph} and not in {graph}", "in all forms of a component")


def _report_doubt(want: Want, graph: str, free: Sequence[Site]) -> Problem:
    nameless = ", ".join(list_nameless(want, free)[:LISTED])
    return Problem("LF460", want.name, f"in {graph} nothing of this name, and without one {nameless}", "a name in each")
