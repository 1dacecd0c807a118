"""LoKr against numpy's Kronecker product: each factor whole, as a product, and with Tucker's core."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, make_target
from laws.kind_laws import Example, KindLaws, main_change, whole
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds.lokr import KIND


def dense(arrays: Arrays) -> np.ndarray:
    left = arrays["lokr_w1"] if "lokr_w1" in arrays else arrays["lokr_w1_a"] @ arrays["lokr_w1_b"]
    if "lokr_w2" in arrays:
        right = arrays["lokr_w2"]
    elif "lokr_t2" in arrays:
        right = np.einsum("ijkl,io,jc->ockl", arrays["lokr_t2"], arrays["lokr_w2_a"], arrays["lokr_w2_b"])
    else:
        right = arrays["lokr_w2_a"] @ arrays["lokr_w2_b"]
    spread = left.reshape(*left.shape, *(1 for _ in right.shape[2:]))
    product = np.kron(spread, right)
    return product.reshape(len(product), -1)


@st.composite
def lokr_examples(draw: st.DrawFn) -> Example:
    slot = draw(st.sampled_from([*MATRICES, SlotKind.CONV]))
    kernel = (2, 3) if slot is SlotKind.CONV else ()
    a, b, c, d = draw(st.tuples(*[st.integers(1, 4)] * 4).filter(lambda n: n[0] * n[2] != n[1] * n[3]))
    rank = draw(st.integers(1, 3))
    first = draw(st.sampled_from(["whole", "product"]))
    second = draw(st.sampled_from(["whole", "product", *(["core"] if kernel else [])]))
    shapes: dict[str, Any] = (
        {"lokr_w1": (a, b)} if first == "whole" else {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, b)}
    )
    if second == "whole":
        shapes |= {"lokr_w2": (c, d, *kernel)}
    elif second == "product":
        shapes |= {"lokr_w2_a": (c, rank), "lokr_w2_b": (rank, d * int(np.prod(kernel)))}
    else:
        shapes |= {"lokr_w2_a": (rank, c), "lokr_w2_b": (rank, d), "lokr_t2": (rank, rank, *kernel)}
    ranked = (first, second) != ("whole", "whole")
    rule = draw(st.sampled_from(ScalingRule)) if ranked else ScalingRule.MULTIPLIER
    target = make_target("lokr", slot, draw_factors(draw, shapes), rank if ranked else 0, Scaling(rule, draw(SCALES)))
    return added(target, dense, terms=8 + 2 * rank * rank, shape=(a * c, b * d, *kernel) if kernel else ())


class TestLokr(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return lokr_examples()

    def needs(self, target: Target) -> list[str]:
        return sorted(set(target.factors) - {"lokr_t2"})


def test_peft_counts_the_axes_of_a_line_in_its_own_way() -> None:
    """torch.kron puts missing axes in front: what PEFT trains for Conv1d is the product below, counted anew."""
    from dataclasses import replace

    dice = np.random.default_rng(0)
    left, right = dice.standard_normal((2, 3)), dice.standard_normal((4, 5, 3))
    arrays = {"lokr_w1": left, "lokr_w2": right}
    target = make_target("lokr", SlotKind.CONV, arrays, options={"kron_axes": "leading"})
    assert not KIND.check(target)
    change = replace(main_change(KIND, target, shape=(8, 15, 3)), shape=(8, 15, 3))
    found = whole(KIND.delta(target, change, arrays, 1.0), np.float64)
    product = np.zeros((4, 10, 9))
    for i, j, k, m, n in np.ndindex(4, 2, 5, 3, 3):
        product[i, j * 5 + k, m * 3 + n] = left[j, m] * right[i, k, n]
    np.testing.assert_allclose(found, product.reshape(8, 45), rtol=1e-13)
    assert not np.allclose(found, dense(arrays))


@pytest.mark.parametrize("roles", [{"lokr_w2": (4, 5, 3, 3)}, {"lokr_w2_a": (4, 1), "lokr_w2_b": (1, 15)}], ids=str)
def test_other_factors_have_no_such_way(roles: dict[str, tuple[int, ...]]) -> None:
    arrays = {"lokr_w1": np.ones((2, 3)), **{role: np.ones(shape) for role, shape in roles.items()}}
    rank = 1 if len(roles) == 2 else 0
    target = make_target("lokr", SlotKind.CONV, arrays, rank, options={"kron_axes": "leading"})
    assert [problem.code for problem in KIND.check(target)] == ["LF230"]


def test_a_part_with_steps_is_cut_from_whole_rows() -> None:
    delta = KIND.delta(
        make_target("lokr", SlotKind.LINEAR, {"lokr_w1": np.ones((2, 3)), "lokr_w2": np.ones((4, 5))}),
        main_change(
            KIND, make_target("lokr", SlotKind.LINEAR, {"lokr_w1": np.ones((2, 3)), "lokr_w2": np.ones((4, 5))})
        ),
        {"lokr_w1": np.arange(6.0).reshape(2, 3), "lokr_w2": np.arange(20.0).reshape(4, 5)},
        1.0,
    )
    full = whole(delta, np.float64)
    part = delta.part(slice(1, 8, 3), slice(2, 15, 4))
    np.testing.assert_array_equal(whole(part, np.float64), full[1:8:3, 2:15:4])
    np.testing.assert_array_equal(whole(part.transposed(), np.float64), full[1:8:3, 2:15:4].T)
    again = part.part(slice(1, 3, 1), slice(0, 3, 2))
    np.testing.assert_array_equal(whole(again, np.float64), full[1:8:3, 2:15:4][1:3, 0:3:2])
