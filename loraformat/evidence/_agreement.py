"""Whether what structure finds in several graphs of a folder is one weight, in several forms.

Two towers may have equal layers, as those of a text and of an image; only their numbers tell them apart.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from numpy.typing import NDArray

from loraformat.evidence._columns import is_coded, read_columns
from loraformat.evidence._decoded import is_alike, read_decoded
from loraformat.matching import Match, Want
from loraformat.problems import Problem

_COLUMNS: Final = range(8)


def report_disagreement(matches: Sequence[Match]) -> list[Problem]:
    """Return a problem for each target of which graphs have other numbers, where structure found it in one of them."""
    by_want: dict[tuple[Want, tuple[int, int] | None], dict[str, Match]] = defaultdict(dict)
    for match in matches:
        by_want[match.want, match.sites[0].section].setdefault(match.sites[0].graph, match)
    return [problem for (want, _), found in by_want.items() for problem in _compare(want, found)]


def _compare(want: Want, found: Mapping[str, Match]) -> Iterator[Problem]:
    if len(found) < 2 or all(match.strategy != "structure" for match in found.values()):
        return
    first, *others = found.values()
    numbers = _read(want, first)
    for other in others:
        if not is_alike(_read(want, other), numbers):
            names = f"{first.weight.name!r} and {other.weight.name!r}"
            yield Problem("LF640", want.name, f"{names}, found by structure, with other numbers", "one weight in all")
            return


def _read(want: Want, match: Match) -> NDArray[Any]:
    """Return up to 8 columns of the canonical matrix that a match leads to."""
    site, slot = match.sites[0], want.change.slot
    columns = list(_COLUMNS)[: want.shape[1]]
    return read_decoded(site, slot, columns)[0] if is_coded(site) else read_columns(site, slot, columns)
