"""What records hold is as unchangeable as they are, and goes where they go."""

import pickle
from copy import copy, deepcopy

import pytest

from loraformat.adapter import Adapter
from loraformat.frozen_mapping import FrozenMapping


def test_it_is_a_mapping_that_nobody_changes() -> None:
    entries = {"b": 1, "a": [2]}
    frozen = FrozenMapping(entries)
    entries["b"] = 3
    assert frozen == {"b": 1, "a": [2]} != entries
    assert (list(frozen), len(frozen), repr(frozen)) == (["b", "a"], 2, "{'b': 1, 'a': [2]}")
    with pytest.raises(TypeError):
        frozen["b"] = 3  # type: ignore[index]
    assert FrozenMapping() == {}


def test_it_is_pickled_and_copied() -> None:
    frozen = FrozenMapping({"a": [2]})
    for again in (pickle.loads(pickle.dumps(frozen)), copy(frozen), deepcopy(frozen)):
        assert (type(again), again) == (FrozenMapping, frozen)
    assert deepcopy(frozen)["a"] is not frozen["a"]


def test_what_a_record_has_by_default_belongs_to_nobody() -> None:
    adapter = Adapter(targets=())
    with pytest.raises(TypeError):
        adapter.metadata["author"] = "me"  # type: ignore[index]
