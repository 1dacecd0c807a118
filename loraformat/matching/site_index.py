"""Finding the sites of a base by names that may be longer or shorter than its own."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from loraformat.bases import Site
from loraformat.limits import NEAR_MISSES
from loraformat.renames import generalise, list_names

_HALVES: Final = frozenset({"encoder", "decoder"})
_NUMBERED: Final = re.compile(r"\d")
_END_PARTS: Final = 3
"""Ends of paths are looked up by so many of their parts: few share them, and few are to be kept."""

RENAMED: Final = "~"
"""Marks the relation of a name that a library changed; the name that was found follows."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A site that may be a target's.

    Attributes:
        site: the site.
        relation: what had to be added to or dropped from the target's name.
        strategy: how it was found.
        verified: what of its numbers was compared, and agrees; empty for nothing.
        evidence: by what, where neither the site nor the strategy's name says it.
    """

    site: Site
    relation: str
    strategy: str = "names"
    verified: str = ""
    evidence: str = ""


class SiteIndex:
    """The sites of a base by module path and by the ends of module paths, for one parameter of modules."""

    def __init__(self, sites: Iterable[Site], parameter: str = "weight") -> None:
        self._by_path: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            if site.module and site.parameter == parameter:
                self._by_path[site.module].append(site)
        self.paths = sorted(self._by_path)
        self._by_name: dict[str, list[Site]] = defaultdict(list)
        for path in self.paths:
            for name in {path, generalise(path)}:
                self._by_name[name] += self._by_path[path]
        self._by_end: dict[str, list[str]] = defaultdict(list)
        for path in self.paths:
            for end in _short_ends(path):
                self._by_end[end].append(path)

    def find(self, name: str) -> list[Candidate]:
        """Return the sites that the name may mean: exact ones alone where there are any, then those of its renames."""
        if name in self._by_path:
            return [Candidate(site, "") for site in self._by_path[name]]
        others = list(list_names(name))
        renamed = [
            Candidate(site, f"{RENAMED}{site.module}") for other in others for site in self._by_name.get(other, ())
        ]
        if renamed:
            return renamed
        found = self._find_nested(name)
        if found:
            return found
        return [
            Candidate(candidate.site, f"{RENAMED}{candidate.site.module}")
            for other in others
            for candidate in self._find_nested(other)
        ]

    def _find_nested(self, name: str) -> list[Candidate]:
        """Return the sites of which the name is an end, or whose path is an end of the name."""
        tail = next(_short_ends(f".{name}"))
        longer = [
            Candidate(site, f"+{path[: -len(name)]}")
            for path in self._by_end.get(tail, ())
            if path.endswith(f".{name}")
            for site in self._by_path[path]
        ]
        shorter = [
            Candidate(site, f"-{dropped}")
            for end, dropped in _ends(name)
            if not _NUMBERED.search(dropped) and _HALVES.isdisjoint(dropped.split("."))
            for site in self._by_path.get(end, ())
        ]
        return longer + shorter

    def near(self, name: str) -> list[str]:
        """Return the module paths most like `name`."""
        return get_close_matches(name, self.paths, n=NEAR_MISSES, cutoff=0.5)


def _ends(path: str) -> Iterator[tuple[str, str]]:
    """Yield every proper end of a dotted path with what precedes it."""
    position = path.find(".")
    while position >= 0:
        yield path[position + 1 :], path[: position + 1]
        position = path.find(".", position + 1)


def _short_ends(path: str) -> Iterator[str]:
    """Yield the proper ends of a dotted path of up to `_END_PARTS` parts, the longest first."""
    parts = path.split(".")
    for count in range(min(_END_PARTS, len(parts) - 1), 0, -1):
        yield ".".join(parts[-count:])
