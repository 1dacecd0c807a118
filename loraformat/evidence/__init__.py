"""How the weight of a target is found: one file for each strategy.

A strategy returns candidates with evidence, or nothing; it does not know the others. The first that returns some is
heard, in the order of their numbers. What a fingerprint or the torch checkpoint says of the numbers must agree with it:
`resolve.py` sees to that.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from loraformat.bases import Anchors, BaseModel, Roles, Site, View
from loraformat.matching import Match, Want
from loraformat.matching.site_index import Candidate, SiteIndex
from loraformat.problems import Problem
from loraformat.registry import Registry

__all__ = ["STRATEGIES", "Clues", "Hints", "Lookup", "MappedWeight", "Strategy", "find_candidates"]


@dataclass(frozen=True, slots=True)
class MappedWeight:
    """The weight that a user says a target's parameter is, or has some rows in.

    Attributes:
        weight: name of the stored tensor.
        sites: ids of the sites that are meant; empty for all that read it.
        rows: start and stop, and step where it is not 1, of the target's rows in the weight's canonical matrix
            `(out, in)`; None for all.
        expert: which of the weight's packed experts has that matrix; None for a weight of one.
        folded: whether it was multiplied by numbers before it was stored, which only the torch checkpoint tells.
        section: start and stop of the target's own rows that the weight has; None for all.
        copies: names of tensors that have the same numbers, one for each further call of the module.
        transposed: whether it is stored as the transpose of `(out, in)`; None for what the operator says.
    """

    weight: str
    sites: tuple[str, ...] = ()
    rows: tuple[int, ...] | None = None
    folded: bool = False
    expert: int | None = None
    section: tuple[int, int] | None = None
    copies: tuple[str, ...] = ()
    transposed: bool | None = None


@dataclass(frozen=True, slots=True)
class Clues:
    """What there is to find the targets of one adapter by, besides names.

    Attributes:
        mapped: weights by target and parameter; several where each has a section.
        reference: where the torch checkpoint of the base has each target's parameter.
        roles: what the layers of the base do, where the user asks for it.
        anchors: finds which layers work together, and the names beside them; None for a base that tells nothing.
        views: the graphs of a base of several, in each of which targets are looked for; empty for others.
        in_views: whether the user asks for what their layers do.
    """

    mapped: Mapping[tuple[str, str], Sequence[MappedWeight]] = field(default_factory=dict)
    reference: Mapping[tuple[str, str], Sequence[Match]] = field(default_factory=dict)
    roles: Roles | None = None
    anchors: Callable[[], Anchors] | None = None
    views: Sequence[View] = ()
    in_views: bool = False


@dataclass(frozen=True, slots=True)
class Hints:
    """What a user hands over besides names, for all adapters of a merge.

    Attributes:
        mapped: weights by target and parameter; several where each has a section.
        checkpoint: the torch checkpoint that the base was exported from.
        structure: whether what a layer does may tell which one it is.
    """

    mapped: Mapping[tuple[str, str], Sequence[MappedWeight]] = field(default_factory=dict)
    checkpoint: BaseModel | None = None
    structure: bool = False


class _Indexes(dict[str, SiteIndex]):
    """Sites by names, for each parameter; made when it is first asked for."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self._sites = sites

    def __missing__(self, parameter: str) -> SiteIndex:
        return self.setdefault(parameter, SiteIndex(self._sites, parameter))


class Lookup:
    """What strategies look in.

    Args:
        sites: the base's sites.
        wants: what is looked for.
        names: of every target, the name to look for.
        clues: what the user has handed over.
    """

    def __init__(self, sites: Sequence[Site], wants: Sequence[Want], names: Mapping[str, str], clues: Clues) -> None:
        self.sites = sites
        self.wants = wants
        self.names = names
        self.clues = clues
        self.indexes = _Indexes(sites)
        self.kept: dict[Any, Any] = {}
        """What strategies have read of weights, to be read once."""
        self.problems: list[Problem] = []
        """What strategies have to say of their own."""

    def reference(self, want: Want) -> Sequence[Match]:
        """Return where the torch checkpoint has what a target changes; nothing where there is none."""
        return self.clues.reference.get((want.target.name, want.parameter), ())


class Strategy(Protocol):
    """What a file in this folder provides as `STRATEGY`.

    Attributes:
        name: how its evidence is called.
        order: strategies with a smaller number are asked first.
    """

    name: str
    order: int

    def find(self, want: Want, lookup: Lookup) -> list[Candidate]:
        """Return the sites that may be the target's."""
        ...


STRATEGIES: Final[Registry[Strategy]] = Registry("loraformat.evidence", "STRATEGY")


def find_candidates(want: Want, lookup: Lookup) -> list[Candidate]:
    """Return what the first strategy that finds something has found."""
    return next((found for strategy in _in_order() if (found := strategy.find(want, lookup))), [])


def _in_order() -> Iterator[Strategy]:
    yield from sorted((strategy for _, strategy in STRATEGIES), key=lambda strategy: strategy.order)
