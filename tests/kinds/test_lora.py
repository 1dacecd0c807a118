"""LoRA against einsum in float64, and what its shapes are refused for."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import Example, KindLaws, main_change, whole
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.dtypes import BY_NAME
from loraformat.kinds import Nature
from loraformat.kinds.lora import KIND

LINEAR_ROLES = ("lora_A.weight", "lora_B.weight")
EMBEDDING_ROLES = ("lora_embedding_A", "lora_embedding_B")
SCALINGS = st.builds(Scaling, st.sampled_from(ScalingRule), st.sampled_from([16.0, 1.0, 0.3, -2.0]))
KERNELS: list[tuple[int, ...]] = [(1,), (3,), (1, 1), (3, 3), (2, 5), (1, 1, 1), (2, 3, 1)]


def make_target(
    down: NDArray[Any], up: NDArray[Any], slot: SlotKind, scaling: Scaling | None = None, rank: int | None = None
) -> Target:
    roles = EMBEDDING_ROLES if slot is SlotKind.EMBEDDING else LINEAR_ROLES
    factors = {role: MemoryFactor(role, array) for role, array in zip(roles, (down, up), strict=True)}
    stated = rank if rank is not None else down.shape[0]
    return Target("m.q", "lora", slot, factors, stated, scaling or Scaling(ScalingRule.MULTIPLIER, 1.0))


def make_dense(down: NDArray[Any], up: NDArray[Any]) -> NDArray[np.float64]:
    """Arithmetic of the paper, in float64 and without a matrix product: ΔW[o, i] = Σ_r B[o, r]·A[r, i]."""
    flat_down = down.astype(np.float64).reshape(down.shape[0], -1)
    flat_up = up.astype(np.float64).reshape(up.shape[0], -1)
    return np.einsum("or,ri->oi", flat_up, flat_down)


@st.composite
def lora_examples(draw: st.DrawFn) -> Example:
    slot = draw(st.sampled_from(sorted(set(SlotKind) - {SlotKind.PARAMETER})))
    kernel = draw(st.sampled_from(KERNELS)) if slot is SlotKind.CONV else ()
    out, inner = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda sizes: sizes[0] != sizes[1]))
    rank = draw(st.integers(1, 6))
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    down = dice.standard_normal((rank, inner, *kernel)).astype(dtype)
    up = dice.standard_normal((out, rank, *(1 for _ in kernel))).astype(dtype)
    target = make_target(down, up, slot, draw(SCALINGS))
    arrays = {role: factor.read() for role, factor in target.factors.items()}
    return Example(target, arrays, make_dense(down, up), make_dense(np.abs(down), np.abs(up)))


class TestLora(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return lora_examples()


def codes(target: Target) -> list[str]:
    return [problem.code for problem in KIND.check(target)]


def zeros(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


def test_it_is_additive() -> None:
    assert KIND.nature is Nature.ADDITIVE


def test_a_number_worked_out_by_hand() -> None:
    down, up = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), np.array([[1.0, 10.0], [100.0, 1000.0]])
    target = make_target(down, up, SlotKind.LINEAR)
    delta = KIND.delta(target, main_change(KIND, target), {"lora_A.weight": down, "lora_B.weight": up}, 0.5)
    np.testing.assert_array_equal(whole(delta, np.float64), [[20.5, 26.0, 31.5], [2050.0, 2600.0, 3150.0]])
    assert main_change(KIND, target).shape == (2, 3)


def test_a_kernel_keeps_the_order_of_its_axes() -> None:
    """The peer's way: a convolution of kernels, one output at a time."""
    dice = np.random.default_rng(0)
    down, up = dice.standard_normal((2, 3, 5, 4)), dice.standard_normal((6, 2, 1, 1))
    target = make_target(down, up, SlotKind.CONV)
    delta = KIND.delta(target, main_change(KIND, target), {"lora_A.weight": down, "lora_B.weight": up}, 1.0)
    kernels = np.stack([sum(up[o, r, 0, 0] * down[r] for r in range(2)) for o in range(6)])
    assert main_change(KIND, target).shape == kernels.shape
    np.testing.assert_allclose(whole(delta, np.float64).reshape(kernels.shape), kernels, rtol=1e-13)


def test_the_scale_is_folded_in_before_it_is_rounded() -> None:
    """A tenth is no float32: rounded first and then multiplied, 9 becomes another number than 0.9."""
    down, up = np.ones((1, 1), np.float32), np.full((2, 1), 9.0, np.float32)
    target = make_target(down, up, SlotKind.LINEAR)
    delta = KIND.delta(target, main_change(KIND, target), {"lora_A.weight": down, "lora_B.weight": up}, 0.1)
    assert (whole(delta, np.float32) == np.float32(0.1 * 9.0)).all()
    assert np.float32(0.1) * np.float32(9.0) != np.float32(0.1 * 9.0)


def test_float32_factors_make_a_float32_change() -> None:
    down, up = zeros(2, 3), zeros(4, 2)
    target = make_target(down, up, SlotKind.LINEAR)
    delta = KIND.delta(target, main_change(KIND, target), {"lora_A.weight": down, "lora_B.weight": up}, 1.0)
    assert {array.dtype for array in (delta.left, delta.right)} == {np.dtype(np.float32)}


def test_the_norm_of_a_large_embedding_needs_no_large_matrix() -> None:
    down, up = np.ones((1, 200_000), np.float32), np.ones((50_000, 1), np.float32)  # dense: 80 GB
    target = make_target(down, up, SlotKind.EMBEDDING, Scaling(ScalingRule.MULTIPLIER, -2.0))
    norm = KIND.norm(target, {"lora_embedding_A": down, "lora_embedding_B": up})
    assert norm == pytest.approx(2 * np.sqrt(200_000 * 50_000))


@pytest.mark.parametrize(
    ("down", "up"),
    [((0, 4), (6, 0)), ((0,), (6, 0)), ((0,), (0,)), ((), (6, 2)), ((2, 4), ()), ((0, 4), (6, 2)), ((2, 4), (6, 0))],
    ids=str,
)
def test_a_rank_of_zero_is_said(down: tuple[int, ...], up: tuple[int, ...]) -> None:
    assert codes(make_target(zeros(*down), zeros(*up), SlotKind.LINEAR, rank=0)) == ["LF204"]


@pytest.mark.parametrize(
    ("down", "up", "slot"),
    [
        ((2, 4), (6, 3), SlotKind.LINEAR),
        ((2, 4), (3, 6), SlotKind.EMBEDDING),
        ((2, 4, 1), (6, 2, 1), SlotKind.LINEAR),
        ((2, 4), (6, 2), SlotKind.CONV),
        ((2, 4, 3), (6, 2), SlotKind.CONV),
        ((2, 4, 3), (6, 2, 3), SlotKind.CONV),
        ((2, 4, 3), (6, 3, 1), SlotKind.CONV),
        ((2, 4, 1, 1, 1, 1), (6, 2, 1, 1, 1, 1), SlotKind.CONV),
        ((2,), (6, 2), SlotKind.LINEAR),
        ((2, 0), (6, 2), SlotKind.LINEAR),
        ((2, 4), (0, 2), SlotKind.LINEAR),
        ((2, 4, 0), (6, 2, 1), SlotKind.CONV),
    ],
    ids=str,
)
def test_shapes_that_do_not_belong_together(down: tuple[int, ...], up: tuple[int, ...], slot: SlotKind) -> None:
    assert codes(make_target(zeros(*down), zeros(*up), slot)) == ["LF203"]


def test_a_grouped_convolution_is_called_by_its_name() -> None:
    problems = KIND.check(make_target(zeros(4, 3, 3, 3), zeros(8, 2, 1, 1), SlotKind.CONV))
    assert [problem.code for problem in problems] == ["LF209"]
    assert "grouped convolution" in problems[0].advice


def test_a_rank_above_both_sides_is_legal_and_odd() -> None:
    problems = KIND.check(make_target(zeros(5, 4), zeros(6, 5), SlotKind.LINEAR))
    assert [(problem.code, problem.severity) for problem in problems] == [("LF206", "warning")]
    assert not KIND.check(make_target(zeros(4, 4), zeros(6, 4), SlotKind.LINEAR))


def test_both_factors_of_the_wrong_number_form_are_named() -> None:
    down, up = zeros(2, 4).astype(np.int8), zeros(6, 2).astype(np.uint16)
    problems = KIND.check(make_target(down, up, SlotKind.LINEAR))
    assert [(problem.code, problem.found) for problem in problems] == [("LF210", "int8"), ("LF210", "uint16")]


@pytest.mark.parametrize("name", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_any_floating_point_form_will_do(name: str) -> None:
    form = BY_NAME[name].numpy()
    assert not codes(make_target(zeros(2, 4).astype(form), zeros(6, 2).astype(form), SlotKind.LINEAR))


def test_the_names_of_an_embedding_are_not_those_of_a_linear_module() -> None:
    """Mixed names would be two adapters in one target; one of them would be dropped."""
    linear = make_target(zeros(2, 4), zeros(6, 2), SlotKind.LINEAR).factors
    table = make_target(zeros(2, 4), zeros(6, 2), SlotKind.EMBEDDING).factors
    scaling = Scaling(ScalingRule.MULTIPLIER, 1.0)
    assert codes(Target("m", "lora", SlotKind.LINEAR, {**linear, **table}, 2, scaling)) == ["LF202"]
    assert set(codes(Target("m", "lora", SlotKind.EMBEDDING, linear, 2, scaling))) == {"LF201", "LF202"}


def test_a_rank_that_the_factors_cannot_tell_is_zero() -> None:
    assert KIND.rank({}) == 0
    assert KIND.rank({"lora_A.weight": zeros()}) == 0
    assert KIND.rank({"lora_embedding_A": zeros(3, 2)}) == 3


def test_an_unchecked_target_is_not_guessed_about() -> None:
    target = make_target(zeros(2, 4), zeros(6, 2), SlotKind.LINEAR)
    with pytest.raises(ValueError, match="check the target first"):
        KIND.delta(target, main_change(KIND, target), {"lora_A.weight": zeros(2, 4)}, 1.0)
