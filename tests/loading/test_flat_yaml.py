"""The plain values of YAML settings, against PyYAML where it reads the same."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loraformat.errors import LoraformatError
from loraformat.loading.flat_yaml import parse_flat_yaml

WHERE = Path("settings.yaml")


def parse(text: str) -> dict[str, Any]:
    return dict(parse_flat_yaml(text.encode(), WHERE))


SETTINGS = """# litgpt
checkpoint_dir: checkpoints/a/b
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_query: true
lora_key: false
precision: null
quoted: "a: b"  # and a word
single: 'c # d'
negative: -3
big: 1.5e-4
train:
  save_interval: 1000
  lora_r: 99
devices: 1 # one
list:
- a: 5
- 6
empty:
"""


def test_plain_values_of_the_top_level() -> None:
    theirs = yaml.safe_load(SETTINGS)
    expected = {name: value for name, value in theirs.items() if name not in ("train", "list", "empty")}
    assert parse(SETTINGS) == expected
    assert "save_interval" not in parse(SETTINGS)


def test_what_yaml_gives_a_meaning_is_passed_over() -> None:
    lines = ("a: &anchor 3", "b: *anchor", "c: !!python/object/apply:os.system [true]", "d: [1, 2]", "e: {f: 1}")
    assert parse("\n".join([*lines, "g: |", "  text"])) == {}


def test_json_is_yaml() -> None:
    assert parse('{"lora_r": 8, "nested": {"a": [1]}}') == {"lora_r": 8, "nested": {"a": [1]}}


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"a: 1\na: 2\n", "LF105"), (b"a: \xff\n", "LF103"), (b'{"a": 1, "a": 2}', "LF105"), (b'{"a": NaN}', "LF104")],
)
def test_refused(data: bytes, code: str) -> None:
    with pytest.raises(LoraformatError) as caught:
        parse_flat_yaml(data, WHERE)
    assert caught.value.codes == (code,)
    assert "settings.yaml" in caught.value.problems[0].where


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True).filter(
            lambda name: name.lower() not in ("yes", "no", "on", "off", "true", "false", "null", "y", "n")
        ),
        st.one_of(
            st.booleans(),
            st.none(),
            st.integers(-(10**17), 10**17),
            st.floats(allow_nan=False, allow_infinity=False),
        ),
    )
)
def test_what_pyyaml_writes(values: dict[str, Any]) -> None:
    text = yaml.safe_dump(values)
    assert parse(text) == {name: yaml.safe_load(text)[name] for name in values}


@given(st.text())
def test_any_text_is_values_or_an_error(text: str) -> None:
    try:
        parse_flat_yaml(text.encode("utf-8", "surrogatepass"), WHERE)
    except LoraformatError:
        return
