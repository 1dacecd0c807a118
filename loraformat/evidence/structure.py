"""What a layer does in the flow of values: `--resolve structure`, for graphs in which no name is left.

The base tells the roles of its layers, or why it tells none; here the targets' names are read for theirs. Roles count
only where all of these hold: every target that has a role has one layer number in its name; all names of a stack begin
alike; it is certain which stack of the graph they are of; the last layer of that stack is the last one that the adapter
names, so that no attention too many or too few was found; and what names lead to has the very role that the name says.
"""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
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
    (r"fc1|lin1|intermediate\.dense|c_fc|dense_h_to_4h|wi", "first"),
    (r"fc2|lin2|output\.dense|c_proj|dense_4h_to_h", "second"),
    (r"wi_0", "gate"),
    (r"wi_1", "up"),
    (r"wo", "down|second"),
)
"""Ends of the names of modules, in the families of models that have them, and what these do: one of several roles."""
_MADE_OF: Final = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")}
"""Modules that hold what may be stored apart, in the order of their rows."""
OWN_ORDER: Final = re.compile(r"\.(?:query_key_value|Wqkv|qkv)$")
"""Modules of which families of models have the rows in different orders: in turns, or one after the other."""
ATTENTION: Final = re.compile(r"att", re.I)
NUMBER: Final = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
CROSSING: Final = re.compile(r"encoder_attn|cross_?att|EncDecAttention", re.I)
_NO_ROLE: Final = re.compile(r"experts?\b|lora_", re.I)
_HALF: Final = re.compile(r"(?:^|\.)(encoder|decoder)(?=\.)")
_OF_T5: Final = re.compile(r"\.layer\.[0-2](?=\.(?:SelfAttention|EncDecAttention|DenseReluDense)\.)")
"""The parts of a block of T5 are numbered too. It alone does not divide its scores."""
_CROSS: Final = "cross "
_ORDER: Final = 50
_KEY: Final = "structure"


@dataclass(frozen=True, slots=True)
class _Named:
    """What a target's name says.

    Attributes:
        begin: the name up to the number of the layer.
        layer: that number.
        roles: what the module does; one of them.
        stack: `encoder` or `decoder`, or nothing.
        is_of_t5: whether only T5 has such names.
    """

    begin: str
    layer: int
    roles: tuple[str, ...]
    stack: str
    is_of_t5: bool

    @property
    def crosses(self) -> bool:
        """Whether the module is one of an attention to an encoder."""
        return self.roles[0].startswith(_CROSS)


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
        evidence = f"{role.name} of layer {role.layer}" + (f" of the {role.stack}" if role.stack else "")
        return [Candidate(site, self.name, self.name, evidence=evidence) for site in named]


def find_sites(want: Want, sites: Sequence[Site], roles: Roles, role: Role) -> list[Site]:
    """Return the sites that have a role, the rows of those that have it with others, or those that have it together.

    Several sites have one role where they are of branches of which one runs.
    """
    found = {site.id: site for site in reversed(sites) if roles.by_site.get(site.id) == role}
    if found:
        return list(found.values())
    slot = want.change.slot
    if role in roles.parts:
        return [
            cut_rows(site, slot, rows)
            for place, rows in roles.parts[role]
            for site in _list_whole(sites, {place}, slot)[:1]
        ]
    start, together = 0, []
    for name in _MADE_OF.get(role.name, ()):
        places = {place for place, each in roles.by_site.items() if each == replace(role, name=name)}
        for site in _list_whole(sites, places, slot)[:1]:
            stop = start + count_rows(site, slot)
            together.append(replace(site, section=(start, stop)))
            start = stop
    return together if len(together) == len(_MADE_OF.get(role.name, ())) else []


def _list_whole(sites: Sequence[Site], places: Set[str], slot: SlotKind) -> list[Site]:
    """Return sites at some places, those of most rows first: the whole of what is stored."""
    found = [s for s in sites if s.id in places and s.weight and slot in s.transposed and s.section is None]
    return sorted(found, key=lambda site: -count_rows(site, slot))


def read_role(name: str) -> _Named | None:
    """Return the role that a target's name gives it; None for a name that gives none, or not surely."""
    plain = _OF_T5.sub("", name)
    numbers, begin, end = NUMBER.findall(plain), NUMBER.split(plain)[0], NUMBER.split(plain)[-1]
    known = IN_ATTENTION if ATTENTION.search(end) else BEHIND
    said = next((role for ends, role in known if re.search(rf"\.(?:{ends})$", end)), None)
    half = _HALF.search(begin)
    stack, crosses = half[1] if half is not None else "", CROSSING.search(end) is not None
    if said is None or len(numbers) != 1 or _NO_ROLE.search(name) or (crosses and stack == "encoder"):
        return None
    roles = tuple(f"{_CROSS}{role}" if crosses and known is IN_ATTENTION else role for role in said.split("|"))
    return _Named(begin, int(numbers[0]), roles, stack, plain != name)


def list_lacking(lookup: Lookup) -> Set[str]:
    """Return the targets that a graph surely lacks: it tells what all layers of its stacks do, and none does theirs."""
    settled, roles = lookup.kept.get(_KEY, {}), lookup.clues.roles
    return {name for name, role in settled.items() if roles is not None and not _may_have(roles, role)}


def _may_have(roles: Roles, role: Role) -> bool:
    """Say whether a layer of the graph has a role, or one of which it may be some rows that no Split tells."""
    wholes = {replace(role, name=whole) for whole, names in _MADE_OF.items() if role.name in names}
    return bool(_list_places(roles, role)) or not wholes.isdisjoint(roles.by_site.values())


def _settle(lookup: Lookup) -> Mapping[str, Role]:
    """Return the role of each target that has one; none, and a problem, where something stands against them all."""
    named = {name: said for name in lookup.names.values() if (said := read_role(name)) is not None}
    roles = lookup.clues.roles
    assert roles is not None, "asked for"
    wanted: dict[str, Role] = {}
    objection = roles.reason or _object_to_names(roles, named)
    if not objection:
        wanted = {name: _choose_role(roles, said) for name, said in named.items()}
        objection = _object(lookup, roles, wanted)
    if objection:
        lookup.problems.append(Problem("LF425", "structure", objection, severity="warning"))
        return {}
    return {target: wanted[name] for target, name in lookup.names.items() if name in wanted}


def _choose_role(roles: Roles, said: _Named) -> Role:
    """Return the role in the graph that a name means; in a graph of one stack an encoder's stack has no name."""
    alone = {"", "encoder"} if "" in roles.stacks else {""}
    stack = next(iter(roles.stacks)) if said.stack in alone else said.stack
    either = [Role(said.layer, name, stack) for name in said.roles]
    return next((role for role in either if role in roles.by_site.values()), either[0])


def _object_to_names(roles: Roles, named: Mapping[str, _Named]) -> str:
    """Return what keeps names of targets from saying which stack of the graph they are of."""
    if not named:
        return "no target's name says what its layer does, or it says so of several stacks"
    begins = {(said.stack, said.begin) for said in named.values()}
    halves = {stack for stack, _ in begins}
    if len(begins) > len(halves) or ("" in halves and len(halves) > 1):
        return f"targets of several stacks: {', '.join(sorted(begin for _, begin in begins))}"
    crossing = any(said.crosses for said in named.values())
    if "" in halves and "" not in roles.stacks and (len(roles.stacks) > 1 or not crossing):
        return (
            f"the graph's stacks are {' and '.join(sorted(roles.stacks))}, and the targets' names say nothing of these"
        )
    if "" in roles.stacks and "decoder" in halves and not crossing:
        return "one stack without cross-attention, and targets of a decoder: whether it is that decoder, nothing tells"
    other = next((name for name, said in named.items() if said.is_of_t5 != roles.is_unscaled), None)
    if other is not None:
        does = "are not divided by the root of the heads' size" if roles.is_unscaled else "are divided as T5 never does"
        return f"scores {does}, and {other} is {'not ' if roles.is_unscaled else ''}a name of T5"
    return ""


def _object(lookup: Lookup, roles: Roles, wanted: Mapping[str, Role]) -> str:
    """Return what stands against the roles of the graph, nothing where they may be trusted."""
    for stack, layers in roles.stacks.items():
        last = max((role.layer for role in wanted.values() if role.stack == stack), default=layers - 1)
        if last + 1 != layers:
            of = f" of the {stack}" if stack else ""
            return f"{layers} layers{of} in the graph, and the adapter's last one has the number {last}"
    own = next((name for name in sorted(wanted) if OWN_ORDER.search(name)), None)
    stored_apart = own is not None and wanted[own] not in roles.by_site.values()
    if own is not None and (roles.is_ordered or stored_apart):
        return f"queries, keys and values lie one after the other, and {own} may have them in turns"
    for name, role in wanted.items():
        named = [candidate.site for candidate in lookup.indexes["weight"].find(name)]
        places = _list_places(roles, role)
        others = {site.id for site in named if site.id in roles.by_site and site.id not in places}
        if others:
            return f"{name} is {sorted(others)[0]} by its name, which is not the {role.name} of layer {role.layer}"
    return ""


def _list_places(roles: Roles, role: Role) -> set[str]:
    """Return the ids of the sites that have a role, alone, with others or together."""
    meant = {role, *(replace(role, name=name) for name in _MADE_OF.get(role.name, ()))}
    return {place for place, each in roles.by_site.items() if each in meant} | {
        place for place, _ in roles.parts.get(role, ())
    }


STRATEGY: Final = Structure()
