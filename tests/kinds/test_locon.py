"""LoCon with a core against einsum in float64."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds.locon import KIND

ROLES = ("lora_A.weight", "lora_B.weight", "lora_mid.weight")
KERNELS: list[tuple[int, ...]] = [(3,), (1, 1), (3, 3), (2, 5), (2, 3, 1)]


def make_target(down: NDArray[Any], up: NDArray[Any], core: NDArray[Any], scaling: Scaling) -> Target:
    factors = {role: MemoryFactor(role, array) for role, array in zip(ROLES, (down, up, core), strict=True)}
    return Target("m.conv", "locon", SlotKind.CONV, factors, down.shape[0], scaling)


def make_dense(down: NDArray[Any], up: NDArray[Any], core: NDArray[Any]) -> NDArray[np.float64]:
    """LyCORIS' rebuild: i j ..., i p, j r -> p r ..., its up transposed."""
    wide = [each.astype(np.float64) for each in (core, up.reshape(len(up), -1).T, down.reshape(len(down), -1))]
    dense = np.einsum("ij...,ip,jr->pr...", *wide)
    return dense.reshape(len(up), -1)


@st.composite
def locon_examples(draw: st.DrawFn) -> Example:
    kernel = draw(st.sampled_from(KERNELS))
    out, inner = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda sizes: sizes[0] != sizes[1]))
    rank = draw(st.integers(1, 4))
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    ones = tuple(1 for _ in kernel)
    down = dice.standard_normal((rank, inner, *ones)).astype(dtype)
    up = dice.standard_normal((out, rank, *ones)).astype(dtype)
    core = dice.standard_normal((rank, rank, *kernel)).astype(dtype)
    scaling = Scaling(draw(st.sampled_from(ScalingRule)), draw(st.sampled_from([4.0, 1.0, -0.3])))
    target = make_target(down, up, core, scaling)
    arrays = {role: factor.read() for role, factor in target.factors.items()}
    return Example(target, arrays, make_dense(down, up, core), rank * make_dense(*map(np.abs, (down, up, core))))


class TestLoCon(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return locon_examples()


def codes(down: tuple[int, ...], up: tuple[int, ...], core: tuple[int, ...]) -> list[str]:
    arrays = (np.ones(shape, np.float32) for shape in (down, up, core))
    target = make_target(*arrays, Scaling(ScalingRule.MULTIPLIER, 1.0))
    return [problem.code for problem in KIND.check(target)]


def test_the_shape_is_that_of_the_kernel() -> None:
    arrays = (np.ones(shape) for shape in ((2, 5, 1, 1), (4, 2, 1, 1), (2, 2, 3, 7)))
    target = make_target(*arrays, Scaling(ScalingRule.MULTIPLIER, 1.0))
    assert KIND.changes(target)[0].shape == (4, 5, 3, 7)


@pytest.mark.parametrize(
    ("down", "up", "core"),
    [
        ((2, 5, 1, 1), (4, 3, 1, 1), (2, 2, 3, 3)),
        ((2, 5, 1, 1), (4, 2, 1, 1), (2, 3, 3, 3)),
        ((2, 5, 3, 3), (4, 2, 1, 1), (2, 2, 3, 3)),
        ((2, 5), (4, 2), (2, 2, 3, 3)),
        ((2, 5, 1, 1), (4, 2, 1, 1), (2, 2)),
        ((2, 0, 1, 1), (4, 2, 1, 1), (2, 2, 3, 3)),
    ],
    ids=str,
)
def test_shapes_that_do_not_belong_together(down: tuple[int, ...], up: tuple[int, ...], core: tuple[int, ...]) -> None:
    assert codes(down, up, core) == ["LF203"]
