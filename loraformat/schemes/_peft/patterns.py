"""PEFT's rank and alpha patterns and its expressions for target modules."""

import re
from typing import Final

from loraformat.schemes._expressions import read_expression

_PLAIN: Final = re.compile(r"[\w.\-]*")


def fits(pattern: str, target: str) -> bool:
    r"""Say whether PEFT applies `pattern` to `target`: `re.match(rf"(.*\.)?({pattern})$", target)`.

    Raises:
        ValueError: the pattern is no regular expression, or one that is not read here.
    """
    if _PLAIN.fullmatch(pattern):
        return _ends_with(target, pattern)
    starts = 1 | sum(1 << position + 1 for position, character in enumerate(target) if character == ".")
    return bool(read_expression(pattern).ends(target, starts) >> len(target))


def fits_behind_dot(pattern: str, target: str) -> bool:
    r"""Say whether LORA of PEFT before 0.15 did: `re.match(rf".*\.{pattern}$", target)`; raises as `fits` does."""
    if _PLAIN.fullmatch(pattern):
        return len(target) > len(pattern) and _ends_with(target, pattern)
    return bool(read_expression(rf".*\.{pattern}$").ends(target, 1))


def fits_unbound(pattern: str, target: str) -> bool:
    r"""Say whether LOHA of PEFT before 0.15 did: `re.match(rf"(.*\.)?{pattern}$", target)`; raises as `fits` does."""
    if _PLAIN.fullmatch(pattern):
        return _ends_with(target, pattern)
    return bool(read_expression(rf"(.*\.)?{pattern}$").ends(target, 1))


def fits_whole(pattern: str, target: str) -> bool:
    """Say whether all of `target` is as `pattern` says: `re.fullmatch(pattern, target)`; raises as `fits` does."""
    return bool(read_expression(pattern, flags=True).ends(target, 1) >> len(target))


def _ends_with(target: str, pattern: str) -> bool:
    """Compare a pattern without operators, in which a dot is any character, with the end of `target` behind a dot."""
    if not target.endswith(pattern.rpartition(".")[2]):  # Without a dot, and so word by word: most end here, at once.
        return False
    start = len(target) - len(pattern)
    if start < 0 or (start and target[start - 1] != "."):
        return False
    return all(wanted in (".", found) for wanted, found in zip(pattern, target[start:], strict=True))
