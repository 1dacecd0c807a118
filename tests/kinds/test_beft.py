"""BEFT: a bias, added."""

import numpy as np
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, make_target
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule
from loraformat.kinds.beft import KIND


def dense(arrays: Arrays) -> np.ndarray:
    return arrays["beft_bias"].T


@st.composite
def beft_examples(draw: st.DrawFn) -> Example:
    arrays = draw_factors(draw, {"beft_bias": (1, draw(st.integers(2, 9)))})
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    return added(make_target("beft", draw(st.sampled_from(MATRICES)), arrays, scaling=scaling), dense)


class TestBeft(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return beft_examples()


def test_the_bias_must_be_there() -> None:
    (change,) = KIND.changes(make_target("beft", MATRICES[0], {"beft_bias": np.ones((1, 3))}))
    assert (change.parameter, change.shape, change.is_optional) == ("bias", (3,), False)
