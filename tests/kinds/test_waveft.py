"""WaveFT without a wavelet: numbers at the places that torch would draw."""

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds._torch_random import draw_permutation
from loraformat.kinds.waveft import KIND


@st.composite
def waveft_examples(draw: st.DrawFn) -> Example:
    out, inner = draw_sizes(draw)
    number, seed = draw(st.integers(1, out * inner)), draw(st.integers(0, 2**32))
    target = make_target(
        "waveft",
        draw(st.sampled_from(MATRICES)),
        draw_factors(draw, {"waveft_spectrum": (number,)}),
        scaling=Scaling(ScalingRule.MULTIPLIER, draw(SCALES)),
        options={"random_loc_seed": seed, "use_idwt": False},
    )

    def dense(arrays: Arrays) -> np.ndarray:
        change = np.zeros((out, inner))
        for value, place in zip(arrays["waveft_spectrum"], draw_permutation(out * inner, number, seed), strict=True):
            change[place // inner, place % inner] = value
        return change

    return added(target, dense, shape=(out, inner))


class TestWaveft(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return waveft_examples()


@pytest.mark.parametrize("options", [{"use_idwt": True}, {}], ids=str)
def test_wavelets_are_refused(options: dict[str, bool]) -> None:
    arrays = {"waveft_spectrum": np.ones(3)}
    target = make_target("waveft", SlotKind.LINEAR, arrays, options={"random_loc_seed": 1, **options})
    assert [problem.code for problem in KIND.check(target)] == ["LF230"]
