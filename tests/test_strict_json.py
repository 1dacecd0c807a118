import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.errors import InputError
from loraformat.limits import MAX_JSON_DEPTH, MAX_JSON_INTEGER_DIGITS
from loraformat.strict_json import parse_json, parse_json_object, write_canonical

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**19), 10**19)
    | st.floats(allow_nan=False, allow_infinity=False).filter(
        lambda number: number != 0 or math.copysign(1, number) > 0
    )
    | st.text(st.characters(codec="utf-8")),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), children),
    max_leaves=15,
)

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
    assert again == value
    assert write_canonical(again) == text


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers(0, 9), min_size=2))
def test_the_order_of_keys_does_not_matter(value: dict[str, int]) -> None:
    assert write_canonical(value) == write_canonical(dict(reversed(value.items())))


def test_the_canonical_text_is_this() -> None:
    value = {"b": [1, 2.5, True, None], "a": {"é": '"\\\n\x1f'}, "A": MappingProxyType({"z": (), "y": 1e-7})}
    assert isinstance(value["A"], Mapping)
    assert (
        write_canonical(value)
        == '{"A":{"y":1e-07,"z":[]},"a":{"é":"\\"\\\\\\n\\u001f"},"b":[1,2.5,true,null]}'.encode()
    )


@pytest.mark.parametrize("value", [math.nan, [math.inf], {"a": -math.inf}, "\ud800"], ids=repr)
def test_what_json_cannot_say_is_not_written(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant|surrogates"):
        write_canonical(value)


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object()], ids=["bytes", "set", "object"])
def test_what_is_no_json_value_is_not_written(value: Any) -> None:
    with pytest.raises(TypeError, match="no JSON form"):
        write_canonical([value])
