"""SHiRA: numbers at given places, some of them twice."""

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws, main_change
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.shira import KIND


@st.composite
def shira_examples(draw: st.DrawFn) -> Example:
    (out, inner), number = draw_sizes(draw), draw(st.integers(1, 20))
    arrays = draw_factors(draw, {"shira_weight": (number,)})
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    places = np.stack([dice.integers(0, out, number), dice.integers(0, inner, number)])
    arrays["shira_indices"] = places.astype(draw(st.sampled_from([np.int32, np.int64])))
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    target = make_target("shira", draw(st.sampled_from(MATRICES)), arrays, scaling=scaling)

    def dense(arrays: Arrays) -> np.ndarray:
        change = np.zeros((out, inner))
        for value, row, column in zip(arrays["shira_weight"], *arrays["shira_indices"], strict=True):
            change[row, column] += value
        return change

    return added(target, dense, terms=30, shape=(out, inner))


class TestShira(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return shira_examples()


@pytest.mark.parametrize("place", [(3, 0), (0, 4), (-1, 0), (0, -1)], ids=str)
def test_places_outside_the_weight(place: tuple[int, int]) -> None:
    arrays = {"shira_weight": np.ones(1), "shira_indices": np.array(place, np.int32).reshape(2, 1)}
    target = make_target("shira", SlotKind.LINEAR, arrays)
    assert [p.code for p in KIND.check_size(target, main_change(KIND, target, shape=(3, 4)))] == ["LF405"]
