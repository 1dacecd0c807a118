"""DoRA over inputs (LyCORIS, mlx-lm), and of LoHa and LoKr: the formula written out, number by number."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds.dora import KIND as DORA
from loraformat.kinds.dora_loha import KIND as DORA_LOHA
from loraformat.kinds.dora_lokr import KIND as DORA_LOKR

KERNELS = [(3,), (1, 1), (2, 3)]
EPSILON = np.finfo(np.float32).eps
SCALING = Scaling(ScalingRule.ALPHA_OVER_RANK, 2.0)


def bring_to_length(moved: NDArray[Any], lengths: NDArray[Any], axis: int, epsilon: float) -> NDArray[np.float64]:
    """Return W + Δ `(out, in, kernel)` with every output (axis 0) or input (axis 1) of its length."""
    done = np.empty_like(moved)
    for place, length in enumerate(lengths.reshape(-1)):
        here = (place,) if axis == 0 else (slice(None), place)
        done[here] = moved[here] * (length / (np.sqrt((moved[here] ** 2).sum()) + epsilon))
    return done


def make_example(
    kind: str, slot: SlotKind, arrays: dict[str, NDArray[Any]], rank: int, base: NDArray[Any], mapped: NDArray[Any]
) -> MapExample:
    factors = {role: MemoryFactor(role, array) for role, array in arrays.items()}
    target = Target("m.q", kind, slot, factors, rank, SCALING)
    out = len(base)
    return MapExample(target, arrays, base.reshape(out, -1), mapped.reshape(out, -1), 1e-2, base.shape)


@st.composite
def input_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.CONV, SlotKind.EMBEDDING]))
    kernel = draw(st.sampled_from(KERNELS)) if slot is SlotKind.CONV else ()
    out, inner, rank = draw(st.integers(2, 6)), draw(st.integers(2, 6)), draw(st.integers(1, 3))
    assume(out != inner * int(np.prod(kernel)))
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    table, ones = slot is SlotKind.EMBEDDING, tuple(1 for _ in kernel)
    down, up = dice.standard_normal((rank, inner, *kernel)), dice.standard_normal((out, rank, *ones))
    names = ("lora_embedding_A", "lora_embedding_B", "m") if table else ("lora_A.weight", "lora_B.weight", "dora_scale")
    lengths = dice.random((inner,) if table else (1, inner, *ones)) + 0.5
    base = dice.standard_normal((out, inner, *kernel))
    change = np.einsum("or,r...->o...", up.reshape(out, rank), down) * 2.0 / rank
    mapped = bring_to_length(base + change, lengths, 1, 0.0 if table else EPSILON)
    return make_example("dora", slot, dict(zip(names, (down, up, lengths), strict=True)), rank, base, mapped)


def draw_lengths(draw: st.DrawFn, dice: Any, shape: tuple[int, ...]) -> tuple[str, NDArray[Any], int]:
    """Return the role, the lengths, and the axis that they are of."""
    axis = draw(st.integers(0, 1))
    lengths = dice.random(shape[axis]) + 0.5
    ones = tuple(1 for _ in shape[2:])
    if axis:
        return "dora_scale", lengths.reshape(1, -1, *ones), 1
    return "lora_magnitude_vector", lengths.reshape(1, -1, *ones) if ones else lengths, 0


@st.composite
def loha_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.CONV]))
    kernel = draw(st.sampled_from(KERNELS)) if slot is SlotKind.CONV else ()
    out, inner, rank = draw(st.integers(2, 6)), draw(st.integers(2, 6)), draw(st.integers(1, 3))
    columns = inner * int(np.prod(kernel))
    assume(out != columns)
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    shapes = {
        "hada_w1_a": (out, rank),
        "hada_w1_b": (rank, columns),
        "hada_w2_a": (out, rank),
        "hada_w2_b": (rank, columns),
    }
    arrays = {role: dice.standard_normal(shape) for role, shape in shapes.items()}
    one, other = (arrays[f"hada_w{n}_a"] @ arrays[f"hada_w{n}_b"] for n in (1, 2))
    base = dice.standard_normal((out, inner, *kernel))
    role, lengths, axis = draw_lengths(draw, dice, base.shape)
    arrays[role] = lengths
    moved = base + (one * other).reshape(base.shape) * 2.0 / rank
    return make_example("dora_loha", slot, arrays, rank, base, bring_to_length(moved, lengths, axis, EPSILON))


@st.composite
def lokr_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.CONV]))
    kernel = draw(st.sampled_from(KERNELS)) if slot is SlotKind.CONV else ()
    sizes = [draw(st.integers(1, 3)) for _ in range(4)]
    rank = draw(st.integers(1, 2))
    out, inner, places = sizes[0] * sizes[2], sizes[1] * sizes[3], int(np.prod(kernel))
    assume(out != inner * places)
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrays = {
        "lokr_w1": dice.standard_normal(sizes[:2]),
        "lokr_w2_a": dice.standard_normal((sizes[2], rank)),
        "lokr_w2_b": dice.standard_normal((rank, sizes[3] * places)),
    }
    right = (arrays["lokr_w2_a"] @ arrays["lokr_w2_b"]).reshape(sizes[2], sizes[3], places)
    base = dice.standard_normal((out, inner, *kernel))
    change = np.einsum("ab,cdk->acbdk", arrays["lokr_w1"], right).reshape(base.shape) * 2.0 / rank
    role, lengths, axis = draw_lengths(draw, dice, base.shape)
    arrays[role] = lengths
    return make_example("dora_lokr", slot, arrays, rank, base, bring_to_length(base + change, lengths, axis, EPSILON))


class TestDoraOverInputs(MappingKindLaws):
    kind = DORA

    def examples(self) -> st.SearchStrategy[MapExample]:
        return input_examples()

    def needs(self, target: Target) -> list[str]:
        return sorted(target.factors)


class TestDoraLoha(MappingKindLaws):
    kind = DORA_LOHA

    def examples(self) -> st.SearchStrategy[MapExample]:
        return loha_examples()

    def needs(self, target: Target) -> list[str]:
        return sorted(target.factors)


class TestDoraLokr(MappingKindLaws):
    kind = DORA_LOKR

    def examples(self) -> st.SearchStrategy[MapExample]:
        return lokr_examples()

    def needs(self, target: Target) -> list[str]:
        return sorted(target.factors)


@pytest.mark.parametrize(("role", "shape"), [("dora_scale", (1, 4)), ("dora_scale", (3,)), ("m", (1, 3))], ids=str)
def test_lengths_of_other_inputs(role: str, shape: tuple[int, ...]) -> None:
    arrays = {"lora_A.weight": np.ones((1, 3)), "lora_B.weight": np.ones((2, 1)), role: np.ones(shape)}
    factors = {name: MemoryFactor(name, array) for name, array in arrays.items()}
    problems = DORA.check(Target("m", "dora", SlotKind.LINEAR, factors, 1, SCALING))
    assert {problem.code for problem in problems} <= {"LF203", "LF201", "LF202"}
    assert problems
