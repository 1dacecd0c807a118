"""What a layer does in the flow of values: `--resolve structure`, for graphs in which no name is left.

The base tells the roles of its layers, or why it tells none; here the targets' names are read for theirs. Roles count
only where all of these hold: every target that has a role has one layer number in its name; all names begin alike, so
that they are of one stack; the last layer of the graph is the last one that the adapter names, so that no attention too
many or too few was found; and what names lead to has the very role that the name says.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from loraformat.bases import Role, Roles, Site
from loraformat.evidence import Lookup
from loraformat.matching import Want, cut_rows
from loraformat.problems import Problem
from loraformat.site_index import Candidate

_IN_ATTENTION: Final = (
    (r"q_proj|q_lin|query|q", "query"),
    (r"k_proj|k_lin|key|k", "key"),
    (r"v_proj|v_lin|value|v", "value"),
    (r"c_attn|qkv_proj|query_key_value|Wqkv|qkv", "qkv"),
    (r"o_proj|out_proj|out_lin|output\.dense|c_proj|dense|proj|o", "output"),
)
_BEHIND: Final = (
    (r"gate_proj", "gate"),
    (r"up_proj", "up"),
    (r"gate_up_proj", "gate_up"),
    (r"down_proj", "down"),
    (r"fc1|lin1|intermediate\.dense|c_fc|dense_h_to_4h", "first"),
    (r"fc2|lin2|output\.dense|c_proj|dense_4h_to_h", "second"),
)
"""Ends of the names of modules, in the families of models that have them, and what these do."""
_ATTENTION: Final = re.compile(r"att", re.I)
_NUMBER: Final = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_OTHER_STACKS: Final = re.compile(r"encoder_attn|cross_?att|EncDecAttention|experts?\b|(?:^|\.)decoder\.|lora_", re.I)
_ORDER: Final = 50
_KEY: Final = "structure"


class Structure:
    """The strategy `structure`."""

    name = "structure"
    order = _ORDER

    def find(self, want: Want, lookup: Lookup) -> list[Candidate]:
        """Return the one site whose role is the target's."""
        roles = lookup.clues.roles
        if roles is None or not want.is_main:
            return []
        if _KEY not in lookup.kept:
            lookup.kept[_KEY] = _settle(lookup)
        role = lookup.kept[_KEY].get(want.target.name)
        if role is None:
            return []
        found = _find_site(want, lookup.sites, roles, role)
        named = (replace(site, module=want.target.name, evidence=self.name) for site in found)
        evidence = f"{role.name} of layer {role.layer}"
        return [Candidate(site, self.name, self.name, evidence=evidence) for site in named]


def _find_site(want: Want, sites: Sequence[Site], roles: Roles, role: Role) -> list[Site]:
    """Return the site that has a role, or the rows of one that has it with others."""
    found = [site for site in sites if roles.by_site.get(site.id) == role]
    if found or role not in roles.parts:
        return found[:1]
    place, rows = roles.parts[role]
    whole = [site for site in sites if site.id == place and not site.part and want.change.slot in site.transposed]
    return [cut_rows(site, want.change.slot, rows) for site in whole[:1]]


def read_role(name: str) -> Role | None:
    """Return the role that a target's name gives it; None for a name that gives none, or not surely."""
    numbers, end = _NUMBER.findall(name), _NUMBER.split(name)[-1]
    known = _IN_ATTENTION if _ATTENTION.search(end) else _BEHIND
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
    begins = {_NUMBER.split(name, maxsplit=1)[0] for name in wanted}
    if len(begins) > 1:
        return f"targets of several stacks: {', '.join(sorted(begins))}"
    last = max(role.layer for role in wanted.values())
    if last + 1 != roles.layers:
        return f"{roles.layers} layers in the graph, and the adapter's last one has the number {last}"
    for name, role in wanted.items():
        named = [c.site for c in lookup.indexes["weight"].find(name)] if "weight" in lookup.indexes else []
        others = {site.id for site in named if roles.by_site.get(site.id) not in (None, role)}
        if others:
            return f"{name} is {sorted(others)[0]} by its name, which is not the {role.name} of layer {role.layer}"
    return ""


STRATEGY: Final = Structure()
