"""Replacement: the values are the saved ones, whatever way they are asked for, and what its target is refused for."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import Held, ReplacingKindLaws, main_change, whole
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.dtypes import BY_NAME
from loraformat.kinds import Nature
from loraformat.kinds.replace import KIND
from loraformat.rules import is_mergeable

SHAPES: list[tuple[int, ...]] = [(1,), (7,), (2, 5), (5, 2), (1, 4), (3, 2, 4), (4, 3, 2, 5), (2, 3, 1, 2, 4), (2,) * 8]


def make_target(scale: float = 1.0, **arrays: NDArray[Any]) -> Target:
    factors = {role: MemoryFactor(role, array) for role, array in arrays.items()}
    return Target("m.head", "replace", SlotKind.PARAMETER, factors, 0, Scaling(ScalingRule.MULTIPLIER, scale))


@st.composite
def saved_modules(draw: st.DrawFn) -> Held:
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    shape = draw(st.sampled_from(SHAPES))
    roles = draw(st.sampled_from([("weight",), ("bias",), ("weight", "bias")]))
    made = {"weight": dice.standard_normal(shape).astype(dtype), "bias": dice.standard_normal(shape[0]).astype(dtype)}
    target = make_target(draw(st.sampled_from([1.0, 0.5, -2.0])), **{role: made[role] for role in roles})
    return Held(target, {role: factor.read() for role, factor in target.factors.items()})


class TestReplace(ReplacingKindLaws):
    kind = KIND
    unknown_role = "lora_A.weight"  # A name without dots may be a parameter's.

    def examples(self) -> st.SearchStrategy[Held]:
        return saved_modules()


def codes(target: Target) -> list[str]:
    return [problem.code for problem in KIND.check(target)]


def take(parameter: str = "weight", **arrays: Any) -> Any:
    target = make_target(**arrays)
    return KIND.value(target, main_change(KIND, target, parameter), arrays)


def test_it_is_a_replacement_and_can_be_merged() -> None:
    assert KIND.nature is Nature.REPLACEMENT
    assert is_mergeable("replace")


def test_a_parameter_may_have_any_name() -> None:
    token = np.arange(5, dtype=np.float32).reshape(1, 1, 5)
    target = make_target(cls_token=token)
    assert codes(target) == []
    (change,) = KIND.changes(target)
    assert (change.parameter, change.shape) == ("cls_token", (1, 1, 5))
    np.testing.assert_array_equal(whole(take("cls_token", cls_token=token), np.float32).reshape(-1), token[0, 0])
    assert codes(make_target(**{"1st": token})) == ["LF202"]


def test_a_kernel_keeps_the_order_of_its_axes() -> None:
    kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    found = whole(take(weight=kernel), np.float32)
    np.testing.assert_array_equal(found, [list(range(12)), list(range(12, 24))])


def test_strided_values_are_taken_in_their_order() -> None:
    """As a checkpoint may hold them; the transposed one too."""
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    values = take(weight=turned)
    np.testing.assert_array_equal(whole(values, np.float32), [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(whole(values.transposed(), np.float32), [[0, 1, 2], [3, 4, 5]])


def test_a_vector_is_a_column() -> None:
    values = take("bias", weight=np.eye(3), bias=np.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(whole(values, np.float64), [[1.0], [2.0], [3.0]])


def test_special_values_stay_to_the_bit() -> None:
    saved = np.array([-0.0, 5e-324, 1.7e308, 0.1])
    assert whole(take("bias", bias=saved), np.float64).tobytes() == saved.tobytes()


@pytest.mark.parametrize(
    "name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]
)
def test_any_form_that_holds_trained_numbers_will_do(name: str) -> None:
    assert not codes(make_target(weight=np.ones((2, 3)).astype(BY_NAME[name].numpy())))


@pytest.mark.parametrize("name", ["float8_e8m0fnu", "float4_e2m1fn", "int8", "bool"])
def test_no_other_form_will(name: str) -> None:
    assert codes(make_target(weight=np.ones((2, 3)).astype(BY_NAME[name].numpy()))) == ["LF210"]


def test_each_parameter_is_judged_by_itself() -> None:
    target = make_target(weight=np.ones((2, 3), np.int8), bias=np.ones((0,), np.float32))
    assert [(problem.code, problem.where) for problem in KIND.check(target)] == [
        ("LF210", "m.head: weight"),
        ("LF203", "m.head: bias"),
    ]


def test_the_roles_of_lora_are_none_of_its_own() -> None:
    target = make_target(weight=np.ones((2, 3)), **{"lora_A.weight": np.ones((1, 3))})
    assert codes(target) == ["LF202"]
