"""LyCORIS' (IA)³: 1 + w for each output or each input, whichever `on_input` says."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds import UNKNOWN
from loraformat.kinds.lycoris_ia3 import KIND
from loraformat.strict_json import JsonValue


def make_target(weight: NDArray[Any], slot: SlotKind, scale: float = 1.0, **options: JsonValue) -> Target:
    scaling = Scaling(ScalingRule.MULTIPLIER, scale)
    return Target("m.q", "lycoris_ia3", slot, {"weight": MemoryFactor("weight", weight)}, 0, scaling, options=options)


@st.composite
def ia3_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.CONV]))
    kernel = draw(st.sampled_from([(3,), (1, 1), (3, 2)])) if slot is SlotKind.CONV else ()
    out, inner, on_input = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.booleans())
    assume(out != inner * int(np.prod(kernel)))
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    base, numbers = dice.standard_normal((out, inner, *kernel)), dice.standard_normal(inner if on_input else out)
    shape = (1, len(numbers), *(1 for _ in kernel)) if kernel else (len(numbers),)
    target = make_target(numbers.reshape(shape), slot, draw(st.sampled_from([1.0, 0.5])), on_input=on_input)
    mapped = np.empty_like(base)
    for o in range(out):
        for i in range(inner):
            mapped[o, i] = base[o, i] * (1 + target.scale * numbers[i if on_input else o])
    arrays = {"weight": target.factors["weight"].read()}
    return MapExample(target, arrays, base.reshape(out, -1), mapped.reshape(out, -1), 1e-5, base.shape)


class TestLycorisIa3(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return ia3_examples()


def codes(target: Target) -> list[str]:
    return [problem.code for problem in KIND.check(target)]


def test_which_side_is_meant_must_be_said() -> None:
    """A vector fits both sides of a square weight."""
    assert codes(make_target(np.ones(4), SlotKind.LINEAR)) == ["LF230"]
    assert codes(make_target(np.ones(4), SlotKind.LINEAR, on_input=1)) == ["LF230"]


def test_the_side_that_it_does_not_tell_is_that_of_the_base() -> None:
    assert KIND.changes(make_target(np.ones(4), SlotKind.LINEAR, on_input=False))[0].shape == (4, UNKNOWN)
    conv = make_target(np.ones((1, 4, 1, 1)), SlotKind.CONV, on_input=True)
    assert KIND.changes(conv)[0].shape == (UNKNOWN, 4, UNKNOWN, UNKNOWN)


@pytest.mark.parametrize(
    ("shape", "slot"), [((4, 1), SlotKind.LINEAR), ((4, 1, 1), SlotKind.CONV), ((4,), SlotKind.CONV)]
)
def test_shapes_of_another_dialect(shape: tuple[int, ...], slot: SlotKind) -> None:
    assert codes(make_target(np.ones(shape), slot, on_input=False)) == ["LF203"]
