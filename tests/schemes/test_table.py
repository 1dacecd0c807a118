"""The engine behind tables of names."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.schemes._table import NameTable, Row
from loraformat.schemes.peft import TABLE

ROWS = [
    Row("down.weight", "k", "A"),
    Row("down.{adapter}.weight", "k", "A"),
    Row("up.weight", "k", "B"),
    Row("+literal*", "odd", "odd"),
    Row("weight", "rest", "W"),
]
NAMES = NameTable(ROWS)


@pytest.mark.parametrize(
    ("key", "target", "role"),
    [
        ("a.b.down.weight", "a.b", "A"),
        ("a.b.down.default.weight", "a.b", "A"),
        ("a.down.up.weight", "a", "A"),  # an adapter called `up`
        ("a.down.down.weight", "a", "A"),
        ("a.down.x.y.weight", "a.down.x.y", "W"),
        ("a.+literal*", "a", "odd"),
        ("a\nb.up.weight", "a\nb", "B"),
        ("a.downXweight.weight", "a.downXweight", "W"),
    ],
)
def test_keys_are_read(key: str, target: str, role: str) -> None:
    name = NAMES.read(key)
    assert name is not None
    assert (name.target, name.row.role) == (target, role)


@pytest.mark.parametrize(
    "key", ["", ".", "down.weight.x", ".down.weight.", "a.weights", "weight", "a.down", "a.literal"]
)
def test_other_keys_are_not(key: str) -> None:
    assert NAMES.read(key) is None


def test_a_key_needs_a_target() -> None:
    assert NAMES.read("up.weight") is not None  # The module `up`, whose tensor is `weight`.
    assert NAMES.read("up.weight").target == "up"
    assert NAMES.read(".up.weight") is None or NAMES.read(".up.weight").target == ".up"


def test_the_first_row_of_a_role_is_written() -> None:
    assert NAMES.write("a.b", "A") == "a.b.down.weight"
    assert NAMES.write("a.b", "W") == "a.b.weight"


@pytest.mark.parametrize("role", ["C", "", "down.weight"])
def test_a_role_that_the_table_lacks_is_not_written(role: str) -> None:
    with pytest.raises(KeyError):
        NAMES.write("a.b", role)


def test_a_row_with_a_gap_is_never_written() -> None:
    with pytest.raises(KeyError):
        NameTable([Row("down.{adapter}.weight", "k", "A")]).write("a", "A")


PARTS = st.lists(st.text("ab_0-", min_size=1, max_size=4), min_size=1, max_size=4).map(".".join)


@given(target=PARTS, row=st.sampled_from([row for row in TABLE.rows if "{" not in row.pattern]))
def test_what_peft_writes_reads_as_it_was_meant(target: str, row: Row) -> None:
    name = TABLE.read(f"{target}.{row.pattern}")
    assert name is not None
    assert (name.target, name.row) == (target, row)


@given(target=PARTS, row=st.sampled_from(TABLE.rows), adapter=st.text("abc_1-", min_size=1, max_size=5))
def test_an_adapters_own_name_does_not_matter(target: str, row: Row, adapter: str) -> None:
    name = TABLE.read(f"{target}.{row.pattern.format(adapter=adapter)}")
    assert name is not None
    assert (name.target, name.row.role, name.row.kind) == (target, row.role, row.kind)


def test_long_hostile_keys_take_no_time() -> None:
    started = time.perf_counter()
    for key in ("a." * 2000 + "x", "lora_A." * 580 + "x", "lora_B.a" * 500, "." * 4096):
        assert TABLE.read(key) is None
    assert time.perf_counter() - started < 1
