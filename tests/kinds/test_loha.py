"""LoHa against the paper's formula: plain, flat for a kernel, and with Tucker's core."""

import numpy as np
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds.loha import KIND


def multiply(arrays: Arrays, which: str) -> np.ndarray:
    left, right = arrays[f"hada_w{which}_a"], arrays[f"hada_w{which}_b"]
    core = arrays.get(f"hada_t{which}")
    if core is None:
        return np.einsum("or,ri->oi", left, right)
    dense = np.einsum("ijkl,io,jc->ockl", core, left, right)
    return dense.reshape(len(dense), -1)


def dense(arrays: Arrays) -> np.ndarray:
    return multiply(arrays, "1") * multiply(arrays, "2")


@st.composite
def loha_examples(draw: st.DrawFn) -> Example:
    slot = draw(st.sampled_from([*MATRICES, SlotKind.CONV]))
    (out, inner), rank = draw_sizes(draw), draw(st.integers(1, 4))
    tucker = slot is SlotKind.CONV and draw(st.booleans())
    kernel = (2, 3) if slot is SlotKind.CONV else ()
    width = inner if tucker else inner * int(np.prod(kernel))
    shapes = {}
    for which in "12":
        shapes[f"hada_w{which}_a"] = (rank, out) if tucker else (out, rank)
        shapes[f"hada_w{which}_b"] = (rank, width)
        if tucker:
            shapes[f"hada_t{which}"] = (rank, rank, *kernel)
    scaling = Scaling(draw(st.sampled_from(ScalingRule)), draw(SCALES))
    target = make_target("loha", slot, draw_factors(draw, shapes), rank, scaling)
    return added(target, dense, terms=8 + 2 * rank * rank, shape=(out, inner, *kernel) if kernel else ())


class TestLoha(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return loha_examples()

    def needs(self, target: Target) -> list[str]:
        return list(target.factors)


def test_factors_of_a_matrix_may_be_those_of_a_kernel() -> None:
    from dataclasses import replace

    shapes = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 12), "hada_w2_a": (4, 2), "hada_w2_b": (2, 12)}
    target = make_target("loha", SlotKind.LINEAR, {role: np.ones(shape) for role, shape in shapes.items()}, 2)
    (change,) = KIND.changes(target)
    assert change.is_flat
    assert not KIND.check_size(target, replace(change, shape=(4, 3, 2, 2)))
    assert [p.code for p in KIND.check_size(target, replace(change, shape=(4, 3, 3)))] == ["LF405"]
