"""Key-values of GGUF files and their JSON text.

A value whose type follows from its JSON is bare: text, true, 16.0 (float32), 7 (uint32), -7 (int32), lists of int32.
Any other type is said: `{"uint64": 7}`. Long lists are counted: `{"array": "string", "count": 32000}`. So the text of
every value but those can be written back as it was. Source: `docs/gguf.md` of ggml, and gguf.cpp where it is stricter.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from loraformat.errors import refuse
from loraformat.limits import MAX_GGUF_HEAD_BYTES, MAX_LISTED_VALUES, MAX_METADATA_BYTES
from loraformat.spans import InputFile
from loraformat.strict_json import JsonValue

_ARRAY: Final = 9
_STRING: Final = 8
_CHUNK_BYTES: Final = 1 << 18
_FORMS: Final[Mapping[int, tuple[str, str]]] = {
    0: ("uint8", "<B"),
    1: ("int8", "<b"),
    2: ("uint16", "<H"),
    3: ("int16", "<h"),
    4: ("uint32", "<I"),
    5: ("int32", "<i"),
    6: ("float32", "<f"),
    7: ("bool", "<B"),
    8: ("string", ""),
    10: ("uint64", "<Q"),
    11: ("int64", "<q"),
    12: ("float64", "<d"),
}
"""Number in `enum gguf_type`, name, and layout."""

_NUMBERS: Final = {name: number for number, (name, _) in _FORMS.items()}


class Cursor:
    """Reads a file front to back; each length is compared with what the file has left before it is used."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.position = 0
        self._chunk = b""
        self._chunk_start = 0

    def take(self, length: int) -> bytes:
        """Return the next `length` bytes."""
        self._require(length)
        begin = self.position - self._chunk_start
        if begin + length > len(self._chunk):
            size = min(max(length, _CHUNK_BYTES), self.file.size_bytes - self.position)
            self._chunk, self._chunk_start, begin = self.file.read(self.position, size), self.position, 0
        self.position += length
        return self._chunk[begin : begin + length]

    def skip(self, length: int) -> None:
        """Go on by `length` bytes."""
        self._require(length)
        self.position += length

    def number(self, form: str) -> Any:
        """Return the next number, in `struct`'s notation."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, what: str) -> str:
        """Return the next string; LF103 when it is not UTF-8."""
        length = self.number("<Q")
        if length > MAX_METADATA_BYTES:
            raise refuse("LF110", self.file.path, f"{what} of {length} bytes", f"at most {MAX_METADATA_BYTES}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise refuse("LF103", f"{self.file.path}, {what}", "bytes that are not UTF-8", "UTF-8 text") from error

    def _require(self, length: int) -> None:
        left = self.file.size_bytes - self.position
        if length > left:
            found = f"{length} bytes due at byte {self.position}"
            raise refuse("LF101", self.file.path, found, f"at most the {left} bytes that the file has left")
        if self.position + length > MAX_GGUF_HEAD_BYTES:
            raise refuse("LF110", self.file.path, "a longer head", f"at most {MAX_GGUF_HEAD_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class _Value:
    form: str
    content: Any


def read_value(cursor: Cursor, key: str) -> str:
    """Return the JSON text of the value that stands next."""
    where = f"{cursor.file.path}, key {key!r}"
    number = cursor.number("<I")
    if number == _ARRAY:
        return _read_array(cursor, where)
    value = _Value(_name_form(number, where), _read_scalar(cursor, number, where))
    natural = _infer(value.content)
    if natural == value.form and _is_json(value.content):
        return _dump(value.content)
    return _dump({value.form: value.content if _is_json(value.content) else str(value.content)})


def _read_array(cursor: Cursor, where: str) -> str:
    number, count = cursor.number("<I"), cursor.number("<Q")
    form = _name_form(number, where)
    if count > MAX_LISTED_VALUES:
        _skip_items(cursor, number, count)
        return _dump({"array": form, "count": count})
    items = [_read_scalar(cursor, number, where) for _ in range(count)]
    if items and form in {"string", "bool", "float32", "int32"} and all(map(_is_json, items)):
        return _dump(items)
    return _dump({"array": form, "items": [item if _is_json(item) else str(item) for item in items]})


def _skip_items(cursor: Cursor, number: int, count: int) -> None:
    if number != _STRING:
        cursor.skip(count * struct.calcsize(_FORMS[number][1]))
        return
    for _ in range(count):
        cursor.skip(int.from_bytes(cursor.take(8), "little"))


def _name_form(number: int, where: str) -> str:
    if number not in _FORMS:
        found = "a list of lists" if number == _ARRAY else f"a value of type {number}"
        raise refuse("LF109", where, found, f"one of {', '.join(_NUMBERS)}, or a list of these")
    return _FORMS[number][0]


def _read_scalar(cursor: Cursor, number: int, where: str) -> Any:
    name, layout = _FORMS[number]
    if number == _STRING:
        return cursor.text("a value")
    value = cursor.number(layout)
    if name == "bool":
        if value > 1:
            raise refuse("LF109", where, f"the truth value {value}", "0 or 1")
        return bool(value)
    return float(str(np.float32(value))) if name == "float32" else value


def _infer(value: Any) -> str:
    """Return the form that a bare JSON value means."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "uint32" if value >= 0 else "int32"
    if not isinstance(value, float | str):
        raise TypeError(type(value).__name__)
    return "float32" if isinstance(value, float) else "string"


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write_value(key: str, value: JsonValue) -> bytes:
    """Return a key and its value as bytes.

    Raises:
        InputError: LF130 what is no value: null, a number outside its form, a list that was only counted.
    """
    try:
        return _frame(key) + _write_parsed(value)
    except (ValueError, TypeError, LookupError, struct.error, OverflowError) as error:
        expected = "one value, with its form where it is not plain"
        raise refuse("LF130", f"key {key!r}", f"{value!r:.100}", expected) from error


def _write_parsed(value: Any) -> bytes:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _write_list("int32" if type(value[0]) is int else _infer(value[0]), value)
    if isinstance(value, Mapping) and "array" in value:
        return _write_list(value["array"], value["items"])
    if isinstance(value, Mapping):
        ((form, content),) = value.items()
        return struct.pack("<I", _NUMBERS[form]) + _write_scalar(form, content)
    return struct.pack("<I", _NUMBERS[_infer(value)]) + _write_scalar(_infer(value), value)


def _write_list(form: str, items: Sequence[Any]) -> bytes:
    head = struct.pack("<IIQ", _ARRAY, _NUMBERS[form], len(items))
    return head + b"".join(_write_scalar(form, item) for item in items)


def _write_scalar(form: str, value: Any) -> bytes:
    if (form == "string") is not isinstance(value, str) and form not in {"float32", "float64"}:
        raise TypeError(form)
    if form == "string":
        return _frame(value)
    if form in {"float32", "float64"}:  # "nan" and "inf" are text, since JSON has no number for them.
        value = float(value)
    return struct.pack(_FORMS[_NUMBERS[form]][1], value)


def _frame(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
