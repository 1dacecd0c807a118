"""Uni-LoRA: factors put together number by number."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws, main_change
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.unilora import KIND


@st.composite
def unilora_examples(draw: st.DrawFn) -> Example:
    (out, inner), rank, numbers = draw_sizes(draw), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    sides = {"A": (rank, inner), "B": (out, rank)}
    shapes = {"unilora_theta_d": (numbers,)} | {f"unilora_scales_{side}": shape for side, shape in sides.items()}
    arrays = draw_factors(draw, shapes)
    dice = np.random.default_rng(draw(st.integers(0, 99)))
    arrays |= {f"unilora_indices_{side}": dice.integers(0, numbers, shape) for side, shape in sides.items()}
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    target = make_target("unilora", draw(st.sampled_from(MATRICES)), arrays, rank, scaling)

    def dense(arrays: Arrays) -> np.ndarray:
        factors = {}
        for side, shape in sides.items():
            factors[side] = np.zeros(shape)
            for place in np.ndindex(*shape):
                number = arrays["unilora_theta_d"][arrays[f"unilora_indices_{side}"][place]]
                factors[side][place] = number * arrays[f"unilora_scales_{side}"][place]
        return np.asarray(factors["B"] @ factors["A"])

    return added(target, dense, terms=8 + rank, shape=(out, inner))


class TestUnilora(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return unilora_examples()


@pytest.mark.parametrize("index", [-1, 3])
def test_indices_lie_in_the_vector(index: int) -> None:
    arrays = {"unilora_theta_d": np.ones(3)} | {f"unilora_scales_{side}": np.ones((2, 2)) for side in "AB"}
    arrays |= {f"unilora_indices_{side}": np.zeros((2, 2), np.int64) for side in "AB"}
    target = make_target("unilora", SlotKind.LINEAR, arrays, 2)
    change = main_change(KIND, target, shape=(2, 2))
    assert not KIND.check(target)
    assert not KIND.check_size(target, change)
    wrong = replace(target.factors["unilora_indices_B"], array=np.full((2, 2), index))
    broken = replace(target, factors={**target.factors, "unilora_indices_B": wrong})
    assert [problem.code for problem in KIND.check_size(broken, change)] == ["LF405"]
    assert [problem.code for problem in KIND.check_size(target, replace(change, shape=(2, 3)))] == ["LF405"]
