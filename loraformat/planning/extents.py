"""What a change follows from beside its own weight: sizes of all that an adapter changes, values of a neighbour."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loraformat.kinds import KINDS, Sharing, SizedTogether
from loraformat.matching import Match
from loraformat.plan.changes import Neighbour
from loraformat.problems import Problem

Extents = Mapping[str, tuple[int, ...]]
"""Target to the largest `(out, in)` of the weights that it shares something with."""


def measure_together(matches: Sequence[Match]) -> tuple[Extents, list[Problem]]:
    """Return the extents of all targets that need one, and what stands against them."""
    groups: dict[Sharing, dict[str, Match]] = defaultdict(dict)
    for match in matches:
        kind = KINDS.find(match.target.kind)
        if not hasattr(kind, "sharing"):  # To ask the protocol of every target takes longer than all the rest.
            continue
        sharing = kind.sharing(match.target) if isinstance(kind, SizedTogether) else None
        if sharing is not None and match.want.parameter == "weight":
            groups[sharing].setdefault(match.target.name, match)
    extents: dict[str, tuple[int, ...]] = {}
    problems: list[Problem] = []
    for sharing, members in groups.items():
        sizes = [match.change.shape for match in members.values()]
        extent = max(size[0] for size in sizes), max(size[1] for size in sizes)
        extents |= dict.fromkeys(members, extent)
        if len(members) != sharing.targets:
            found = f"{len(members)} of the {sharing.targets} targets for which {sharing.what} were drawn at once"
            problems.append(Problem("LF234", next(iter(members)), found, "all of them"))
        else:
            problems += [problem for match in members.values() for problem in _check(match, extent)]
    return extents, problems


def _check(match: Match, extent: tuple[int, ...]) -> list[Problem]:
    kind = KINDS.find(match.target.kind)
    assert isinstance(kind, SizedTogether), "chosen so"
    return kind.check_extent(match.target, replace(match.change, extent=extent))


def find_neighbours(matches: Sequence[Match]) -> tuple[Mapping[tuple[str, str], Neighbour], list[Problem]]:
    """Return the weight that each change follows from as well, by graph and name, and what stands against it."""
    found = {(match.sites[0].graph, match.target.name, match.want.parameter): match for match in matches}
    neighbours: dict[tuple[str, str], Neighbour] = {}
    problems: list[Problem] = []
    for match in matches:
        if not match.want.change.beside:
            continue
        graph = match.sites[0].graph
        near = found.get((graph, match.target.name, match.want.change.beside))
        if near is None or not _is_whole(near):
            said = "none of it" if near is None else f"{near.weight.name!r}, which is not stored as it is used"
            expected = f"the module's {match.want.change.beside} in one piece"
            problems.append(Problem("LF418", match.want.name, said, expected))
        else:
            neighbours[graph, match.want.name] = Neighbour(near.weight.key, near.transposed)
    return neighbours, problems


def _is_whole(match: Match) -> bool:
    """Say whether a weight is stored as its module uses it."""
    plain = match.weight.coding is None and match.weight.tensor.dtype.family == "float"
    return plain and match.divisor == 1 and not match.row_factors and match.part is None and match.section is None
