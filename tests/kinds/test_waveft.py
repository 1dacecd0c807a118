"""WaveFT: numbers, or coefficients of wavelets, at the places that torch would draw."""

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds._torch_random import draw_permutation
from loraformat.kinds._wavelets import WAVELETS, make_filters
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


R3, R10 = np.sqrt(3), np.sqrt(10)
INNER = np.sqrt(5 + 2 * R10)
THREE = [
    *(1 + R10 + INNER, 5 + R10 + 3 * INNER, 10 - 2 * R10 + 2 * INNER),
    *(10 - 2 * R10 - 2 * INNER, 5 + R10 - 3 * INNER, 1 + R10 - INNER),
]
LOWS = {
    "db1": np.array([1, 1]) / np.sqrt(2),
    "db2": np.array([1 + R3, 3 + R3, 3 - R3, 1 - R3]) / np.sqrt(32),
    "db3": np.array(THREE) / np.sqrt(512),
}
"""In closed form."""


@st.composite
def wavelet_examples(draw: st.DrawFn) -> Example:
    """With whole matrices of waves: of a coefficient right of the middle rows are high, below it columns."""
    out, inner = draw_sizes(draw)
    name, seed = draw(st.sampled_from(sorted(LOWS))), draw(st.integers(0, 2**32))
    number = draw(st.integers(1, out * inner))
    arrays = draw_factors(draw, {"waveft_spectrum": (number,)})
    options = {"random_loc_seed": seed, "use_idwt": True, "wavelet_family": name}
    target = make_target("waveft", draw(st.sampled_from(MATRICES)), arrays, options=options)
    low = LOWS[name]
    filters = (low, low[::-1] * (-1.0) ** np.arange(len(low)))

    def synthesise(size: int, half: int, which: int) -> np.ndarray:
        waves = np.zeros((2 * half + 2 * len(low), half))
        for place in range(half):
            waves[2 * place : 2 * place + len(low), place] = filters[which]
        return waves[len(low) - 2 :][:size]

    def dense(arrays: Arrays) -> np.ndarray:
        height, width = (size + len(low) - 2 + (size + len(low)) % 2 for size in (out, inner))
        whole = np.zeros((height, width))
        for value, place in zip(arrays["waveft_spectrum"], draw_permutation(out * inner, number, seed), strict=True):
            whole[place // inner + (height - out) // 2, place % inner + (width - inner) // 2] = value
        change = np.zeros((out, inner))
        for below in (0, 1):
            for right in (0, 1):
                rows, columns = height // 2, width // 2
                quarter = whole[below * rows : (below + 1) * rows, right * columns : (right + 1) * columns]
                change += synthesise(out, rows, right) @ quarter @ synthesise(inner, columns, below).T
        return change

    return added(target, dense, terms=number, shape=(out, inner), bound=8.0)


class TestWaveft(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return st.one_of(waveft_examples(), wavelet_examples())


@pytest.mark.parametrize("name", WAVELETS)
def test_filters_take_apart_what_they_put_together(name: str) -> None:
    """Both are orthogonal to themselves and to one another at every even distance, and the high one sums to zero."""
    low, high = make_filters(name)
    assert low.sum() == pytest.approx(np.sqrt(2))
    for distance in range(0, len(low), 2):
        near = [one[distance:] @ other[: len(other) - distance] for one in (low, high) for other in (low, high)]
        assert near == pytest.approx([float(distance == 0), 0, 0, float(distance == 0)], abs=1e-10)
    order = len(low) // 2
    moments = [np.sum(high * (np.arange(2 * order) / order) ** power) for power in range(order)]
    assert moments == pytest.approx([0] * order, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_idwt": True, "wavelet_family": "coif1"}, {"use_idwt": 1}], ids=str)
def test_other_wavelets_are_refused(options: dict[str, bool]) -> None:
    arrays = {"waveft_spectrum": np.ones(3)}
    target = make_target("waveft", SlotKind.LINEAR, arrays, options={"random_loc_seed": 1, **options})
    assert [problem.code for problem in KIND.check(target)] == ["LF230"]
