"""Names from files, as reports can hold them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from loraformat.problems import Problem, escape_controls

if TYPE_CHECKING:
    from loraformat.validation import Verdict


def one_line(value: object) -> str:
    """Return text without line breaks, control characters and lone surrogates."""
    return escape_controls(str(value)).replace("\n", "\\n")


def count_targets(verdict: "Verdict") -> str:
    """Return what kind of adapter it is and its size, in parentheses; empty for what could not be read."""
    if not verdict.scheme:
        return ""
    return f"({verdict.scheme}, {verdict.targets} target{'' if verdict.targets == 1 else 's'})"


def describe(problem: Problem) -> str:
    """Return what a problem says beside its code and title, in one line."""
    expected = f"; expected: {problem.expected}" if problem.expected else ""
    return one_line(f"{problem.where}: {problem.found}{expected}")


def locate(path: Path, root: Path) -> tuple[str, bool]:
    """Return the path relative to `root` where it lies below it, else absolute; and which of the two."""
    place = os.path.normpath(root / path)
    inside = os.path.relpath(place, root)
    leaves = inside == os.pardir or inside.startswith(os.pardir + os.sep)
    return (place, False) if leaves else (inside, True)


def as_uri(path: Path, root: Path) -> str:
    """Return a URI reference: relative below `root`, `file://` elsewhere; bytes outside ASCII percent-encoded."""
    place, inside = locate(path, root)
    encoded = quote(os.fsencode(place), safe="/")
    return encoded if inside else f"file://{encoded}"
