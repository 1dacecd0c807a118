"""JSON without surprises: what I-JSON (RFC 7493) forbids is refused, and writing is canonical.

Python's parser keeps the last of two equal keys, accepts `NaN` and turns `1e999` into infinity. A header that two
readers read differently is a way to hide something, so all of these are errors here.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeAlias

from loraformat.errors import LoraformatError, refuse
from loraformat.limits import MAX_JSON_DEPTH, MAX_JSON_INTEGER_DIGITS

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"


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
            parse_int=lambda digits: _parse_integer(digits, where),
            parse_float=lambda digits: _parse_float(digits, where),
        )
    except LoraformatError:
        raise
    except RecursionError as error:
        raise refuse("LF104", where, "values nested too deep", f"at most {MAX_JSON_DEPTH} levels") from error
    except ValueError as error:
        raise refuse("LF104", where, str(error), "JSON") from error
    _check_depth_and_text(value, where)
    return value


def parse_json_object(data: bytes, where: object) -> Mapping[str, JsonValue]:
    """Parse UTF-8 JSON whose outermost value must be an object; raises as `parse_json` does."""
    value = parse_json(data, where)
    if not isinstance(value, Mapping):
        raise refuse("LF104", where, f"a JSON {type(value).__name__}", "a JSON object")
    return value


def write_canonical(value: JsonValue) -> bytes:
    """Return the one canonical text of `value`: keys sorted, no blanks, UTF-8, shortest numbers.

    The same value gives the same bytes on every machine; NaN and infinity raise ValueError.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_as_builtin
    )
    return text.encode("utf-8")


def _as_builtin(value: object) -> dict[str, JsonValue] | list[JsonValue]:
    """Return a read-only mapping or another sequence as what the json module knows."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


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
    if len(digits) > MAX_JSON_INTEGER_DIGITS:
        raise refuse("LF104", where, f"an integer of {len(digits)} digits", f"at most {MAX_JSON_INTEGER_DIGITS}")
    return int(digits)


def _parse_float(digits: str, where: object) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise refuse("LF104", where, f"the number {digits}, which no float64 holds", "a finite number")
    return value


def _check_depth_and_text(value: JsonValue, where: object) -> None:
    """Refuse nesting beyond the cap and strings that are not Unicode text (lone surrogates)."""
    pending: list[tuple[JsonValue, int]] = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_JSON_DEPTH:
            raise refuse("LF104", where, "values nested too deep", f"at most {MAX_JSON_DEPTH} levels")
        if isinstance(item, str):
            _check_text(item, where)
        elif isinstance(item, Mapping):
            for key, child in item.items():
                _check_text(key, where)
                pending.append((child, depth + 1))
        elif isinstance(item, Sequence):
            pending.extend((child, depth + 1) for child in item)


def _check_text(text: str, where: object) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise refuse("LF104", where, f"the string {text!r} with a lone surrogate", "Unicode text") from error
