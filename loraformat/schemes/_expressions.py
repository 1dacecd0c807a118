"""Regular expressions from a file, matched in time that cannot run away.

Python's `re` tries one way after the other, so that thirty `?` in a file keep it busy for a day. Here every part of an
expression is a function from a set of positions in the text (the bits of a number) to the set of positions where it may
end; it has the answer of `re`, since nothing is captured. How much work a text may take is counted, never timed. Back
references, conditionals, atomic groups and possessive quantifiers, of which that is not true, are refused.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

_MAX_CHARACTERS: Final = 4000
_MAX_DEPTH: Final = 30
_MAX_STEPS: Final = 100_000
"""Of one expression and one text: some 50 ms."""
_TOKEN: Final = re.compile(
    r"""(?P<quantifier>[*+?]|\{(?P<least>\d{0,3})(?:(?P<comma>,)(?P<most>\d{0,3}))?\})(?P<manner>[?+]?)
      | (?P<look>\(\?<?[=!])
      | (?P<open>\((?:\?(?:P<\w+>|(?P<on>[ims]*)(?:-(?P<off>[ims]+))?:))?)(?!\?)
      | (?P<flags>\(\?(?P<all>[ims]+)\))
      | (?P<close>\))
      | (?P<bar>\|)
      | (?P<edge>[\^$]|\\[bBAZ])
      | (?P<one>\\[dDwWsStnrfv]|\\[^a-zA-Z0-9]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[{*+?()|^$])""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(slots=True)
class _Text:
    """A text that is matched, and the work that is left for it."""

    characters: str
    left: int = _MAX_STEPS
    places: dict[str, int] = field(default_factory=dict)
    accepted: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for position, character in enumerate(self.characters):
            self.places[character] = self.places.get(character, 0) | 1 << position

    def find(self, accepts: Callable[[str], object]) -> int:
        """Return the positions of the characters that are accepted."""
        return sum(places for character, places in self.places.items() if accepts(character))

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"more than {_MAX_STEPS} steps of work for one name")


_Run: TypeAlias = Callable[[_Text, int], int]


class _Part(NamedTuple):
    """A part of an expression: from starts to ends, and how many characters it takes where that is always the same."""

    run: _Run
    width: int | None
    loops: _Run | None = None
    """From starts to what any number of repetitions reaches, for a part that is one character."""


@dataclass(frozen=True)
class Expression:
    """One that was read."""

    part: _Part

    def ends(self, text: str, starts: int) -> int:
        """Return the positions where it may end, as bits; ValueError for too much work."""
        return self.part.run(_Text(text), starts)


@lru_cache(maxsize=4096)
def read_expression(pattern: str, *, flags: bool = False) -> Expression:
    """Return a regular expression.

    Args:
        pattern: as Python has them.
        flags: whether it may begin with flags for all of it, such as `(?i)`.

    Raises:
        ValueError: it is none, or asks for what is not done here.
    """
    if len(pattern) > _MAX_CHARACTERS:
        raise ValueError(f"{len(pattern)} characters, at most {_MAX_CHARACTERS}")
    part = _Parser(pattern, flags=flags).parse()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)  # What is no expression for Python is none for PEFT.
    except (re.error, OverflowError) as error:
        raise ValueError(str(error)) from error
    return Expression(part)


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, pattern: str, *, flags: bool) -> None:
        self._tokens = list(_split(pattern))
        self._flags = 0
        if flags and self._tokens and self._tokens[0].lastgroup == "flags":
            self._flags = _read_flags(self._tokens.pop(0)["all"])
        self._tokens.reverse()

    def parse(self) -> _Part:
        part = self._alternatives(0)
        if self._tokens:
            raise ValueError("unbalanced parenthesis")
        return part

    def _next_is(self, *kinds: str) -> bool:
        return bool(self._tokens) and self._tokens[-1].lastgroup in kinds

    def _alternatives(self, depth: int) -> _Part:
        if depth > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_DEPTH} nested groups")
        branches = [self._sequence(depth)]
        while self._next_is("bar"):
            self._tokens.pop()
            branches.append(self._sequence(depth))
        return branches[0] if len(branches) == 1 else _choose(branches)

    def _sequence(self, depth: int) -> _Part:
        parts = []
        while self._tokens and not self._next_is("bar", "close"):
            parts.append(self._piece(depth))
        return parts[0] if len(parts) == 1 else _chain(parts)

    def _piece(self, depth: int) -> _Part:
        token = self._tokens.pop()
        kind = token.lastgroup
        if kind == "manner":
            raise ValueError(f"nothing to repeat before {token[0]!r}")
        if kind == "flags":
            raise ValueError(f"flags that are not at its start: {token[0]}")
        if kind == "edge":
            part = _Part(_EDGES[token[0]], 0)
        elif kind == "one":
            part = _match_one(token[0], self._flags)
        else:
            part = self._group(token, depth)
        if not self._next_is("manner"):
            return part
        least, most = _read_quantifier(self._tokens.pop())
        if kind == "edge":
            raise ValueError("a loop over nothing")
        return _repeat(part, least, most)

    def _group(self, token: re.Match[str], depth: int) -> _Part:
        outside = self._flags
        self._flags = (outside | _read_flags(token["on"])) & ~_read_flags(token["off"])
        inner = self._alternatives(depth + 1)
        self._flags = outside
        if not self._next_is("close"):
            raise ValueError("unbalanced parenthesis")
        self._tokens.pop()
        if token.lastgroup != "look":
            return inner
        return _look(inner, behind="<" in token[0], wanted=token[0].endswith("="))


def _split(pattern: str) -> Iterator[re.Match[str]]:
    position = 0
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None:
            raise ValueError(f"{pattern[position : position + 4]!r} at {position}")
        yield token
        position = token.end()


def _read_flags(letters: str | None) -> int:
    return sum(int(getattr(re, letter.upper())) for letter in set(letters or ""))


def _read_quantifier(token: re.Match[str]) -> tuple[int, int | None]:
    if token["manner"] == "+":
        raise ValueError(f"the possessive {token[0]!r}")
    simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(token["quantifier"])
    if simple is not None:
        return simple
    if not (token["least"] or token["most"]):
        raise ValueError(f"the count {token[0]!r}")
    least = int(token["least"] or 0)
    most = int(token["most"]) if token["most"] else None if token["comma"] else least
    return least, most


def _match_one(atom: str, flags: int) -> _Part:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            accepts = re.compile(atom, flags).fullmatch
    except re.error as error:
        raise ValueError(str(error)) from error
    key = (atom, flags)

    def find(text: _Text) -> int:
        text.spend()
        if key not in text.accepted:
            text.accepted[key] = text.find(accepts)
        return text.accepted[key]

    def fill(text: _Text, starts: int) -> int:
        entered, step = find(text) << 1, 1
        while step <= len(text.characters):  # Twice as far in each step.
            starts |= (starts << step) & entered
            entered &= entered << step
            step *= 2
        return starts

    return _Part(lambda text, starts: (starts & find(text)) << 1, 1, fill)


def _chain(parts: list[_Part]) -> _Part:
    def run(text: _Text, starts: int) -> int:
        for part in parts:
            if not starts:
                break
            text.spend()
            starts = part.run(text, starts)
        return starts

    widths = [part.width for part in parts]
    return _Part(run, None if None in widths else sum(width or 0 for width in widths))


def _choose(branches: list[_Part]) -> _Part:
    def run(text: _Text, starts: int) -> int:
        ends = 0
        for branch in branches:
            text.spend()
            ends |= branch.run(text, starts)
        return ends

    widths = {branch.width for branch in branches}
    return _Part(run, widths.pop() if len(widths) == 1 else None)


def _repeat(part: _Part, least: int, most: int | None) -> _Part:
    def run(text: _Text, starts: int) -> int:
        for _ in range(least):
            text.spend()
            starts = part.run(text, starts)
        if most is None and part.loops:
            return part.loops(text, starts)
        reached, fresh, count = starts, starts, least
        while fresh and count != most:
            text.spend()
            fresh = part.run(text, fresh) & ~reached
            reached |= fresh
            count += 1
        return reached

    return _Part(run, part.width * least if part.width is not None and least == most else None)


def _look(inner: _Part, *, behind: bool, wanted: bool) -> _Part:
    width = inner.width if behind else 0
    if width is None:
        raise ValueError("a look behind of several widths")

    def holds(text: _Text, position: int) -> bool:
        text.spend()
        if position < width:
            return False
        ends = inner.run(text, 1 << (position - width))
        return bool(ends >> position & 1 if behind else ends)

    def run(text: _Text, starts: int) -> int:
        positions = (position for position in range(starts.bit_length()) if starts >> position & 1)
        return sum(1 << position for position in positions if holds(text, position) is wanted)

    return _Part(run, 0)


def _find_borders(text: _Text) -> int:
    """Return where a word begins or ends."""
    words = text.find(lambda character: character.isalnum() or character == "_")
    return words ^ words << 1


_EDGES: Final[dict[str, _Run]] = {
    "^": lambda text, starts: starts & 1,
    r"\A": lambda text, starts: starts & 1,
    "$": lambda text, starts: starts & 1 << len(text.characters),
    r"\Z": lambda text, starts: starts & 1 << len(text.characters),
    r"\b": lambda text, starts: starts & _find_borders(text),
    r"\B": lambda text, starts: starts & ~_find_borders(text),
}
"""A name is one line: `$` is its end alone."""
