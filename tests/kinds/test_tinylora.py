"""TinyLoRA against its formula, of a matrix and of a table."""

import numpy as np
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.tinylora import KIND


@st.composite
def tinylora_examples(draw: st.DrawFn) -> Example:
    slot = draw(st.sampled_from([*MATRICES, SlotKind.EMBEDDING]))
    (rows, columns), rank, number = draw_sizes(draw), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shapes = {
        "tinylora_A": (rank, columns),
        "tinylora_B": (rows, rank),
        "tinylora_P": (number, rank, rank),
        "tinylora_v": (number,),
    }
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    target = make_target("tinylora", slot, draw_factors(draw, shapes), rank, scaling)

    def dense(arrays: Arrays) -> np.ndarray:
        middle = sum(value * matrix for value, matrix in zip(arrays["tinylora_v"], arrays["tinylora_P"], strict=True))
        change = arrays["tinylora_B"] @ middle @ arrays["tinylora_A"]
        return change.T if slot is SlotKind.EMBEDDING else change

    return added(target, dense, terms=32)


class TestTinylora(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return tinylora_examples()
