"""Which changes share a branch: those that act on the same nodes, whatever adapter they are of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loraformat.bases._onnx_openings import Opening
from loraformat.bases.onnx_graph import OnnxGraph
from loraformat.errors import error_for, refuse
from loraformat.problems import Problem
from loraformat.runtime.branches import Branch, Names, name_form
from loraformat.runtime.layouts import Layout
from loraformat.runtime.targets import Served, ServedAdapter


@dataclass(slots=True)
class _Group:
    """Changes that act on the same nodes.

    Attributes:
        openings: the nodes, by where they stand.
        found: the changes.
    """

    openings: Mapping[tuple[str, int], Opening]
    found: list[Served] = field(default_factory=list)


def plan_branches(base: OnnxGraph, adapters: Sequence[ServedAdapter]) -> list[Branch]:
    """Return a branch for all nodes that changes of the adapters act on; LF826 where there can be none."""
    groups: dict[frozenset[tuple[str, int]], _Group] = {}
    for change in (change for adapter in adapters for change in adapter.served):
        found = (base.find_opening(site) for site in change.sites)
        openings = {opening.place: opening for opening in found if isinstance(opening, Opening)}
        groups.setdefault(frozenset(openings), _Group(openings)).found.append(change)
    problems = _find_overlaps(list(groups.values()))
    if problems:
        raise error_for(problems)
    names = Names(set())
    return sorted((_make_branch(base, group, names) for group in groups.values()), key=lambda each: each.layout.name)


def _find_overlaps(groups: Sequence[_Group]) -> list[Problem]:
    """Return a problem where changes act on some nodes together and on others apart."""
    owners: dict[tuple[str, int], _Group] = {}
    problems = []
    for group in groups:
        for place in group.openings:
            other = owners.setdefault(place, group)
            if other is not group:
                where = f"{other.found[0].target.name} and {group.found[0].target.name}"
                found = f"both act on the node at {place[1]} of the {place[0]}, and on others apart"
                problems.append(Problem("LF826", where, found, "the same nodes for both"))
    return problems


def _make_branch(base: OnnxGraph, group: _Group, names: Names) -> Branch:
    openings = tuple(group.openings[place] for place in sorted(group.openings))
    first = group.found[0]
    forms = {(name_form(opening.product), opening.dtype.name) for opening in openings}
    sizes = {(each.change.shape[1:], each.out) for each in group.found}
    if len(forms) != 1 or len(sizes) != 1:
        found = f"nodes of {len(forms)} kinds and {len(sizes)} shapes"
        raise refuse("LF826", first.target.name, found, "nodes that are of one kind")
    layout = Layout(
        names.take(_name_branch(base, first)),
        name_form(openings[0].product),
        openings[0].dtype,
        first.change.shape[1],
        first.out,
        tuple(first.change.shape[2:]),
    )
    return Branch(layout, openings, tuple(group.found))


def _name_branch(base: OnnxGraph, served: Served) -> str:
    """Return the target's name; where the node is of several modules, or of a part of one, the name that it has."""
    if served.is_whole:
        return served.target.name
    here = [site for site in base.sites if site.id == served.sites[0].id]
    whole = next((site.module for site in here if site.module and site.weight and site.weight.name), "")
    return whole or served.target.name
