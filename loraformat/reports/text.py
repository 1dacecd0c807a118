"""For people: a line for what is well, a block for what is not."""

from collections.abc import Sequence
from textwrap import indent
from typing import TYPE_CHECKING

from loraformat.reports import Setting
from loraformat.reports._words import count_targets, one_line

if TYPE_CHECKING:
    from loraformat.validation import Verdict


def write(verdicts: "Sequence[Verdict]", setting: Setting) -> str:
    """Return lines and blocks in the order of the verdicts."""
    return "".join(map(_block, verdicts))


def _block(verdict: "Verdict") -> str:
    gravest = verdict.severity
    word = "ok" if gravest in (None, "note") else gravest
    head = f"{word} {one_line(verdict.path)} {count_targets(verdict)}".rstrip()
    problems = (indent(f"{problem.severity}: {problem}", "  ") for problem in verdict.problems)
    return "\n".join((head, *problems)) + "\n"
