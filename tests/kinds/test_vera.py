"""VeRA against the paper's formula, with shared factors that are larger than the weight."""

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws, main_change
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.vera import KIND


@st.composite
def vera_examples(draw: st.DrawFn) -> Example:
    (out, inner), rank, more = draw_sizes(draw), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    shapes = {
        "vera_lambda_b": (out,),
        "vera_lambda_d": (rank,),
        "vera_A": (rank, inner + more),
        "vera_B": (out + more, rank),
    }
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    target = make_target("vera", draw(st.sampled_from(MATRICES)), draw_factors(draw, shapes), rank, scaling)

    def dense(arrays: Arrays) -> np.ndarray:
        middle = np.diag(arrays["vera_lambda_d"])
        return np.diag(arrays["vera_lambda_b"]) @ arrays["vera_B"][:out] @ middle @ arrays["vera_A"][:, :inner]

    return added(target, dense, terms=8 + rank, shape=(out, inner))


class TestVera(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return vera_examples()


def make(**shapes: tuple[int, ...]):
    return make_target("vera", SlotKind.LINEAR, {role: np.ones(shape) for role, shape in shapes.items()}, 2)


def test_shared_factors_that_are_too_small() -> None:
    shapes = {"vera_lambda_b": (5,), "vera_lambda_d": (2,), "vera_A": (2, 3), "vera_B": (5, 2)}
    assert not KIND.check(make(**shapes))
    assert [problem.code for problem in KIND.check(make(**{**shapes, "vera_B": (4, 2)}))] == ["LF203"]
    target = make(**shapes)
    assert not KIND.check_size(target, main_change(KIND, target, shape=(5, 3)))
    assert [p.code for p in KIND.check_size(target, main_change(KIND, target, shape=(5, 4)))] == ["LF405"]


@pytest.mark.parametrize("role", ["vera_lambda_d", "vera_A", "vera_B"])
def test_ranks_that_disagree(role: str) -> None:
    shapes = {"vera_lambda_b": (5,), "vera_lambda_d": (2,), "vera_A": (2, 3), "vera_B": (5, 2)}
    shapes[role] = tuple(3 if size == 2 else size for size in shapes[role])
    assert "LF203" in [problem.code for problem in KIND.check(make(**shapes))]
