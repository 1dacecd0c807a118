"""(IA)³: rows or columns times a number of their own, the bias with the rows, groups of a convolution."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, draw_factors, draw_sizes, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.ia3 import KIND


@st.composite
def ia3_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([*MATRICES, SlotKind.CONV]))
    (out, inner), forward = draw_sizes(draw), draw(st.booleans())
    kernel = (2, 3) if slot is SlotKind.CONV else ()
    numbers = inner if forward else out
    shape = (1, numbers, 1, 1) if kernel else ((1, numbers) if forward else (numbers, 1))
    options = {"is_feedforward": forward}
    target = make_target("ia3", slot, draw_factors(draw, {"ia3_l": shape}), options=options)

    def formula(arrays: Any, base: Any) -> Any:
        weight = base.reshape(out, inner, *kernel)
        spread = arrays["ia3_l"].reshape(-1)
        spread = spread.reshape(1, -1, *(1 for _ in kernel)) if forward else spread.reshape(-1, 1, *(1 for _ in kernel))
        return (weight * spread).reshape(base.shape)

    return mapped(draw, target, (out, inner, *kernel), formula)


class TestIa3(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return ia3_examples()


def test_a_bias_is_scaled_with_its_rows_where_there_is_one() -> None:
    numbers = np.array([[2.0], [3.0]])
    target = make_target("ia3", SlotKind.LINEAR, {"ia3_l": numbers})
    weight, bias = KIND.changes(target)
    assert (weight.is_optional, bias.is_optional, bias.parameter) == (False, True, "bias")
    base, out = np.array([[1.0], [10.0]]), np.empty((2, 1))
    KIND.map(target, bias, {"ia3_l": numbers}).write_rows(0, 2, base, out)
    np.testing.assert_array_equal(out, [[2.0], [30.0]])


def test_inputs_have_no_bias() -> None:
    target = make_target("ia3", SlotKind.LINEAR, {"ia3_l": np.ones((1, 3))}, options={"is_feedforward": True})
    assert [change.parameter for change in KIND.changes(target)] == ["weight"]


def test_each_group_of_a_convolution_has_its_own_inputs() -> None:
    from dataclasses import replace

    numbers = np.array([2.0, 3.0, 5.0, 7.0]).reshape(1, 4, 1)
    target = make_target("ia3", SlotKind.CONV, {"ia3_l": numbers}, options={"is_feedforward": True})
    (change,) = KIND.changes(target)
    change = replace(change, shape=(6, 2, 3))
    assert not KIND.check_size(target, change)
    out = np.empty((6, 6))
    KIND.map(target, change, {"ia3_l": numbers}).write_rows(0, 6, np.ones((6, 6)), out)
    np.testing.assert_array_equal(out, [[2, 2, 2, 3, 3, 3]] * 3 + [[5, 5, 5, 7, 7, 7]] * 3)
    assert [p.code for p in KIND.check_size(target, replace(change, shape=(6, 3, 3)))] == ["LF405"]
    assert [p.code for p in KIND.check_size(target, replace(change, shape=(5, 2, 3)))] == ["LF405"]


@pytest.mark.parametrize("forward", [True, False])
def test_a_vector_the_wrong_way_round(forward: bool) -> None:
    numbers = np.ones((2, 1) if forward else (1, 2))
    target = make_target("ia3", SlotKind.LINEAR, {"ia3_l": numbers}, options={"is_feedforward": forward})
    assert [problem.code for problem in KIND.check(target)] == ["LF203"]


def test_options_and_scale_are_looked_at() -> None:
    arrays = {"ia3_l": np.ones((2, 1))}
    for options in ({"is_feedforward": 1}, {"is_feedforward": None}, {"feedforward": True}):
        target = make_target("ia3", SlotKind.LINEAR, arrays, options=options)  # type: ignore[arg-type]
        assert [problem.code for problem in KIND.check(target)] == ["LF230"]
    scaled = make_target("ia3", SlotKind.LINEAR, arrays, scaling=Scaling(ScalingRule.MULTIPLIER, 0.5))
    assert [problem.code for problem in KIND.check(scaled)] == ["LF231"]
    divided = make_target("ia3", SlotKind.LINEAR, arrays, scaling=Scaling(ScalingRule.ALPHA_OVER_RANK, 1.0))
    assert [problem.code for problem in KIND.check(divided)] == ["LF122"]
