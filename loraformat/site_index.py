"""Finding the sites of a base by names that may be longer or shorter than its own."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from loraformat.bases import Site
from loraformat.limits import NEAR_MISSES

_HALVES: Final = frozenset({"encoder", "decoder"})
_NUMBERED: Final = re.compile(r"\d")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A site whose path fits, and what had to be added to or dropped from the target's name."""

    site: Site
    relation: str


class SiteIndex:
    """The sites of a base by module path and by the ends of module paths, for one parameter of modules."""

    def __init__(self, sites: Iterable[Site], parameter: str = "weight") -> None:
        self._by_path: dict[str, list[Site]] = defaultdict(list)
        self._by_end: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            if not site.module or site.parameter != parameter:
                continue
            self._by_path[site.module].append(site)
            for end, _ in _ends(site.module):
                self._by_end[end].append(site)
        self.paths = sorted(self._by_path)

    def find(self, name: str) -> list[Candidate]:
        """Return the sites that the name may mean: exact ones alone where there are any."""
        if name in self._by_path:
            return [Candidate(site, "") for site in self._by_path[name]]
        longer = [Candidate(site, f"+{site.module[: -len(name)]}") for site in self._by_end.get(name, ())]
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


def _ends(path: str) -> Iterable[tuple[str, str]]:
    """Yield every proper end of a dotted path with what precedes it."""
    position = path.find(".")
    while position >= 0:
        yield path[position + 1 :], path[: position + 1]
        position = path.find(".", position + 1)
