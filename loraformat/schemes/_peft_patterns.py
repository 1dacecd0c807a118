"""PEFT's rank and alpha patterns: regular expressions from a file, matched in time that cannot run away.

Python's `re` tries one way after the other, so that thirty `?` in a file keep it busy for a day. Here every part of a
pattern is a function from a set of positions in the text to the set of positions where it may end. What no real pattern
uses is refused: back references, look-around, flags, possessive quantifiers, loops over groups.
"""

import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Final, TypeAlias

Step: TypeAlias = Callable[[str, set[int]], set[int]]

_MAX_CHARACTERS: Final = 500
_MAX_DEPTH: Final = 20
_MAX_COUNT: Final = 20
_PLAIN: Final = re.compile(r"[\w.\-]*")
_TOKEN: Final = re.compile(
    r"""(?P<quantifier>[*+?]\??|\{(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\}\??)
      | (?P<open>\((?:\?:)?)(?!\?)
      | (?P<close>\))
      | (?P<bar>\|)
      | (?P<edge>[\^$])
      | (?P<one>\\[dDwWsS]|\\[^a-zA-Z0-9]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[{*+?()|^$])""",
    re.VERBOSE | re.DOTALL,
)


def fits(pattern: str, target: str) -> bool:
    r"""Say whether PEFT applies `pattern` to `target`: `re.match(rf"(.*\.)?({pattern})$", target)`.

    Raises:
        ValueError: the pattern is no regular expression, or not a simple one.
    """
    if _PLAIN.fullmatch(pattern):
        return _ends_with(target, pattern)
    starts = {0} | {position + 1 for position, character in enumerate(target) if character == "."}
    return len(target) in _compile(pattern)(target, starts)


def fits_whole(pattern: str, target: str) -> bool:
    """Say whether all of `target` is as `pattern` says: `re.fullmatch(pattern, target)`; raises as `fits` does."""
    return len(target) in _compile(pattern)(target, {0})


def _ends_with(target: str, pattern: str) -> bool:
    """Compare a pattern without operators, in which a dot is any character, with the end of `target` behind a dot."""
    start = len(target) - len(pattern)
    if start < 0 or (start and target[start - 1] != "."):
        return False
    return all(wanted in (".", found) for wanted, found in zip(pattern, target[start:], strict=True))


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> Step:
    if len(pattern) > _MAX_CHARACTERS:
        raise ValueError(f"{len(pattern)} characters, at most {_MAX_CHARACTERS}")
    return _Parser(pattern).parse()


class _Parser:
    """Recursive descent over the tokens of one pattern."""

    def __init__(self, pattern: str) -> None:
        self._tokens: list[re.Match[str]] = []
        position = 0
        while position < len(pattern):
            token = _TOKEN.match(pattern, position)
            if token is None:
                raise ValueError(f"{pattern[position : position + 4]!r} at {position}")
            self._tokens.append(token)
            position = token.end()
        self._tokens.reverse()

    def parse(self) -> Step:
        step = self._alternatives(0)
        if self._tokens:
            raise ValueError("unbalanced parenthesis")
        return step

    def _next_is(self, *kinds: str) -> bool:
        return bool(self._tokens) and self._tokens[-1].lastgroup in kinds

    def _alternatives(self, depth: int) -> Step:
        if depth > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_DEPTH} nested groups")
        branches = [self._sequence(depth)]
        while self._next_is("bar"):
            self._tokens.pop()
            branches.append(self._sequence(depth))
        return lambda text, starts: set().union(*(branch(text, starts) for branch in branches))

    def _sequence(self, depth: int) -> Step:
        steps = []
        while self._tokens and not self._next_is("bar", "close"):
            steps.append(self._piece(depth))

        def run(text: str, starts: set[int]) -> set[int]:
            for step in steps:
                starts = step(text, starts)
            return starts

        return run

    def _piece(self, depth: int) -> Step:
        token = self._tokens.pop()
        if token.lastgroup == "quantifier":
            raise ValueError(f"nothing to repeat before {token[0]!r}")
        if token.lastgroup == "open":
            step = self._alternatives(depth + 1)
            if not self._next_is("close"):
                raise ValueError("unbalanced parenthesis")
            self._tokens.pop()
        else:
            step = _match_edge(token[0]) if token.lastgroup == "edge" else _match_one(token[0])
        if not self._next_is("quantifier"):
            return step
        least, most = _read_quantifier(self._tokens.pop())
        if token.lastgroup == "edge" or (token.lastgroup == "open" and (least, most) != (0, 1)):
            raise ValueError("a loop over a group or over nothing")
        return _repeat(step, least, most)


def _read_quantifier(token: re.Match[str]) -> tuple[int, int | None]:
    simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(token[0][0])
    if simple is not None:
        return simple
    least = int(token["least"] or 0) if len(token["least"]) < 4 else _MAX_COUNT + 1
    most = None if token["comma"] and not token["most"] else least
    if token["most"]:
        most = int(token["most"]) if len(token["most"]) < 4 else _MAX_COUNT + 1
    if not (token["least"] or token["most"]) or max(least, most or 0) > _MAX_COUNT or least > (most or least):
        raise ValueError(f"the count {token[0]!r}")
    return least, most


def _match_one(atom: str) -> Step:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            accepts = re.compile(atom).fullmatch
    except re.error as error:
        raise ValueError(str(error)) from error
    return lambda text, starts: {start + 1 for start in starts if accepts(text[start : start + 1])}


def _match_edge(mark: str) -> Step:
    return lambda text, starts: starts & {0 if mark == "^" else len(text)}


def _repeat(step: Step, least: int, most: int | None) -> Step:
    def run(text: str, starts: set[int]) -> set[int]:
        for _ in range(least):
            starts = step(text, starts)
        reached, fresh, count = set(starts), starts, least
        while fresh and count != most:
            fresh = step(text, fresh) - reached
            reached |= fresh
            count += 1
        return reached

    return run
