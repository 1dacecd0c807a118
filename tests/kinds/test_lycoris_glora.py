"""LyCORIS' GLoRA against its own einsum over the kernel, in float64."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds.lycoris_glora import KIND

ROLES = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
SCALINGS = st.builds(Scaling, st.sampled_from(ScalingRule), st.sampled_from([4.0, 1.0, -0.3]))
KERNELS: list[tuple[int, ...]] = [(3,), (1, 1), (3, 2), (2, 1, 2)]


def make_target(arrays: list[NDArray[Any]], slot: SlotKind, scaling: Scaling) -> Target:
    factors = {role: MemoryFactor(role, array) for role, array in zip(ROLES, arrays, strict=True)}
    return Target("m.q", "lycoris_glora", slot, factors, arrays[1].shape[0], scaling)


def make_mapped(base: NDArray[Any], factors: list[NDArray[Any]], scale: float) -> NDArray[np.float64]:
    """glora.py: o i ..., i j -> o j ... twice, and b1 @ b2, of a weight in its own shape."""
    a1, a2, b1, b2 = (each.astype(np.float64).reshape(len(each), -1) for each in factors)
    inner = np.einsum("oi...,ij->oj...", base, a1)
    mixed = np.einsum("oi...,ij->oj...", inner, a2)
    return base + scale * (mixed + (b1 @ b2).reshape(base.shape))


@st.composite
def glora_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.CONV]))
    kernel = draw(st.sampled_from(KERNELS)) if slot is SlotKind.CONV else ()
    out, inner, rank = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    assume(out != inner * int(np.prod(kernel)))
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    ones = tuple(1 for _ in kernel)
    shapes = [(inner, rank, *ones), (rank, inner, *ones), (out, rank, *ones), (rank, inner, *kernel)]
    factors = [dice.standard_normal(shape) for shape in shapes]
    target = make_target(factors, slot, draw(SCALINGS))
    base = dice.standard_normal((out, inner, *kernel))
    mapped = make_mapped(base, factors, target.scale).reshape(out, -1)
    bound = make_mapped(np.abs(base), [np.abs(each) for each in factors], abs(target.scale))
    slack = 1e-6 * float(bound.max()) * (inner + rank)
    return MapExample(target, dict(zip(ROLES, factors, strict=True)), base.reshape(out, -1), mapped, slack)


class TestLycorisGlora(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return glora_examples()


def test_the_rank_is_that_of_all_four() -> None:
    target = make_target([np.ones(s) for s in ((5, 2), (2, 5), (4, 2), (2, 5))], SlotKind.LINEAR, MULTIPLIER)
    assert KIND.rank(target.factors) == 2
    assert KIND.changes(target)[0].shape == (4, 5)
    assert not KIND.check(target)


MULTIPLIER = Scaling(ScalingRule.MULTIPLIER, 1.0)


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 2), (2, 4), (4, 2), (2, 5)),
        ((5, 2), (2, 5), (4, 3), (2, 5)),
        ((4, 2), (2, 4), (4, 2), (2, 5)),
        ((5, 2, 1, 1), (2, 5, 1, 1), (4, 2, 1, 1), (2, 5, 3, 3)),
    ],
    ids=str,
)
def test_shapes_that_do_not_belong_together(shapes: tuple[tuple[int, ...], ...]) -> None:
    target = make_target([np.ones(shape, np.float32) for shape in shapes], SlotKind.LINEAR, MULTIPLIER)
    assert [problem.code for problem in KIND.check(target)] == ["LF203"]
