"""Names beside layers that have none: a bias, a norm of heads, the norm in front, and what the layer does there.

An attention whose queries are `h.3.attn.q_proj`, by their bias, has the keys of `h.3.attn`; behind the norm
`layers.3.input_layernorm` stand the queries of layer 3. The base says which layers work together and what each does;
here the names of targets are read for what they do. Names that contradict one another tell nothing (LF450), and a
target that two layers could be is refused (LF404).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from loraformat.bases import Anchor, Anchors, Role
from loraformat.evidence import Lookup
from loraformat.evidence._places import Place, read_place
from loraformat.evidence.structure import OWN_ORDER, find_sites
from loraformat.matching import Want
from loraformat.matching.site_index import Candidate, SiteIndex
from loraformat.problems import Problem

_ORDER: Final = 45
_KEY: Final = "anchors"
_CROSSING: Final = re.compile(r"cross|encoder_attn|EncDec", re.I)
_PLAIN: Final = re.compile(r"self", re.I)
_OF_ATTENTION: Final = re.compile(r"(?:self_|cross_|encoder_)?att(?:n|ention)", re.I)
_NORM: Final = "_norm"


@dataclass(frozen=True, slots=True)
class _Known:
    """What the names beside a group of layers say.

    Attributes:
        number: of the group.
        anchor: the names.
        owners: paths of the modules that members with a name are in, each with that name.
    """

    number: int
    anchor: Anchor
    owners: dict[str, str]


class AnchorNames:
    """The strategy `anchors`."""

    name = _KEY
    order = _ORDER

    def find(self, want: Want, lookup: Lookup) -> list[Candidate]:
        """Return the site that does what the target's name says, where names beside it say whose it is."""
        place = read_place(lookup.names[want.target.name])
        if lookup.clues.anchors is None or not want.is_main or place is None:
            return []
        if _KEY not in lookup.kept:
            lookup.kept[_KEY] = _settle(lookup.clues.anchors(), lookup)
        anchors, known = lookup.kept[_KEY]
        named = [
            replace(site, module=path, evidence=f"{role.name} beside {beside}")
            for each in known
            for path, beside in _name(each, place)
            for role in (Role(each.number, name) for name in place.roles)
            for site in find_sites(want, lookup.sites, anchors.roles, role)
        ]
        # Of which families of models have the rows of these modules in turns, the graph does not tell.
        if OWN_ORDER.search(f".{place.end}") and (anchors.roles.is_ordered or any(site.section for site in named)):
            return []
        found = SiteIndex(named).find(lookup.names[want.target.name])
        return [replace(each, strategy=self.name, evidence=each.site.evidence) for each in found]


def _settle(anchors: Anchors, lookup: Lookup) -> tuple[Anchors, list[_Known]]:
    """Return the base's anchors, and those whose names agree; of the others a problem is noted."""
    known = []
    for number, anchor in enumerate(anchors.anchors):
        owners, objection = _read_owners(anchor)
        if objection:
            lookup.problems.append(Problem("LF450", "anchors", objection, "names that agree", severity="warning"))
        else:
            known.append(_Known(number, anchor, owners))
    return anchors, known


def _read_owners(anchor: Anchor) -> tuple[dict[str, str], str]:
    """Return the modules that members are in by their names, or what their names have against one another."""
    owners: dict[str, str] = {}
    for role, path in anchor.named.items():
        place = read_place(path)
        if role.endswith(_NORM):
            owners.setdefault(path.rpartition(".")[0], path)
        elif place is not None and (role not in place.roles or place.attends != anchor.attends):
            return {}, f"{path}, by its name {' or '.join(place.roles)}, does what the {role} does"
        elif place is not None:
            owners.setdefault(place.owner, path)
    paths = sorted(owners, key=len)
    within = anchor.norm.rpartition(".")[0]
    for shorter, longer in zip((within, *paths), paths, strict=False):
        if shorter and not f"{longer}.".startswith(f"{shorter}."):
            return {}, f"{owners.get(shorter, anchor.norm)} and {owners[longer]} beside layers that work together"
    return owners, ""


def _name(known: _Known, place: Place) -> Iterator[tuple[str, str]]:
    """Yield the paths that a member would have if it were the target's, with the names that say so."""
    inner, anchor = place.inner, known.anchor
    if place.attends != anchor.attends or inner is None:
        return
    if anchor.attends and (_PLAIN if anchor.crosses else _CROSSING).search(inner):
        return
    yield from ((f"{owner}.{place.end}", path) for owner, path in known.owners.items())
    if not known.owners and anchor.norm and _may_stand_before(anchor.norm, place, inner):
        layer = anchor.norm.rpartition(".")[0]
        yield ".".join(filter(None, (layer, inner, place.end))), anchor.norm


def _may_stand_before(norm: str, place: Place, inner: str) -> bool:
    """Say whether a norm that is named after an attention is named after the target's own."""
    named_after = _OF_ATTENTION.match(norm.rpartition(".")[2])
    return named_after is None or (place.attends and norm.rpartition(".")[2].startswith(inner))


STRATEGY: Final = AnchorNames()
