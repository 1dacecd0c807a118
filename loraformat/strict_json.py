"""JSON without surprises: what I-JSON (RFC 7493) forbids is refused, and writing is canonical.

Python's parser keeps the last of two equal keys, accepts `NaN` and turns `1e999` into infinity. A header that two
readers read differently is a way to hide something, so all of these are errors here.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from decimal import Decimal
from json.encoder import encode_basestring
from typing import Any, Final, NoReturn, TypeAlias, cast

from loraformat.errors import LoraformatError, refuse
from loraformat.limits import MAX_JSON_DEPTH, MAX_JSON_INTEGER_DIGITS

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"

_WORDS: Final = {None: "null", True: "true", False: "false"}
_SIMPLE: Final = frozenset({str, int, float, bool, type(None)})
_NESTING: Final = frozenset({dict, list})
_ODD_INTEGER: Final = re.compile(rf"-0(?![0-9.eE])|[0-9]{{{MAX_JSON_INTEGER_DIGITS + 1}}}")
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
"""What `parse_json` must look at itself: most texts have neither, and a header may have a million numbers."""
_LEAST_FIXED: Final = 1e-4
_MOST_FIXED: Final = 1e15
"""Between them Python writes the shortest digits as ECMAScript does, but for a final `.0`."""
_EXACT_INTEGERS: Final = 1 << 53
"""Beyond it not every integer is a 64-bit float, which is all that many JSON readers have."""


def parse_json(data: bytes, where: object) -> JsonValue:
    """Parse UTF-8 JSON strictly.

    Args:
        data: the text, UTF-8 without byte order mark.
        where: what the text is, for messages.

    Raises:
        InputError: LF103 not UTF-8, LF104 not strict JSON, LF105 duplicate key.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse("LF103", where, f"byte {error.start} is not UTF-8", "UTF-8 text") from error
    try:
        value: JsonValue = json.loads(
            text,
            object_pairs_hook=lambda pairs: _unique(pairs, where),
            parse_constant=lambda word: _refuse_constant(word, where),
            parse_int=(lambda digits: _parse_integer(digits, where)) if _ODD_INTEGER.search(text) else int,
            parse_float=lambda digits: _parse_float(digits, where),
        )
    except LoraformatError:
        raise
    except RecursionError as error:
        raise refuse("LF104", where, "values nested too deep", f"at most {MAX_JSON_DEPTH} levels") from error
    except ValueError as error:
        raise refuse("LF104", where, str(error), "JSON") from error
    _check_depth(value, where)
    if _SURROGATE.search(text):
        _check_texts(value, where)
    return value


def parse_json_object(data: bytes, where: object) -> Mapping[str, JsonValue]:
    """Parse UTF-8 JSON whose outermost value must be an object; raises as `parse_json` does."""
    value = parse_json(data, where)
    if not isinstance(value, Mapping):
        raise refuse("LF104", where, f"a JSON {type(value).__name__}", "a JSON object")
    return value


def parse_lasting_object(data: bytes, where: object) -> Mapping[str, JsonValue]:
    """Parse an object that is to be written again as it is; LF104 too for a number that `write_canonical` refuses."""
    value = parse_json_object(data, where)
    try:
        write_canonical(value)
    except ValueError as error:
        raise refuse("LF104", where, str(error), "numbers that JSON readers hold") from error
    return value


def write_canonical(value: JsonValue) -> bytes:
    """Return the one canonical text of `value`, UTF-8: the JSON Canonicalization Scheme (RFC 8785).

    Keys are sorted by UTF-16 code units, numbers written as ECMAScript does, so that writers in other languages make
    the same bytes.

    Raises:
        ValueError: NaN, infinity, or an integer that a 64-bit float does not hold.
    """
    return _write(value).encode("utf-8")


def as_object(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, and of those in it, as `dataclasses.asdict` does; shares what is immutable."""
    return {name: _as_value(getattr(record, name)) for name in record.__dataclass_fields__}


def _as_value(value: Any) -> Any:
    form = type(value)
    if form in _SIMPLE:
        return value
    if form is tuple or form is list:
        return form(map(_as_value, value))
    return as_object(value) if hasattr(form, "__dataclass_fields__") else deepcopy(value)


def _write(value: JsonValue) -> str:
    form = type(value)
    if form is str:
        return encode_basestring(cast(str, value))
    if form is int or form is float:
        return _write_number(cast(float, value))
    if form is not dict and form is not list and form is not tuple:
        return _write_other(value)
    if form is not dict:
        return f"[{','.join(map(_write, cast(Sequence[JsonValue], value)))}]"
    return _write_object(cast(Mapping[str, JsonValue], value))


def _write_other(value: JsonValue) -> str:
    """Write what is of none of the usual types: null, truth, and types that are like one of the others."""
    if value is None or isinstance(value, bool):
        return _WORDS[value]
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, int | float):
        return _write_number(value)
    return _write_object(value) if isinstance(value, Mapping) else f"[{','.join(map(_write, value))}]"


def _write_object(value: Mapping[str, JsonValue]) -> str:
    plain = all(map(str.isascii, value))  # Then code units are in the order of the characters.
    ordered = sorted(value.items(), key=_key_of if plain else _utf_16)
    return f"{{{','.join([f'{encode_basestring(key)}:{_write(item)}' for key, item in ordered])}}}"


def _key_of(item: tuple[str, JsonValue]) -> str:
    return item[0]


def _utf_16(item: tuple[str, JsonValue]) -> bytes:
    return item[0].encode("utf-16-be", "surrogatepass")


def _write_number(value: int | float) -> str:
    """Return a number as ECMAScript's Number.prototype.toString does (ECMA-262, 6.1.6.1.20)."""
    if isinstance(value, int) and abs(value) < _EXACT_INTEGERS:
        return str(value)
    number = float(value) if abs(value) <= sys.float_info.max else math.nan
    if number == value and _LEAST_FIXED <= abs(number) < _MOST_FIXED:
        return str(int(number)) if number.is_integer() else repr(number)
    sign, digits, exponent = Decimal(repr(number)).as_tuple()
    if not isinstance(exponent, int):
        raise ValueError(f"JSON has no number {value!r}")
    text = "".join(map(str, digits)).rstrip("0")
    if not text:
        return "0"
    text = ("-" if sign else "") + _place_point(text, len(digits) + exponent)
    # The shortest digits of a large float, read back as an integer, are near it and not equal to it.
    if number != value and text != str(value):
        raise ValueError(f"JSON has no number {value!r}")
    return text


def _place_point(digits: str, point: int) -> str:
    """Return shortest `digits` with the decimal point after `point` of them, as ECMAScript places it."""
    if len(digits) <= point <= 21:
        return digits.ljust(point, "0")
    if 0 < point <= 21:
        return f"{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{digits[0]}{fraction}e{point - 1:+d}"


def _unique(pairs: list[tuple[str, JsonValue]], where: object) -> dict[str, JsonValue]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise refuse("LF105", where, f"key {twice!r} stands twice in one object", "each key once")
    return found


def _refuse_constant(word: str, where: object) -> NoReturn:
    raise refuse("LF104", where, f"the literal {word}", "a finite number")


def _parse_integer(digits: str, where: object) -> int | float:
    if digits == "-0":  # As other parsers have it: an int has no negative zero.
        return -0.0
    length = len(digits.removeprefix("-"))
    if length > MAX_JSON_INTEGER_DIGITS:
        raise refuse("LF104", where, f"an integer of {length} digits", f"at most {MAX_JSON_INTEGER_DIGITS}")
    return int(digits)


def _parse_float(digits: str, where: object) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise refuse("LF104", where, f"the number {digits}, which no float64 holds", "a finite number")
    return value


def _check_depth(value: JsonValue, where: object) -> None:
    """Refuse objects and lists nested beyond the cap."""
    level = [value] if type(value) in _NESTING else []
    for _ in range(MAX_JSON_DEPTH):
        level = [child for item in level for child in _list_children(item) if type(child) in _NESTING]
    if level:
        raise refuse("LF104", where, "values nested too deep", f"at most {MAX_JSON_DEPTH} levels")


def _check_texts(value: JsonValue, where: object) -> None:
    """Refuse strings that are not Unicode text (lone surrogates)."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            _check_text(item, where)
        elif type(item) in _NESTING:
            pending += cast("Iterable[JsonValue]", item)
            pending += _list_children(item) if isinstance(item, dict) else ()


def _list_children(item: JsonValue) -> Iterable[JsonValue]:
    return item.values() if isinstance(item, dict) else cast("Iterable[JsonValue]", item)


def _check_text(text: str, where: object) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise refuse("LF104", where, f"the string {text!r} with a lone surrogate", "Unicode text") from error
