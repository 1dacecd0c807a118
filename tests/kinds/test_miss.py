"""MiSS against the block, laid side by side."""

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, make_target
from laws.kind_laws import Example, KindLaws, main_change
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.miss import KIND


@st.composite
def miss_examples(draw: st.DrawFn) -> Example:
    rank, few, times = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    inner = draw(st.integers(rank, 9).filter(lambda n: n != few * times))
    scaling = Scaling(draw(st.sampled_from(ScalingRule)), draw(SCALES))
    options = {"is_repeated_along_outputs": True} if times > 1 else {}
    arrays = draw_factors(draw, {"miss_block": (rank, few)})
    target = make_target("miss", draw(st.sampled_from(MATRICES)), arrays, rank, scaling, options)

    def dense(arrays: Arrays) -> np.ndarray:
        wide = np.concatenate([arrays["miss_block"]] * times, axis=1)
        tall = np.concatenate([wide] * (inner // rank + 1), axis=0)[:inner]
        return tall.T

    return added(target, dense, shape=(few * times, inner))


class TestMiss(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return miss_examples()


@pytest.mark.parametrize(("shape", "fits"), [((4, 9), True), ((4, 2), False), ((8, 9), True), ((6, 9), False)], ids=str)
def test_a_weight_that_the_block_does_not_fit(shape: tuple[int, int], fits: bool) -> None:
    options = {"is_repeated_along_outputs": True}
    target = make_target("miss", SlotKind.LINEAR, {"miss_block": np.ones((3, 4))}, 3, options=options)
    assert bool(KIND.check_size(target, main_change(KIND, target, shape=shape))) is not fits
