"""The plain values at the top of a YAML file, which is all that is wanted of trainers' settings.

A line `name: value` without an indent is one; nested parts, lists and blocks are passed over. YAML that is JSON is read
as JSON. No tag, alias or anchor is followed, so a file can do nothing but state values.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from loraformat.errors import refuse
from loraformat.strict_json import JsonValue, parse_json_object

_LINE: Final = re.compile(
    r"""([A-Za-z_][\w.-]*):[ \t]+(?:"([^"\\]*)"|'([^']*)'|([^\s#&*!|>{\[][^#\n]*?))[ \t]*(?:#.*)?"""
)
_WORDS: Final[Mapping[str, JsonValue]] = {"true": True, "false": False, "null": None, "~": None}
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.?[0-9]+)(?:[eE][+-]?[0-9]+)?")


def parse_flat_yaml(data: bytes, where: Path) -> Mapping[str, JsonValue]:
    """Return the plain values at the top level of a YAML text.

    Raises:
        InputError: LF103 not UTF-8, LF105 a name twice; for JSON as `parse_json_object` has it.
    """
    if data.lstrip().startswith(b"{"):
        return parse_json_object(data, where)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse("LF103", where, f"byte {error.start} is not UTF-8", "UTF-8 text") from error
    values: dict[str, JsonValue] = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        if match[1] in values:
            raise refuse("LF105", where, f"the name {match[1]!r} stands twice", "each name once")
        values[match[1]] = _read_scalar(match[4]) if match[4] is not None else match[2] or match[3] or ""
    return values


def _read_scalar(word: str) -> JsonValue:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if _INTEGER.fullmatch(word):
        return int(word)
    return float(word) if _NUMBER.fullmatch(word) and abs(float(word)) < float("inf") else word
