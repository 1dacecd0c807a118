"""Changing members of `config.json` and no other byte of it."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from loraformat.bases._tied_tables import INNER_CONFIGS
from loraformat.strict_json import JsonValue, parse_json_object

_DECODER: Final = json.JSONDecoder()
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_OTHER_NAMES: Final = {"dtype": "torch_dtype", "torch_dtype": "dtype"}
"""Two names of one setting: transformers renamed it in version 5."""


@dataclass(frozen=True, slots=True)
class _Member:
    """Where a member of an object stands in the text: the first characters of key and value, and the value's end."""

    key: str
    key_start: int
    start: int
    end: int


def edit_config(data: bytes, changes: Mapping[str, JsonValue], where: object) -> bytes:
    """Return the text of a configuration with `changes` made: order, indentation and other values stay as they are.

    A member is changed where it stands: at the top, in `text_config` or its like, or in both. One that stands nowhere
    is added in these places; the number form (`dtype`, or `torch_dtype` of old) is not, for without it the form is
    that of the weights. One whose new value is None is taken out.

    Args:
        data: the text, UTF-8.
        changes: members and their new values.
        where: what the text is, for messages.

    Raises:
        InputError: LF103, LF104, LF105 no strict JSON object.
    """
    parse_json_object(data, where)
    text = data.decode("utf-8")
    for key, value in changes.items():
        text = _change(text, key, value)
    return text.encode("utf-8")


def _change(text: str, key: str, value: JsonValue) -> str:
    objects = [list(_walk(text, start)) for start in _find_objects(text)]
    names = {key, _OTHER_NAMES.get(key, key)}
    places = [member for members in objects for member in members if member.key in names]
    if value is None:
        edits = [_cut(text, members, index) for members in objects for index, m in enumerate(members) if m.key == key]
    elif places:
        edits = [(member.start, member.end, json.dumps(value)) for member in places]
    elif key in _OTHER_NAMES:
        edits = []
    else:
        starts = _find_objects(text)
        edits = [_insert(text, start, members, key, value) for start, members in zip(starts, objects, strict=True)]
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _cut(text: str, members: list[_Member], index: int) -> tuple[int, int, str]:
    """Return the edit that takes out a member, with the comma before it, or after it where it is the first."""
    if index:
        return members[index - 1].end, members[index].end, ""
    return members[0].key_start, members[1].key_start if len(members) > 1 else members[0].end, ""


def _find_objects(text: str) -> list[int]:
    """Return where the outermost object and the inner ones begin."""
    top = _skip(text, 0)
    inner = [member.start for member in _walk(text, top) if member.key in INNER_CONFIGS and text[member.start] == "{"]
    return [top, *inner]


def _walk(text: str, start: int) -> Iterator[_Member]:
    """Yield the members of the object that begins at `start` of a sound text."""
    position = _skip(text, start + 1)
    while text[position] != "}":
        key_start = _skip(text, position + 1) if text[position] == "," else position
        key, after = _DECODER.raw_decode(text, key_start)
        value_start = _skip(text, _skip(text, after) + 1)
        _, end = _DECODER.raw_decode(text, value_start)
        yield _Member(key, key_start, value_start, end)
        position = _skip(text, end)


def _insert(text: str, start: int, members: list[_Member], key: str, value: JsonValue) -> tuple[int, int, str]:
    """Return the edit that adds a member at the end of an object, with the spaces that its first one has."""
    written = f"{json.dumps(key)}: {json.dumps(value)}"
    if not members:
        return start + 1, start + 1, written
    first, last = members[0], members[-1]
    return last.end, last.end, "," + (text[start + 1 : first.key_start] or " " * (len(members) > 1)) + written


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None, "it matches nothing at least"
    return found.end()
