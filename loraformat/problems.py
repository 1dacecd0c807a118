"""What is said to people, as data.

Rules return `Problem`s; `loraformat.errors.error_for` is the thin wrapper that raises them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from loraformat.reasons import find_reason

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, or worth saying, with its reason code.

    Attributes:
        code: reason code, e.g. `LF107`; the list is `spec/reasons.toml`.
        where: the file, tensor, target or option that it is about.
        found: what was found.
        expected: what would have been right.
        mend: how to mend it; empty means the advice that the reason code carries.
        severity: `error` stops the work; the others are printed.
    """

    code: str
    where: str
    found: str
    expected: str = ""
    mend: str = ""
    severity: Severity = "error"

    @property
    def title(self) -> str:
        """The reason code's title."""
        return find_reason(self.code).title

    @property
    def advice(self) -> str:
        """How to mend it: this problem's own advice, or the reason code's."""
        return self.mend or find_reason(self.code).mend

    def as_json(self) -> Mapping[str, str]:
        """Return the record for `--json` outputs."""
        return {
            "code": self.code,
            "severity": self.severity,
            "title": self.title,
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "mend": self.advice,
        }

    def __str__(self) -> str:
        """Return the message as one paragraph of plain text, control characters escaped."""
        lines = [f"{self.code} {self.title}: {self.where}", f"  found: {self.found}"]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.advice:
            lines.append(f"  mend: {self.advice}")
        # A line break inside a part could forge a line of ours.
        return "\n".join(escape_controls(line).replace("\n", "\\n") for line in lines)


def count_problems(problems: Iterable[Problem]) -> str:
    """Return how many problems of each severity there are, in words: `1 error, 3 notes`."""
    counts = Counter(problem.severity for problem in problems)
    words = [
        f"{counts[each]} {each}{'s' * (counts[each] > 1)}" for each in ("error", "warning", "note") if counts[each]
    ]
    return ", ".join(words) or "no problems"


_BIDI_MARKS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def escape_controls(text: str) -> str:
    r"""Return `text` with control characters, lone surrogates and bidi marks written as `\x1b` or `\u202e`.

    Names come from files; printed raw they could drive a terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c == "\n" or (c.isprintable() and c not in _BIDI_MARKS) else _escape(c) for c in text)


def escape_surrogates(text: str) -> str:
    r"""Return `text` as UTF-8 can hold it: bytes of a file's name that are no text are written as `\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
