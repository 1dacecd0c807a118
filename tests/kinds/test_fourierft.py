"""FourierFT against numpy's transform of the whole matrix, at the places that torch would draw."""

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws, main_change
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds._torch_random import draw_permutation
from loraformat.kinds.fourierft import KIND


@st.composite
def fourierft_examples(draw: st.DrawFn) -> Example:
    out, inner = draw_sizes(draw)
    number, seed = draw(st.integers(1, out * inner)), draw(st.integers(0, 2**40))
    arrays = draw_factors(draw, {"fourierft_spectrum": (number,)})
    target = make_target(
        "fourierft",
        draw(st.sampled_from(MATRICES)),
        arrays,
        scaling=Scaling(ScalingRule.MULTIPLIER, draw(SCALES)),
        options={"random_loc_seed": seed},
    )

    def dense(arrays: Arrays) -> np.ndarray:
        spectrum = np.zeros(out * inner)
        spectrum[draw_permutation(out * inner, number, seed)] = arrays["fourierft_spectrum"]
        return np.fft.ifft2(spectrum.reshape(out, inner)).real

    return added(target, dense, shape=(out, inner), bound=float(np.abs(arrays["fourierft_spectrum"]).sum()))


class TestFourierft(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return fourierft_examples()


@pytest.mark.parametrize(
    ("numbers", "seed", "expected"),
    [  # torch.randperm(numbers, generator=torch.Generator().manual_seed(seed))[:6] of torch 2.13.0
        (12, 777, [11, 7, 3, 8, 0, 2]),
        (1000, 0, [44, 37, 675, 775, 947, 209]),
        (16777216, 777, [1374311, 8240085, 6766295, 6474818, 14786199, 14783200]),
        (100000, 2**40 + 5, [53411, 99184, 41565, 33006, 87522, 16190]),
    ],
)
def test_permutations_are_those_of_torch(numbers: int, seed: int, expected: list[int]) -> None:
    assert draw_permutation(numbers, 6, seed).tolist() == expected


def test_a_whole_permutation_has_every_number_once() -> None:
    assert sorted(draw_permutation(50, 50, 3).tolist()) == list(range(50))
    assert draw_permutation(1, 1, 3).tolist() == [0]


def test_more_coefficients_than_numbers() -> None:
    target = make_target(
        "fourierft", SlotKind.LINEAR, {"fourierft_spectrum": np.ones(13)}, options={"random_loc_seed": 1}
    )
    assert [p.code for p in KIND.check_size(target, main_change(KIND, target, shape=(3, 4)))] == ["LF405"]
    assert not KIND.check_size(target, main_change(KIND, target, shape=(13, 1)))


@pytest.mark.parametrize("options", [{}, {"random_loc_seed": -1}, {"random_loc_seed": 1.0}, {"random_loc_seed": True}])
def test_a_seed_must_be_there(options: dict[str, int]) -> None:
    target = make_target("fourierft", SlotKind.LINEAR, {"fourierft_spectrum": np.ones(3)}, options=options)
    assert [problem.code for problem in KIND.check(target)] == ["LF230"]
