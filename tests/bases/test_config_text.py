"""Changing `config.json`: what is asked for and no other byte."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.bases._config_text import edit_config
from loraformat.errors import InputError

LLAMA = """{
  "architectures": [
    "LlamaForCausalLM"
  ],
  "rope_theta": 1e-05,
  "vocab_size": 32000,
  "torch_dtype": "bfloat16",
  "note": "\\"vocab_size\\": 1, é",
  "tie_word_embeddings": true
}
"""
VLM = """{
    "text_config": {
        "vocab_size": 7,
        "dtype": "float32"
    },
    "vision_config": {"vocab_size": 9},
    "model_type": "x"
}"""


def edit(text: str, **changes: Any) -> str:
    return edit_config(text.encode(), changes, "config.json").decode()


def test_only_the_value_changes() -> None:
    assert edit(LLAMA, vocab_size=32001) == LLAMA.replace("32000", "32001")
    assert edit(LLAMA, tie_word_embeddings=False) == LLAMA.replace("true", "false")
    assert edit(LLAMA) == LLAMA


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_number_form_has_two_names(name: str) -> None:
    assert edit(LLAMA, **{name: "float16"}) == LLAMA.replace("bfloat16", "float16")
    assert edit(VLM, **{name: "float16"}) == VLM.replace("float32", "float16")
    assert edit("{}", **{name: "float16"}) == "{}"


def test_a_member_of_the_language_model_is_changed_there() -> None:
    assert edit(VLM, vocab_size=8) == VLM.replace("7", "8")


def test_a_member_that_is_missing_is_added_in_the_file_s_own_style() -> None:
    assert edit(LLAMA, extra=[1, None]) == LLAMA.replace("true\n", 'true,\n  "extra": [1, null]\n')
    assert edit(VLM, tie_word_embeddings=False) == VLM.replace(
        '"float32"', '"float32",\n        "tie_word_embeddings": false'
    ).replace('"x"', '"x",\n    "tie_word_embeddings": false')
    assert edit("{}", a=1) == '{"a": 1}'
    assert edit(" { } ", a="b") == ' {"a": "b" } '
    assert edit('{"a": 1, "b": 2}', c=3) == '{"a": 1, "b": 2, "c": 3}'
    assert edit('{"a":1}', c=3) == '{"a":1,"c": 3}'


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "\ufeff{}"])
def test_what_is_no_strict_object_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        edit(text, a=1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text('a\\"{}[],: é\n', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["a", "vocab_size", "text_config", 'q"uo', "é\n", "dtype"])


@given(
    config=st.dictionaries(KEYS, VALUES, max_size=5),
    key=st.sampled_from(["vocab_size", "a", 'q"uo']),
    value=VALUES,
    indent=st.sampled_from([None, 0, 2, "\t"]),
    ascii_only=st.booleans(),
)
def test_the_text_means_what_was_asked_for(config: Any, key: str, value: Any, indent: Any, ascii_only: bool) -> None:
    text = json.dumps(config, indent=indent, ensure_ascii=ascii_only)
    found = json.loads(edit(text, **{key: value}))
    inner = config.get("text_config")
    parts = [config, *([inner] if isinstance(inner, dict) else [])]
    holders = [part for part in parts if key in part] or parts
    for part in holders:
        part[key] = value
        if value is None:  # It goes.
            del part[key]
    assert found == config
    assert list(found) == list(config)
