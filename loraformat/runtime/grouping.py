"""Which changes share a branch: those that act on the same nodes, whatever adapter they are of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from loraformat.adapter import SlotKind
from loraformat.bases import Site
from loraformat.bases._onnx.branchable import BranchableGraph
from loraformat.bases._onnx.openings import Opening
from loraformat.errors import error_for, refuse
from loraformat.problems import Problem
from loraformat.runtime.branches import Branch, name_form
from loraformat.runtime.chains import Names
from loraformat.runtime.layouts import Layout, RuntimeInputs
from loraformat.runtime.targets import Served, ServedAdapter
from loraformat.spans import Part

_INSIDE: Final = "qkv_proj"
"""What the product inside an attention is called, which has no name of its own."""


@dataclass(slots=True)
class _Group:
    """Changes that act on the same nodes.

    Attributes:
        openings: the nodes, by where they stand.
        found: the changes.
    """

    openings: Mapping[tuple[str, int], Opening]
    found: list[Served] = field(default_factory=list)


def plan_branches(base: BranchableGraph, adapters: Sequence[ServedAdapter]) -> list[Branch]:
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


def _make_branch(base: BranchableGraph, group: _Group, names: Names) -> Branch:
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
        members=dict(_list_members(base, first)),
    )
    return Branch(layout, openings, tuple(group.found))


def _list_members(base: BranchableGraph, served: Served) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the modules that are packed into one node, and their columns."""
    for site in base.sites:
        if site.id == served.sites[0].id and site.part is not None and site.section is None and site.module:
            start, stop, _ = site.part.columns if site.transposed.get(SlotKind.LINEAR) else site.part.rows
            if (start, stop) != (0, served.out):
                yield site.module, (start, stop)


def restore_members(sites: Sequence[Site], inputs: RuntimeInputs) -> list[Site]:
    """Return sites for packed modules that a graph no longer shows, with nodes put between it and what divides it.

    Args:
        sites: of the model with run-time inputs.
        inputs: what it says about them.
    """
    known = {(site.id, site.module) for site in sites}
    by_name = {layout.name: layout for layout in inputs.layouts if layout.members}
    return [
        _cut(site, module, columns)
        for site in sites
        if site.module in by_name and site.weight is not None and site.section is None
        for module, columns in by_name[site.module].members.items()
        if (site.id, module) not in known
    ]


def _cut(site: Site, module: str, columns: tuple[int, int]) -> Site:
    """Return the site of one module of those that are packed into a node."""
    assert site.weight is not None, "chosen so"
    shape, turned = site.weight.tensor.shape, site.transposed[SlotKind.LINEAR]
    whole = site.part or Part((shape[0], shape[1]), (0, shape[0], 1), (0, shape[1], 1))
    run = (*columns, 1)
    return replace(site, module=module, part=replace(whole, columns=run) if turned else replace(whole, rows=run))


def _name_branch(base: BranchableGraph, served: Served) -> str:
    """Return the target's name; where the node is of several modules, or of a part of one, the name that it has."""
    if served.is_whole:
        return served.target.name
    here = [site for site in base.sites if site.id == served.sites[0].id]
    whole = next((site.module for site in here if site.module and site.weight and site.weight.name), "")
    inside = isinstance(opening := base.find_opening(served.sites[0]), Opening) and bool(opening.sizes)
    return f"{whole}.{_INSIDE}" if whole and inside else whole or served.target.name
