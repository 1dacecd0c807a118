"""Numbers for some targets, given by glob patterns of their names."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Final, TypeVar

from loraformat.adapter import Adapter
from loraformat.problems import Problem

Number = TypeVar("Number", int, float)
_SHOWN: Final = 3


def check_patterns(adapter: Adapter, patterns: Mapping[str, float]) -> list[Problem]:
    """Return a problem for each pattern that matches no target."""
    names = [target.name for target in adapter.targets]
    known = f"a pattern for some of {', '.join(names[:_SHOWN])} ..."
    return [
        Problem("LF706", pattern, f"none of the {len(names)} targets", known)
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]


def choose_number(patterns: Mapping[str, Number], name: str) -> Number | None:
    """Return the number of the last pattern that matches, None where none does."""
    matching = [number for pattern, number in patterns.items() if fnmatchcase(name, pattern)]
    return matching[-1] if matching else None
