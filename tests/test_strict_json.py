import json
import math
import struct
from dataclasses import asdict, dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.errors import InputError
from loraformat.limits import MAX_JSON_DEPTH, MAX_JSON_INTEGER_DIGITS
from loraformat.strict_json import JsonValue, as_object, parse_json, parse_json_object, write_canonical

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXTS, children, max_size=4),
    max_leaves=15,
)


def with_floats(value: Any) -> Any:
    """Return `value` with every number as a 64-bit float: JSON has no other kind."""
    if isinstance(value, list):
        return [with_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: with_floats(item) for key, item in value.items()}
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


REFUSED = {
    "LF103": [b'"\xff"', b"\xfe\xff", '"ü"'.encode("latin-1"), b'"\xed\xa0\x80"', '{"a":1}'.encode("utf-16")],
    "LF104": [
        b"",
        b" ",
        b"{",
        b"{]",
        b"{'a':1}",
        b'{"a":1,}',
        b"[1 2]",
        b"01",
        b"+1",
        b".5",
        b"1.",
        b"0x1",
        b"nul",
        b"{}{}",
        b"{} x",
        b"{}\0",
        b"// a remark\n1",
        b'"\x01"',
        b'"tab\there"',
        b'"\\x41"',
        b"NaN",
        b"[Infinity]",
        b'{"a":-Infinity}',
        b"1e999",
        b"-1e999",
        b'"\\ud800"',
        b'{"\\udc00":1}',
        b'["a","\\ud83d x"]',
        b"\xef\xbb\xbf{}",
        b"9" * (MAX_JSON_INTEGER_DIGITS + 1),
        b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1),
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" * 1_000_000,
    ],
    "LF105": [
        b'{"a":1,"a":1}',
        b'{"a":1,"\\u0061":2}',
        b'[{"x":{"b":1,"c":2,"b":3}}]',
        b'{"":1,"":2}',
    ],
}


@pytest.mark.parametrize(
    ("code", "text"),
    [(code, text) for code, texts in REFUSED.items() for text in texts],
    ids=lambda value: repr(value)[:24] if isinstance(value, bytes) else value,
)
def test_what_readers_disagree_about_is_refused(code: str, text: bytes) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(text, "somewhere")
    assert caught.value.codes == (code,)
    assert caught.value.problems[0].where == "somewhere"


def test_the_key_that_stands_twice_is_named() -> None:
    with pytest.raises(InputError) as caught:
        parse_json(b'{"a":0,"the one":1,"b":2,"the one":3}', "x")
    assert "'the one'" in caught.value.problems[0].found


def test_many_keys_and_one_twice_take_no_quadratic_time() -> None:
    text = b"{" + b",".join(b'"%d":0' % number for number in range(300_000)) + b',"299999":0}'
    with pytest.raises(InputError) as caught:
        parse_json(text, "x")
    assert caught.value.codes == ("LF105",)


def test_equal_keys_in_different_objects_are_fine() -> None:
    assert parse_json(b'{"a":{"a":[{"a":1},{"a":2}]}}', "x") == {"a": {"a": [{"a": 1}, {"a": 2}]}}


def test_the_caps_hold_at_their_edges() -> None:
    digits = b"9" * MAX_JSON_INTEGER_DIGITS
    assert parse_json(digits, "x") == int(digits)
    deepest = b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH
    assert isinstance(parse_json(deepest, "x"), list)
    scalar_below = b"[" * (MAX_JSON_DEPTH - 1) + b"1" + b"]" * (MAX_JSON_DEPTH - 1)
    assert isinstance(parse_json(scalar_below, "x"), list)


def test_numbers_keep_their_kind() -> None:
    values: Any = parse_json(b"[1,1.0,1e2,-0,-0.0,true,18446744073709551615]", "x")
    assert [type(value) for value in values] == [int, float, float, float, float, bool, int]
    assert math.copysign(1, values[3]) == -1
    assert values[-1] == 2**64 - 1


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"', "x") == "\U0001f600"


@pytest.mark.parametrize("text", [b"[]", b"1", b'"{}"', b"null"])
def test_an_object_is_asked_for(text: bytes) -> None:
    with pytest.raises(InputError) as caught:
        parse_json_object(text, "x")
    assert caught.value.codes == ("LF104",)
    assert parse_json_object(b' {"a": 1}\n', "x") == {"a": 1}


@given(VALUES)
def test_what_is_written_reads_back_and_writes_the_same(value: Any) -> None:
    text = write_canonical(value)
    again = parse_json(text, "x")
    assert with_floats(again) == with_floats(value)
    assert write_canonical(again) == text


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 9), min_size=2))
def test_the_order_of_keys_does_not_matter(value: dict[str, int]) -> None:
    assert write_canonical(value) == write_canonical(dict(reversed(value.items())))


def test_the_canonical_text_is_this() -> None:
    value = {"b": [1, 2.5, True, None], "a": {"é": '"\\\n\x1f'}, "A": MappingProxyType({"z": (), "y": 1e-7, "x": 3.0})}
    text = '{"A":{"x":3,"y":1e-7,"z":[]},"a":{"é":"\\"\\\\\\n\\u001f"},"b":[1,2.5,true,null]}'
    assert write_canonical(value) == text.encode()


def test_keys_are_sorted_as_rfc_8785_has_it() -> None:
    """By UTF-16 code units: an emoji, which is two of them, comes before U+FB33."""
    keys = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\x80", "\u00f6"]
    written = write_canonical(dict.fromkeys(keys, 0)).decode()
    positions = [
        written.index(json.dumps(key, ensure_ascii=False)) for key in ("\r", "1", *keys[5:], *keys[:1], *keys[4:5])
    ]
    assert positions == sorted(positions)
    assert written.index("\U0001f600") < written.index("\ufb33")


# RFC 8785, appendix B.
NUMBERS_OF_THE_RFC = {
    "0000000000000000": "0",
    "8000000000000000": "0",
    "0000000000000001": "5e-324",
    "8000000000000001": "-5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308",
    "ffefffffffffffff": "-1.7976931348623157e+308",
    "4340000000000000": "9007199254740992",
    "c340000000000000": "-9007199254740992",
    "4430000000000000": "295147905179352830000",
    "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23",
    "44b52d02c7e14af7": "1.0000000000000001e+23",
    "444b1ae4d6e2ef4e": "999999999999999700000",
    "444b1ae4d6e2ef4f": "999999999999999900000",
    "444b1ae4d6e2ef50": "1e+21",
    "3eb0c6f7a0b5ed8c": "9.999999999999997e-7",
    "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332",
    "41b3de4355555554": "333333333.33333325",
    "41b3de4355555555": "333333333.3333333",
    "41b3de4355555556": "333333333.3333334",
    "41b3de4355555557": "333333333.33333343",
    "becbf647612f3696": "-0.0000033333333333333333",
    "43143ff3c1cb0959": "1424953923781206.2",
}


@pytest.mark.parametrize("bits", NUMBERS_OF_THE_RFC)
def test_numbers_are_written_as_rfc_8785_has_it(bits: str) -> None:
    (number,) = struct.unpack(">d", bytes.fromhex(bits))
    assert write_canonical(number).decode() == NUMBERS_OF_THE_RFC[bits]


@pytest.mark.parametrize(
    "value", [math.nan, [math.inf], {"a": -math.inf}, "\ud800", 2**53 + 1, 10**400], ids=lambda v: repr(v)[:20]
)
def test_what_json_cannot_say_is_not_written(value: Any) -> None:
    with pytest.raises(ValueError, match=r"JSON has no number|surrogates"):
        write_canonical(value)


def test_what_is_no_json_value_is_not_written() -> None:
    with pytest.raises(TypeError):
        write_canonical(cast(JsonValue, [object()]))


class Word(StrEnum):
    ONE = "one"


@dataclass(frozen=True, slots=True)
class Leaf:
    number: float
    word: Word = Word.ONE


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    lists: list[Any]
    table: dict[str, Any]
    leaf: Leaf | None = None


@given(NUMBERS, VALUES)
def test_records_become_what_the_library_makes_of_them(number: float, value: Any) -> None:
    leaf = Leaf(number)
    for tree in (Tree((leaf, leaf), [leaf, value], {"a": value}), Tree((), [], {}, leaf)):
        record = as_object(tree)
        assert record == asdict(tree)
        assert write_canonical(record) == write_canonical(asdict(tree))
        assert record["lists"] is not tree.lists
        assert record["table"] is not tree.table
