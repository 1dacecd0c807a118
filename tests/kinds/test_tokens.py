"""Trained tokens: their rows take the place of the table's, and nothing else changes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import MapExample, MappingKindLaws, whole
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds import Nature
from loraformat.kinds.tokens import KIND

ROWS, TABLE = "trainable_tokens_delta", "base_layer.weight"
ONE = Scaling(ScalingRule.MULTIPLIER, 1.0)


def make_target(indices: Any, scaling: Scaling = ONE, rank: int = 0, **arrays: NDArray[Any]) -> Target:
    roles = {"rows": ROWS, "table": TABLE}
    factors = {roles[name]: MemoryFactor(roles[name], array) for name, array in arrays.items()}
    return Target("m.embed", "tokens", SlotKind.PARAMETER, factors, rank, scaling, options={"token_indices": indices})


@st.composite
def trained(draw: st.DrawFn) -> MapExample:
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    indices = draw(st.lists(st.integers(0, 8), min_size=1, max_size=5, unique=True))
    dim = draw(st.integers(1, 7).filter(lambda size: size != max(indices) + 1))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    rows = dice.standard_normal((len(indices), dim)).astype(dtype)
    base = dice.standard_normal((max(indices) + 1, dim))
    mapped = np.array([rows[indices.index(i)] if i in indices else base[i] for i in range(len(base))])
    target = make_target(indices, rows=rows)
    return MapExample(target, {ROWS: rows}, base, mapped.astype(np.float64), 1e-6)


class TestTokens(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return trained()


def codes(target: Target) -> list[str]:
    return [problem.code for problem in KIND.check(target)]


def test_the_table_may_have_more_rows_than_the_last_token_needs() -> None:
    (change,) = KIND.changes(make_target([4, 1], rows=np.ones((2, 3))))
    assert (change.shape, change.open, change.shared) == ((5, 3), True, True)
    assert change.nature is Nature.FUNCTION_OF_BASE


def test_a_table_that_was_saved_beside_them_is_replaced_with_them_in_it() -> None:
    rows, table = np.array([[10.0, 11.0], [20.0, 21.0]]), np.arange(8.0).reshape(4, 2)
    target = make_target([3, 0], rows=rows, table=table)
    (change,) = KIND.changes(target)
    assert (change.shape, change.open, change.nature) == ((4, 2), False, Nature.REPLACEMENT)
    found = whole(KIND.value(target, change, {ROWS: rows, TABLE: table}), np.float64)
    np.testing.assert_array_equal(found, [[20, 21], [2, 3], [4, 5], [10, 11]])
    np.testing.assert_array_equal(table, np.arange(8.0).reshape(4, 2))


@pytest.mark.parametrize(
    "indices", [None, [], [1], [1, 1], [1, -1], [1, 2.0], [1, True], [1, "2"], "12", {"0": 1}, [1, 2, 3]], ids=str
)
def test_rows_are_numbered_one_by_one(indices: Sequence[Any]) -> None:
    assert codes(make_target(indices, rows=np.ones((2, 3)))) == ["LF227"]


def test_a_token_beyond_the_saved_table() -> None:
    assert codes(make_target([1, 4], rows=np.ones((2, 3)), table=np.ones((4, 3)))) == ["LF227"]
    assert not codes(make_target([1, 3], rows=np.ones((2, 3)), table=np.ones((4, 3))))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2,), (2, 3, 1), ()], ids=str)
def test_shapes_that_no_rows_have(shape: tuple[int, ...]) -> None:
    assert codes(make_target([1, 2], rows=np.ones(shape))) == ["LF203"]


def test_a_table_of_another_width() -> None:
    assert codes(make_target([1, 2], rows=np.ones((2, 3)), table=np.ones((4, 5)))) == ["LF203"]


def test_rows_have_neither_rank_nor_scale() -> None:
    rows = np.ones((1, 3))
    assert codes(make_target([1], rank=2, rows=rows)) == ["LF205"]
    assert codes(make_target([1], Scaling(ScalingRule.MULTIPLIER, 0.5), rows=rows)) == ["LF122"]
    assert codes(make_target([1], Scaling(ScalingRule.ALPHA_OVER_RANK, 1.0), rows=rows)) == ["LF122"]


def test_the_table_alone_is_not_enough() -> None:
    assert codes(make_target([1], table=np.ones((4, 3)))) == ["LF201"]
