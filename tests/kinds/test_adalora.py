"""AdaLoRA against the paper's formula."""

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.adalora import KIND


def dense(arrays: Arrays) -> np.ndarray:
    return arrays["lora_B"] @ np.diag(arrays["lora_E"].reshape(-1)) @ arrays["lora_A"]


@st.composite
def adalora_examples(draw: st.DrawFn) -> Example:
    (out, inner), rank = draw_sizes(draw), draw(st.integers(1, 4))
    shapes = {"lora_A": (rank, inner), "lora_B": (out, rank), "lora_E": (rank, 1)}
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    target = make_target("adalora", draw(st.sampled_from(MATRICES)), draw_factors(draw, shapes), rank, scaling)
    return added(target, dense)


class TestAdalora(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return adalora_examples()


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 1)], ids=str)
def test_singular_values_of_another_shape(shape: tuple[int, ...]) -> None:
    arrays = {"lora_A": np.ones((3, 5)), "lora_B": np.ones((4, 3)), "lora_E": np.ones(shape)}
    assert [problem.code for problem in KIND.check(make_target("adalora", SlotKind.LINEAR, arrays, 3))] == ["LF203"]


def test_a_rank_of_zero_is_said() -> None:
    arrays = {"lora_A": np.ones((0, 5)), "lora_B": np.ones((4, 0)), "lora_E": np.ones((0, 1))}
    assert [problem.code for problem in KIND.check(make_target("adalora", SlotKind.LINEAR, arrays, 0))] == ["LF204"]
