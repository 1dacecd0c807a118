"""litgpt's adapter_v2: the layer scale∘(W·x + b + bias) is the merged layer's W′·x + b′."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds import UNKNOWN
from loraformat.kinds.adapter_v2 import KIND


def make_target(scale: NDArray[Any], bias: NDArray[Any], slot: SlotKind = SlotKind.LINEAR) -> Target:
    factors = {name: MemoryFactor(name, array) for name, array in (("adapter_scale", scale), ("adapter_bias", bias))}
    return Target("m.q", "adapter_v2", slot, factors, 0, Scaling(ScalingRule.MULTIPLIER, 1.0))


@st.composite
def v2_examples(draw: st.DrawFn) -> MapExample:
    out, inner = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    assume(out != inner)
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    base, scale, bias = dice.standard_normal((out, inner)), dice.standard_normal(out), dice.standard_normal(out)
    slot = draw(st.sampled_from([SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED]))
    mapped = np.stack([scale[row] * base[row] for row in range(out)])
    return MapExample(
        make_target(scale, bias, slot), {"adapter_scale": scale, "adapter_bias": bias}, base, mapped, 1e-5, (out, inner)
    )


class TestAdapterV2(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return v2_examples()


def test_the_merged_layer_is_the_adapted_one() -> None:
    dice = np.random.default_rng(0)
    weight, inputs = dice.standard_normal((4, 3)), dice.standard_normal((3, 5))
    bias, scale, shift = (dice.standard_normal(4) for _ in range(3))
    target = make_target(scale, shift)
    arrays = {"adapter_scale": scale, "adapter_bias": shift}
    changes = {change.parameter: change for change in KIND.changes(target)}
    assert changes["weight"].shape == (4, UNKNOWN)
    merged_weight, merged_bias = np.empty((4, 3)), np.empty((4, 1))
    settled = replace(KIND.changes(target)[0], shape=(4, 3))
    KIND.map(target, settled, arrays).write_rows(0, 4, weight, merged_weight)
    KIND.map(target, changes["bias"], arrays).write_rows(0, 4, bias[:, None], merged_bias)
    expected = scale[:, None] * (weight @ inputs + bias[:, None] + shift[:, None])
    np.testing.assert_allclose(merged_weight @ inputs + merged_bias, expected)


def test_one_of_the_two_is_not_enough() -> None:
    target = make_target(np.ones(4), np.ones(4))
    half = replace(target, factors={"adapter_bias": target.factors["adapter_bias"]})
    assert [problem.code for problem in KIND.check(half)] == ["LF201"]
    unequal = make_target(np.ones(4), np.ones(5))
    assert [problem.code for problem in KIND.check(unequal)] == ["LF203"]
