"""PVeRA: VeRA of the first halves."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws, main_change
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.pvera import KIND


@st.composite
def pvera_examples(draw: st.DrawFn) -> Example:
    (out, inner), rank, more = draw_sizes(draw), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    shapes = {
        "pvera_lambda_b": (out,),
        "pvera_lambda_d": (2 * rank,),
        "pvera_A": (2 * rank, inner + more),
        "pvera_B": (out + more, rank),
    }
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    target = make_target("pvera", draw(st.sampled_from(MATRICES)), draw_factors(draw, shapes), rank, scaling)

    def dense(arrays: Arrays) -> np.ndarray:
        strengths = arrays["pvera_lambda_d"][:rank]
        return np.einsum(
            "o,or,r,ri->oi",
            arrays["pvera_lambda_b"],
            arrays["pvera_B"][:out],
            strengths,
            arrays["pvera_A"][:rank, :inner],
        )

    return added(target, dense, terms=8 + rank, shape=(out, inner))


class TestPvera(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return pvera_examples()


def test_the_rank_without_shared_factors_is_half_of_the_middle() -> None:
    arrays = {"pvera_lambda_b": np.ones(5), "pvera_lambda_d": np.ones(6)}
    options = {"projection_prng_key": 1, "sharing": 1}
    target = make_target("pvera", SlotKind.LINEAR, arrays, 3, options=options)
    assert not KIND.check(target)
    change = replace(KIND.changes(target)[0], shape=(5, 4), extent=(7, 6))
    assert [factor.shape for factor in KIND.share(target, change, arrays)] == [(6, 6), (7, 3)]
    assert [p.code for p in KIND.check(make_target("pvera", SlotKind.LINEAR, arrays, 2, options=options))] == ["LF205"]


def test_halves_that_are_none() -> None:
    shapes = {"pvera_lambda_b": (5,), "pvera_lambda_d": (3,), "pvera_A": (3, 4), "pvera_B": (5, 2)}
    target = make_target("pvera", SlotKind.LINEAR, {role: np.ones(shape) for role, shape in shapes.items()}, 2)
    assert [problem.code for problem in KIND.check(target)] == ["LF203"]
    shapes |= {"pvera_lambda_d": (4,), "pvera_A": (4, 4)}
    target = make_target("pvera", SlotKind.LINEAR, {role: np.ones(shape) for role, shape in shapes.items()}, 2)
    assert not KIND.check(target)
    assert [p.code for p in KIND.check_size(target, main_change(KIND, target, shape=(5, 6)))] == ["LF405"]
