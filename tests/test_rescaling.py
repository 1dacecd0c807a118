"""The same change under another scale: nothing, a power of two, float32, and what only the user may allow."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from builders import MemoryFactor
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.rescaling import rescale

BFLOAT16 = ml_dtypes.bfloat16
ONE = Scaling(ScalingRule.MULTIPLIER, 1.0)


def target(scale: float, form: Any = BFLOAT16, *, up: Any = None, role: str = "lora_B.weight", **more: Any) -> Target:
    dice = np.random.default_rng(1)
    values = dice.standard_normal((6, 2)).astype(form) if up is None else np.asarray(up, form)
    arrays = {"lora_A.weight": dice.standard_normal((2, 5)).astype(form), role: values, **more}
    factors = {name: MemoryFactor(name, array) for name, array in arrays.items()}
    return Target("m", "lora", SlotKind.LINEAR, factors, 2, Scaling(ScalingRule.MULTIPLIER, scale))


def change(item: Target) -> np.ndarray[Any, Any]:
    down, up = (item.factors[role].read().astype(np.float64) for role in ("lora_A.weight", "lora_B.weight"))
    return item.scale * (up @ down)


def test_equal_scales_change_nothing() -> None:
    item = target(2.0)
    moved = rescale(item, Scaling(ScalingRule.ALPHA_OVER_RANK, 4.0))
    assert moved.problem is None
    assert moved.target.factors == item.factors


@pytest.mark.parametrize("scale", [0.25, 2.0, -8.0])
def test_powers_of_two_are_exact_in_the_tensors_own_form(scale: float) -> None:
    item = target(scale)
    moved = rescale(item, ONE)
    assert moved.problem is None
    assert moved.target.factors["lora_B.weight"].dtype.name == "bfloat16"
    np.testing.assert_array_equal(change(moved.target), change(item))


@pytest.mark.parametrize("form", [BFLOAT16, np.float16])
def test_other_scales_widen_the_one_tensor(form: Any) -> None:
    item = target(0.3, form)
    moved = rescale(item, ONE)
    assert moved.problem is not None
    assert (moved.problem.code, moved.problem.severity) == ("LF320", "note")
    forms = {role: factor.dtype.name for role, factor in moved.target.factors.items()}
    assert forms == {"lora_A.weight": np.dtype(form).name, "lora_B.weight": "float32"}
    np.testing.assert_allclose(change(moved.target), change(item), rtol=1e-6)


@pytest.mark.parametrize(("form", "forms"), [(np.float32, frozenset()), (BFLOAT16, frozenset({"bfloat16"}))])
def test_where_no_wider_form_is_the_user_must_allow_it(form: Any, forms: frozenset[str]) -> None:
    moved = rescale(target(0.3, form), ONE, forms)
    assert moved.problem is not None
    assert (moved.problem.code, moved.problem.severity) == ("LF313", "error")
    assert "relative error" in moved.problem.found


def test_a_power_of_two_that_loses_bits_is_no_exact_one() -> None:
    """Half of float16's smallest number is 0, and twice its largest is infinite."""
    for scale, value in ((0.5, 6e-8), (2.0, 60000.0)):
        moved = rescale(target(scale, np.float16, up=np.full((6, 2), value)), ONE)
        assert moved.problem is not None
        assert moved.target.factors["lora_B.weight"].dtype.name == "float32"


def test_a_bias_of_b_is_scaled_with_it() -> None:
    item = target(0.5, np.float32, **{"lora_B.bias": np.ones(6, np.float32)})
    moved = rescale(item, ONE).target
    np.testing.assert_array_equal(moved.factors["lora_B.bias"].read(), np.full(6, 0.5))


def test_a_scale_of_zero_cannot_be_undone() -> None:
    problem = rescale(target(0.5), Scaling(ScalingRule.MULTIPLIER, 0.0)).problem
    assert problem is not None
    assert problem.code == "LF313"


def test_factors_that_take_no_scale() -> None:
    item = target(0.5, role="oft_blocks")
    problem = rescale(item, ONE).problem
    assert problem is not None
    assert "'lora'" in problem.found
