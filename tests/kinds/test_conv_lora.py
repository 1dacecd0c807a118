"""loralib's reshaped convolution against its `view`, in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds.conv_lora import KIND
from loraformat.strict_json import JsonValue

ROLES = ("lora_A.weight", "lora_B.weight")


def make_target(down: NDArray[Any], up: NDArray[Any], rank: int, **options: JsonValue) -> Target:
    factors = {role: MemoryFactor(role, array) for role, array in zip(ROLES, (down, up), strict=True)}
    scaling = Scaling(ScalingRule.ALPHA_OVER_RANK, 3.0)
    return Target("m.conv", "conv_lora", SlotKind.CONV, factors, rank, scaling, options=options)


@st.composite
def conv_examples(draw: st.DrawFn) -> Example:
    size, axes = draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 2), (3, 2), (5, 2)]))
    groups = draw(st.integers(1, 3))
    rank = draw(st.integers(1, 3))
    out, inner = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    assume(out != inner // groups * size**axes)
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    down = dice.standard_normal((rank * size, inner * size)).astype(dtype)
    up = dice.standard_normal((out // groups * size, rank * size)).astype(dtype)
    options: dict[str, JsonValue] = {"kernel_size": size, "axes": axes}
    target = make_target(down, up, rank, **(options | ({"groups": groups} if groups > 1 else {})))
    arrays = {role: factor.read() for role, factor in target.factors.items()}
    shape = out, inner // groups * size**axes
    dense, bound = ((f(up).astype(np.float64) @ f(down).astype(np.float64)).reshape(shape) for f in (np.array, np.abs))
    return Example(target, arrays, dense, bound * size)


class TestConvLora(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return conv_examples()

    def test_check_compares_the_stated_rank_with_the_factors(self) -> None:
        """They show it times the kernel's size, which only the options say."""
        target = make_target(np.ones((6, 15)), np.ones((12, 6)), 2, kernel_size=3)
        assert not codes(target)
        assert KIND.rank(target.factors) == 0
        assert codes(replace(target, rank=6)) == ["LF205"]


def codes(target: Target) -> list[str]:
    return [problem.code for problem in KIND.check(target)]


def test_the_kernel_of_a_grouped_convolution() -> None:
    target = make_target(np.ones((6, 12)), np.ones((9, 6)), 2, kernel_size=3, groups=2)
    assert KIND.changes(target)[0].shape == (6, 2, 3, 3)


@pytest.mark.parametrize(
    ("down", "up", "options", "code"),
    [
        ((6, 15), (12, 6), {}, "LF230"),
        ((6, 15), (12, 6), {"kernel_size": 0}, "LF230"),
        ((6, 15), (12, 6), {"kernel_size": 3, "stride": 1}, "LF230"),
        ((6, 15), (12, 6), {"kernel_size": 3, "axes": 1}, "LF203"),
        ((2, 15), (12, 2), {"kernel_size": 1, "axes": 4}, "LF203"),
        ((6, 14), (12, 6), {"kernel_size": 3}, "LF203"),
        ((6, 15), (12, 6), {"kernel_size": 3, "groups": 2}, "LF203"),
        ((6, 15), (12, 3), {"kernel_size": 3}, "LF203"),
    ],
    ids=str,
)
def test_kernels_that_no_view_makes(
    down: tuple[int, ...], up: tuple[int, ...], options: dict[str, JsonValue], code: str
) -> None:
    assert codes(make_target(np.ones(down, np.float32), np.ones(up, np.float32), 2, **options)) == [code]
