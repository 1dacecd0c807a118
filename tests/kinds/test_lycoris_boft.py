"""LyCORIS' butterfly against matrices written out: a permutation and a block diagonal for each stage, in float64."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds.lycoris_boft import KIND
from loraformat.strict_json import JsonValue


def make_target(slot: SlotKind, options: dict[str, JsonValue] | None = None, **arrays: Any) -> Target:
    factors = {role: MemoryFactor(role, array) for role, array in arrays.items()}
    return Target("m.q", KIND.name, slot, factors, 0, Scaling(ScalingRule.MULTIPLIER, 1.0), options=options or {})


def list_order(out: int, stage: int, size: int) -> list[int]:
    """Return which output stands where before a stage: pairs that are 2^stage · size / 2 apart come together."""
    apart = 2**stage * size // 2
    return [c * 2 * apart + g * apart + k for c in range(out // (2 * apart)) for k in range(apart) for g in range(2)]


def make_mapped(base: NDArray[Any], blocks: NDArray[Any], rescale: NDArray[Any] | None, constraint: float) -> Any:
    stages, count, size, _ = blocks.shape
    skew = blocks - blocks.transpose(0, 1, 3, 2)
    limit, length = constraint * len(base), np.sqrt((skew**2).sum()) + 1e-8
    if constraint > 0 and length > limit:
        skew = skew * limit / length
    for stage in range(stages):
        diagonal = np.zeros((len(base), len(base)))
        for number in range(count):
            place = slice(number * size, (number + 1) * size)
            one = skew[stage, number]
            diagonal[place, place] = (np.eye(size) + one) @ np.linalg.inv(np.eye(size) - one)
        order = np.eye(len(base))[list_order(len(base), stage, size)]
        base = order.T @ diagonal @ order @ base
    return base if rescale is None else base * rescale.reshape(-1, 1)


@st.composite
def boft_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.CONV]))
    kernel = draw(st.sampled_from([(3,), (1, 1), (3, 2)])) if slot is SlotKind.CONV else ()
    stages, size, inner = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3)), draw(st.integers(1, 5))
    count = 2 ** (stages - 1) * draw(st.integers(1, 3))
    out, columns = count * size, inner * int(np.prod(kernel))
    assume(out != columns)
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    base, blocks = dice.standard_normal((out, columns)), dice.standard_normal((stages, count, size, size))
    arrays = {"oft_blocks": blocks}
    if draw(st.booleans()):
        arrays["rescale"] = 1 + dice.random((out, 1, *(1 for _ in kernel)))
    constraint = draw(st.sampled_from([0.0, 0.05]))
    options: dict[str, JsonValue] = {"constraint": constraint} if constraint else {}
    target = make_target(slot, options, **arrays)
    shape = (out, inner, *kernel)
    return MapExample(target, arrays, base, make_mapped(base, blocks, arrays.get("rescale"), constraint), 1e-4, shape)


class TestLycorisBoft(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return boft_examples()


@pytest.mark.parametrize("shape", [(1, 2, 3, 3), (3, 2, 4, 4), (2, 3, 4, 4), (3, 4, 4), (2, 2, 4, 2)], ids=str)
def test_stages_that_reach_beyond_the_outputs(shape: tuple[int, ...]) -> None:
    target = make_target(SlotKind.LINEAR, oft_blocks=np.ones(shape, np.float32))
    assert [problem.code for problem in KIND.check(target)] == ["LF203"]
