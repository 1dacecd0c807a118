"""What a layer does in the flow of values: `--resolve structure`, for graphs in which no name is left.

The base tells the roles of its layers, or why it tells none; here the targets' names are read for theirs. Roles count
only where all of these hold: every target that has a role has one layer number in its name; all names begin alike, so
that they are of one stack; the last layer of the graph is the last one that the adapter names, so that no attention too
many or too few was found; and what names lead to has the very role that the name says.
"""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Final

from loraformat.adapter import SlotKind
from loraformat.bases import Role, Roles, Site
from loraformat.evidence import Lookup
from loraformat.matching import Want, count_rows, cut_rows
from loraformat.matching.site_index import Candidate
from loraformat.problems import Problem

IN_ATTENTION: Final = (
    (r"q_proj|q_lin|query|q", "query"),
    (r"k_proj|k_lin|key|k", "key"),
    (r"v_proj|v_lin|value|v", "value"),
    (r"c_attn|qkv_proj|query_key_value|Wqkv|qkv", "qkv"),
    (r"o_proj|out_proj|out_lin|output\.dense|c_proj|dense|proj|o", "output"),
)
BEHIND: Final = (
    (r"gate_proj", "gate"),
    (r"up_proj", "up"),
    (r"gate_up_proj", "gate_up"),
    (r"down_proj", "down"),
    (r"fc1|lin1|intermediate\.dense|c_fc|dense_h_to_4h", "first"),
    (r"fc2|lin2|output\.dense|c_proj|dense_4h_to_h", "second"),
)
"""Ends of the names of modules, in the families of models that have them, and what these do."""
_MADE_OF: Final = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")}
"""Modules that hold what may be stored apart, in the order of their rows."""
OWN_ORDER: Final = re.compile(r"\.(?:query_key_value|Wqkv|qkv)$")
"""Modules of which families of models have the rows in different orders: in turns, or one after the other."""
ATTENTION: Final = re.compile(r"att", re.I)
NUMBER: Final = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_OTHER_STACKS: Final = re.compile(r"encoder_attn|cross_?att|EncDecAttention|experts?\b|(?:^|\.)decoder\.|lora_", re.I)
_ORDER: Final = 50
_KEY: Final = "structure"


class Structure:
    """The strategy `structure`."""

    name = "structure"
    order = _ORDER

    def find(self, want: Want, lookup: Lookup) -> list[Candidate]:
        """Return the one site whose role is the target's, or those that have it together."""
        roles = lookup.clues.roles
        if roles is None or not want.is_main:
            return []
        if _KEY not in lookup.kept:
            lookup.kept[_KEY] = _settle(lookup)
        role = lookup.kept[_KEY].get(want.target.name)
        if role is None:
            return []
        found = find_sites(want, lookup.sites, roles, role)
        named = (replace(site, module=want.target.name, evidence=self.name) for site in found)
        evidence = f"{role.name} of layer {role.layer}"
        return [Candidate(site, self.name, self.name, evidence=evidence) for site in named]


def find_sites(want: Want, sites: Sequence[Site], roles: Roles, role: Role) -> list[Site]:
    """Return the site that has a role, the rows of one that has it with others, or the sites that have it together."""
    found = [site for site in sites if roles.by_site.get(site.id) == role]
    if found:
        return found[:1]
    slot = want.change.slot
    if role in roles.parts:
        place, rows = roles.parts[role]
        return [cut_rows(site, slot, rows) for site in _list_whole(sites, {place}, slot)[:1]]
    start, together = 0, []
    for name in _MADE_OF.get(role.name, ()):
        places = {place for place, each in roles.by_site.items() if each == Role(role.layer, name)}
        for site in _list_whole(sites, places, slot)[:1]:
            stop = start + count_rows(site, slot)
            together.append(replace(site, section=(start, stop)))
            start = stop
    return together if len(together) == len(_MADE_OF.get(role.name, ())) else []


def _list_whole(sites: Sequence[Site], places: Set[str], slot: SlotKind) -> list[Site]:
    """Return sites at some places, those of most rows first: the whole of what is stored."""
    found = [s for s in sites if s.id in places and s.weight and slot in s.transposed and s.section is None]
    return sorted(found, key=lambda site: -count_rows(site, slot))


def read_role(name: str) -> Role | None:
    """Return the role that a target's name gives it; None for a name that gives none, or not surely."""
    numbers, end = NUMBER.findall(name), NUMBER.split(name)[-1]
    known = IN_ATTENTION if ATTENTION.search(end) else BEHIND
    role = next((role for ends, role in known if re.search(rf"\.(?:{ends})$", end)), None)
    if role is None or len(numbers) != 1 or _OTHER_STACKS.search(name):
        return None
    return Role(int(numbers[0]), role)


def _settle(lookup: Lookup) -> Mapping[str, Role]:
    """Return the role of each target that has one; none, and a problem, where something stands against them all."""
    wanted = {name: role for name in lookup.names.values() if (role := read_role(name)) is not None}
    objection = _object(lookup, wanted)
    if objection:
        lookup.problems.append(Problem("LF425", "structure", objection, severity="warning"))
        return {}
    return {target: wanted[name] for target, name in lookup.names.items() if name in wanted}


def _object(lookup: Lookup, wanted: Mapping[str, Role]) -> str:
    """Return what stands against the roles of the graph, nothing where they may be trusted."""
    roles = lookup.clues.roles
    assert roles is not None, "asked for"
    if roles.reason:
        return roles.reason
    if not wanted:
        return "no target's name says what its layer does, or it says so of several stacks"
    begins = {NUMBER.split(name, maxsplit=1)[0] for name in wanted}
    if len(begins) > 1:
        return f"targets of several stacks: {', '.join(sorted(begins))}"
    last = max(role.layer for role in wanted.values())
    if last + 1 != roles.layers:
        return f"{roles.layers} layers in the graph, and the adapter's last one has the number {last}"
    own = next((name for name in sorted(wanted) if OWN_ORDER.search(name)), None)
    stored_apart = own is not None and wanted[own] not in roles.by_site.values()
    if own is not None and (roles.is_ordered or stored_apart):
        return f"queries, keys and values lie one after the other, and {own} may have them in turns"
    for name, role in wanted.items():
        named = [c.site for c in lookup.indexes["weight"].find(name)] if "weight" in lookup.indexes else []
        places = _list_places(roles, role)
        others = {site.id for site in named if site.id in roles.by_site and site.id not in places}
        if others:
            return f"{name} is {sorted(others)[0]} by its name, which is not the {role.name} of layer {role.layer}"
    return ""


def _list_places(roles: Roles, role: Role) -> set[str]:
    """Return the ids of the sites that have a role, alone, with others or together."""
    names = {role.name, *_MADE_OF.get(role.name, ())}
    alone = {place for place, each in roles.by_site.items() if each.layer == role.layer and each.name in names}
    return alone | ({roles.parts[role][0]} if role in roles.parts else set())


STRATEGY: Final = Structure()
