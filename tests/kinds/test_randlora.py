"""RandLoRA against a sum over the one axis that ranks and bases make, as PEFT counts them on either side."""

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws, main_change
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.randlora import KIND


@st.composite
def randlora_examples(draw: st.DrawFn) -> Example:
    (out, inner), rank, more = draw_sizes(draw), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    smaller, larger = min(out, inner), max(out, inner)
    bases = -(-smaller // rank)
    shapes = {
        "randlora_lambda": (rank, bases),
        "randlora_gamma": (bases, smaller),
        "randlora_A": (rank, 1, smaller + more),
        "randlora_B": (larger + more, bases + more, rank),
    }
    scaling = Scaling(draw(st.sampled_from(ScalingRule)), draw(SCALES))
    target = make_target("randlora", draw(st.sampled_from(MATRICES)), draw_factors(draw, shapes), rank, scaling)

    def dense(arrays: Arrays) -> np.ndarray:
        change = np.zeros((larger, smaller))
        for k in range(rank * bases):
            (r, n), (other_n, other_r) = divmod(k, bases), divmod(k, rank)
            narrow = (
                arrays["randlora_lambda"][r, n] * arrays["randlora_A"][r, 0, :smaller] * arrays["randlora_gamma"][n]
            )
            change += np.outer(arrays["randlora_B"][:larger, other_n, other_r], narrow)
        return change if inner == smaller else change.T

    return added(target, dense, terms=8 + 2 * rank * bases, shape=(out, inner))


class TestRandlora(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return randlora_examples()


@pytest.mark.parametrize("shape", [(3, 7), (4, 9), (5, 4)], ids=str)
def test_a_weight_that_the_bases_do_not_fit(shape: tuple[int, int]) -> None:
    shapes = {
        "randlora_lambda": (2, 2),
        "randlora_gamma": (2, 4),
        "randlora_A": (2, 1, 6),
        "randlora_B": (8, 2, 2),
    }
    target = make_target("randlora", SlotKind.LINEAR, {role: np.ones(each) for role, each in shapes.items()}, 2)
    problems = KIND.check_size(target, main_change(KIND, target, shape=shape))
    assert [problem.code for problem in problems] == ([] if shape == (5, 4) else ["LF405"])
