"""DeLoRA against its formula, rank by rank."""

import numpy as np
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule
from loraformat.kinds.delora import KIND


def dense(arrays: Arrays) -> np.ndarray:
    down, up = arrays["delora_A"], arrays["delora_B"]
    change = np.zeros((up.shape[0], down.shape[1]))
    for k in range(len(down)):
        lengths = max(np.sqrt(down[k] @ down[k]), 1e-4) * max(np.sqrt(up[:, k] @ up[:, k]), 1e-4)
        change += arrays["delora_lambda"][0] / len(down) / lengths * np.outer(up[:, k], down[k])
    return change * arrays["delora_w_norm"][None, :]


@st.composite
def delora_examples(draw: st.DrawFn) -> Example:
    (out, inner), rank = draw_sizes(draw), draw(st.integers(1, 4))
    shapes = {"delora_A": (rank, inner), "delora_B": (out, rank), "delora_lambda": (1,), "delora_w_norm": (inner,)}
    arrays = draw_factors(draw, shapes)
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    target = make_target("delora", draw(st.sampled_from(MATRICES)), arrays, rank, scaling)
    return added(target, dense, terms=16)


class TestDelora(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return delora_examples()
