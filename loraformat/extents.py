"""Sizes of all weights that an adapter changes together, for kinds of which some numbers follow from them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loraformat.kinds import KINDS, Sharing, SizedTogether
from loraformat.matching import Match
from loraformat.problems import Problem

Extents = Mapping[str, tuple[int, ...]]
"""Target to the largest `(out, in)` of the weights that it shares something with."""


def measure_together(matches: Sequence[Match]) -> tuple[Extents, list[Problem]]:
    """Return the extents of all targets that need one, and what stands against them."""
    groups: dict[Sharing, dict[str, Match]] = defaultdict(dict)
    for match in matches:
        kind = KINDS.find(match.target.kind)
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
