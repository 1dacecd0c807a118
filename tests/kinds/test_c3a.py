"""C3A against circular convolutions of whole vectors."""

import numpy as np
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, make_target
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule
from loraformat.kinds.c3a import KIND


def dense(arrays: Arrays) -> np.ndarray:
    kernel = arrays["c3a_kernel"]
    down, across, size = kernel.shape
    change = np.zeros((down * size, across * size))
    for i, j, a, t in np.ndindex(down, across, size, size):
        change[i * size + a, j * size + (a + t) % size] += kernel[i, j, t]
    return change / (across * size)


@st.composite
def c3a_examples(draw: st.DrawFn) -> Example:
    down, across = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)).filter(lambda n: n[0] != n[1]))
    arrays = draw_factors(draw, {"c3a_kernel": (down, across, draw(st.integers(1, 5)))})
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    return added(make_target("c3a", draw(st.sampled_from(MATRICES)), arrays, scaling=scaling), dense)


class TestC3a(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return c3a_examples()
