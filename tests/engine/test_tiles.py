"""The numbers of a merge, against W + s·B·A in float64, rounded once to the stored form.

Two sorts of checks. With dyadic factors every product and sum is exact in float32, so the merged bits must be exactly
those of the oracle. With random factors float32 arithmetic shows: the sum may be off by its own rounding, which decides
the last bit of a float32 weight (one ulp), and that of a narrower one only where the true sum lies next to the middle
between two of its numbers.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import loraformat
from builders import Factors, lora_factors
from graphs import (
    FORMS,
    Array,
    dyadic,
    dyadic_factors,
    make_adapter,
    make_target,
    product,
    read_state,
    round_once,
    same_bits,
    write_state,
)
from loraformat.adapter import Adapter, SlotKind
from loraformat.engine.tile_sums import TileSums
from loraformat.engine.tiles import TileBuffers
from loraformat.receipt import Receipt

NARROW = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
UNTOLD = -9.0
"""A `min_retained` that refuses nothing."""


def merge_state(folder: Path, weight: Array, *adapters: Any, **options: Any) -> tuple[Array, Receipt]:
    """Merge into a state dict of the one weight `m`; return the merged weight and the receipt."""
    base = write_state(folder / "base.safetensors", {"m.weight": weight})
    options = {"min_retained": UNTOLD, "force": True} | options
    receipt = loraformat.merge(base, list(adapters), folder / "out.safetensors", **options)
    return read_state(folder / "out.safetensors")["m.weight"], receipt


def adapter_of(factors: Factors, scale: float = 1.0, slot: SlotKind = SlotKind.LINEAR) -> Adapter:
    return make_adapter(make_target("m", factors, slot, scale))


def wide(array: Array) -> Array:
    return array.astype(np.float64)


# --- to the bit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (9, 1), (300, 41)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_exact_sums_are_rounded_once(tmp_path: Path, form: str, shape: tuple[int, int], turned: bool) -> None:
    rng = np.random.default_rng(41)
    out, inner = shape
    stored = (dyadic(rng, out, inner, reach=64) / 8).astype(FORMS[form])
    factors = dyadic_factors(rng, out, inner, 2)
    slot = SlotKind.LINEAR_TRANSPOSED if turned else SlotKind.LINEAR
    base = np.ascontiguousarray(stored.T) if turned else stored
    merged, _ = merge_state(tmp_path, base, adapter_of(factors, 0.75, slot))
    expected = round_once(wide(stored) + product(factors, 0.75), FORMS[form])
    assert same_bits(np.ascontiguousarray(merged.T) if turned else merged, expected)
    assert merged.tobytes() != base.tobytes()


@given(
    stored=hnp.arrays(np.uint8, (6, 4)),
    form=st.sampled_from(["float8_e4m3fn", "float8_e5m2"]),
    seed=st.integers(0, 2**32),
)
def test_every_pattern_of_eight_bits(tmp_path_factory: Any, stored: Array, form: str, seed: int) -> None:
    """Any stored number may meet any change; infinities and NaN aside, and where the sum leaves the range."""
    rng = np.random.default_rng(seed)
    weight = stored.view(FORMS[form])
    factors = dyadic_factors(rng, 6, 4, 1)
    exact = wide(weight) + product(factors)
    limit = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}[form]
    weight = np.where(np.abs(exact) < limit, weight, np.zeros_like(weight))
    folder = tmp_path_factory.mktemp("bits")
    merged, _ = merge_state(folder, weight, adapter_of(factors))
    expected = round_once(wide(weight) + product(factors), FORMS[form])
    nonzero = wide(expected) != 0  # A sum of zero has no sign of its own to keep.
    assert merged[nonzero].tobytes() == expected[nonzero].tobytes()
    assert not wide(merged)[~nonzero].any()


SMALLEST = {
    "float64": -1074,
    "float32": -149,
    "float16": -24,
    "bfloat16": -133,
    "float8_e4m3fn": -9,
    "float8_e5m2": -16,
}
"""Exponent of the smallest number above zero."""


@pytest.mark.parametrize("form", FORMS)
def test_weights_below_the_normal_range(tmp_path: Path, form: str) -> None:
    """Subnormal numbers of the stored form are numbers like others."""
    smallest = {"float64": -1074, "float32": -149, "float16": -24, "bfloat16": -133}.get(
        form, -9 - 7 * (form[-1] == "2")
    )
    tiny = 2.0**smallest
    stored = (np.arange(-6, 6).reshape(3, 4) * tiny).astype(FORMS[form])
    assert len(np.unique(wide(stored))) == 12
    factors = np.full((1, 4), 2.0 ** (smallest // 2)), np.full((3, 1), 2.0 ** (smallest - smallest // 2))
    factors = (factors[0].astype(np.float64), factors[1].astype(np.float64))
    merged, _ = merge_state(tmp_path, stored, adapter_of(factors, 4.0))
    assert same_bits(merged, (wide(stored) + 4 * tiny).astype(FORMS[form]))


def test_a_zero_change_leaves_every_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(42)
    stored = rng.standard_normal((64, 50)).astype(FORMS["bfloat16"])
    down, up = dyadic_factors(rng, 64, 50, 2)
    merged, receipt = merge_state(tmp_path, stored, adapter_of((down, np.zeros_like(up))))
    assert same_bits(merged, stored)
    assert receipt.weights[0].retained == 1.0
    assert receipt.weights[0].relative == 0.0


def test_minus_the_adapter_takes_it_out_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(43)
    stored, factors = dyadic(rng, 30, 20), dyadic_factors(rng, 30, 20, 2)
    added, _ = merge_state(tmp_path, stored, adapter_of(factors))
    taken, _ = merge_state(tmp_path, added, (adapter_of(factors), -1.0))
    assert same_bits(taken, stored)


@pytest.mark.parametrize("form", [np.float16, np.float64, "bfloat16"])
def test_factors_may_be_of_any_form(tmp_path: Path, form: Any) -> None:
    rng = np.random.default_rng(44)
    stored, factors = dyadic(rng, 8, 6), dyadic_factors(rng, 8, 6, 2)
    form = FORMS.get(str(form), form)
    merged, _ = merge_state(tmp_path, stored, adapter_of((factors[0].astype(form), factors[1].astype(form)), 0.5))
    assert same_bits(merged, round_once(wide(stored) + product(factors, 0.5), FORMS["float32"]))


# --- with rounding on the way ----------------------------------------------------------------------------------------


def random_case(form: str, shape: tuple[int, int] = (500, 400), size: float = 0.05) -> tuple[Array, Factors, Array]:
    """Return a weight, factors of rank 8, and the exact sum."""
    rng = np.random.default_rng(45)
    stored = rng.standard_normal(shape).astype(FORMS[form])
    down, up = lora_factors(rng, *shape, 8)
    factors = down, (up * np.float32(size)).astype(np.float32)
    return stored, factors, wide(stored) + product(factors, 1.25)


def test_float32_is_within_one_ulp(tmp_path: Path) -> None:
    """Half an ulp is the last rounding's; the change is computed in float32 with an error far below the other half."""
    stored, factors, exact = random_case("float32", size=0.01)
    merged, _ = merge_state(tmp_path, stored, adapter_of(factors, 1.25))
    rounded = exact.astype(np.float32)
    near = np.abs(exact) > 0.5  # Where the sum all but cancels, the error of the change is larger than the sum's ulp.
    ulps = np.abs(wide(merged) - wide(rounded)) / np.spacing(np.abs(rounded))
    assert ulps[near].max() <= 1.0
    assert (ulps[near] == 0).mean() > 0.8
    assert np.abs(merged - exact).max() < 1e-6


def test_float64_is_within_one_ulp_of_its_own(tmp_path: Path) -> None:
    """Its tiles are float64 throughout: float32 anywhere would be off by 2²⁹ ulps."""
    stored, factors, _ = random_case("float64", size=0.01)
    factors = wide(factors[0]), wide(factors[1])
    merged, _ = merge_state(tmp_path, stored, adapter_of(factors, 1.25))
    # B @ A by another route, in extended precision where the machine has it.
    delta = 1.25 * (factors[1].astype(np.longdouble) @ factors[0].astype(np.longdouble))
    exact = stored.astype(np.longdouble) + delta
    near = np.abs(exact) > 0.5
    ulps = np.abs(merged.astype(np.longdouble) - exact) / np.spacing(np.abs(wide(exact)))
    assert ulps[near].max() <= 1.0
    assert (ulps[near] <= 0.5).mean() > 0.8


@pytest.mark.parametrize(
    ("form", "share"), [("bfloat16", 3e-5), ("float16", 2e-4), ("float8_e4m3fn", 2e-6), ("float8_e5m2", 2e-6)]
)
def test_narrow_forms_are_rounded_right_but_beside_the_middle(tmp_path: Path, form: str, share: float) -> None:
    """The float32 sum hits a middle between two stored numbers about once in 2¹⁶ (bfloat16) or 2¹³ (float16) times.

    Only there may the second rounding go astray, and then the sum is as near to the one neighbour as to the other.
    """
    stored, factors, exact = random_case(form, (1500, 1000))
    merged, _ = merge_state(tmp_path, stored, adapter_of(factors, 1.25))
    expected = round_once(exact, FORMS[form])
    wrong = merged != expected
    assert wrong.mean() <= share
    to_merged, to_expected = np.abs(exact - wide(merged))[wrong], np.abs(exact - wide(expected))[wrong]
    np.testing.assert_allclose(to_merged, to_expected, rtol=0, atol=1e-6)


# --- several adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_weighted_adapters_are_summed_before_the_one_rounding(tmp_path: Path, form: str) -> None:
    rng = np.random.default_rng(46)
    stored = (dyadic(rng, 40, 30, reach=64) / 8).astype(FORMS[form])
    several = [dyadic_factors(rng, 40, 30, rank) for rank in (1, 2, 3)]
    weights = (1.0, 0.5, -0.25)
    adapters = [(adapter_of(factors), weight) for factors, weight in zip(several, weights, strict=True)]
    merged, receipt = merge_state(tmp_path, stored, *adapters)
    delta = sum(product(factors, weight) for factors, weight in zip(several, weights, strict=True))
    assert same_bits(merged, round_once(wide(stored) + delta, FORMS[form]))
    assert receipt.weights[0].scales == weights
    assert receipt.weights[0].targets == ("m", "m", "m")


def test_two_merges_one_after_the_other_round_twice(tmp_path: Path) -> None:
    """The reason for giving all adapters at once: half a step, twice, is lost by two merges and kept by one."""
    weight = np.ones((4, 4), FORMS["bfloat16"])
    step = 2.0**-7  # between 1 and the next bfloat16
    half = np.full((1, 4), step / 2, np.float32), np.ones((4, 1), np.float32)
    together, _ = merge_state(tmp_path, weight, adapter_of(half), adapter_of(half))
    once, _ = merge_state(tmp_path, weight, adapter_of(half))
    twice, _ = merge_state(tmp_path, once, adapter_of(half))
    assert (wide(together) == 1 + step).all()
    assert (wide(twice) == 1.0).all(), "ties go to even: each half step is lost"


def test_adapters_that_cancel_leave_the_weight(tmp_path: Path) -> None:
    rng = np.random.default_rng(47)
    stored = rng.standard_normal((20, 10)).astype(np.float32)
    factors = lora_factors(rng, 20, 10, 4)
    merged, receipt = merge_state(tmp_path, stored, (adapter_of(factors), 1.0), (adapter_of(factors), -1.0))
    assert same_bits(merged, stored)
    assert receipt.weights[0].retained == 1.0


# --- what the receipt says about the numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "near"), [((170, 700), 1e-3), ((1100, 700), 0.05)])
def test_retained_and_relative_are_what_they_say(
    tmp_path: Path, form: str, shape: tuple[int, int], near: float
) -> None:
    """Σ Δ·(W′−W) / Σ Δ² and ‖Δ‖ / ‖W‖; of a large weight from a part of it, over tiles of different heights."""
    stored, factors, exact = random_case(form, shape, 0.02)
    merged, receipt = merge_state(tmp_path, stored, adapter_of(factors, 1.25))
    delta = exact - wide(stored)
    kept = float(((wide(merged) - wide(stored)) * delta).sum() / (delta**2).sum())
    assert receipt.weights[0].retained == pytest.approx(kept, rel=near)
    ratio = np.linalg.norm(delta) / np.linalg.norm(wide(stored))
    assert receipt.weights[0].relative == pytest.approx(ratio, rel=near)


@pytest.mark.parametrize("form", FORMS)
def test_error_is_the_largest_rounding_error_beside_the_largest_number(tmp_path: Path, form: str) -> None:
    """Of one tile; the sum of dyadic numbers is exact, so that all of the error is that of the last rounding."""
    rng, scale = np.random.default_rng(71), 1 + 2.0**-9
    stored, factors = (dyadic(rng, 30, 20, reach=64) / 8).astype(FORMS[form]), dyadic_factors(rng, 30, 20, 2)
    merged, receipt = merge_state(tmp_path, stored, adapter_of(factors, scale))
    exact = wide(stored) + product(factors, scale)
    error = np.abs(wide(merged) - exact).max() / np.abs(exact).max()
    assert receipt.weights[0].error == pytest.approx(error, rel=1e-5)
    assert (error > 0) == (form in NARROW)


@pytest.mark.parametrize("form", ["float32", "float64"])
def test_tiles_without_sums_are_merged_and_looked_at_all_the_same(tmp_path: Path, form: str) -> None:
    stored, factors, exact = random_case(form, (1100, 700), 0.02)
    merged, _ = merge_state(tmp_path, stored, adapter_of(factors, 1.25))
    np.testing.assert_allclose(wide(merged), exact, rtol=1e-5, atol=1e-6)
    if form == "float32":
        stored[-1, -1] = np.finfo(np.float32).max
        down, up = factors
        up[-1, :], down[:, -1] = 1e30, 1e8
        (tmp_path / "again").mkdir()
        with pytest.raises(loraformat.LoraformatError) as caught:
            merge_state(tmp_path / "again", stored, adapter_of((down, up), 1.25))
        assert "LF503" in caught.value.codes


def test_float32_keeps_all_of_it(tmp_path: Path) -> None:
    stored, factors, _ = random_case("float32", size=1e-4)
    _, receipt = merge_state(tmp_path, stored, adapter_of(factors, 1.25), min_retained=0.5)
    assert receipt.weights[0].retained == pytest.approx(1.0, abs=1e-4)
    assert receipt.problems == ()


@pytest.mark.parametrize("form", NARROW)
def test_a_change_too_small_for_the_form_is_refused(tmp_path: Path, form: str) -> None:
    stored, factors, _ = random_case(form, (200, 100), size=1e-6)
    with pytest.raises(loraformat.FindingError) as caught:
        merge_state(tmp_path, stored, adapter_of(factors), min_retained=0.5)
    assert caught.value.codes == ("LF504",)
    assert form in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors"]


def test_between_the_two_thresholds_it_warns(tmp_path: Path) -> None:
    """Six rows lose a change of 0.45 steps, four take one of 0.75 steps as a whole step: 0.866 in all."""
    weight = np.ones((10, 10), FORMS["bfloat16"])
    step = np.float32(2.0**-7)
    sizes = np.array([[0.45]] * 6 + [[0.75]] * 4, np.float32) * step
    adapter = adapter_of((np.ones((1, 10), np.float32), sizes))
    _, receipt = merge_state(tmp_path, weight, adapter, min_retained=0.5)
    kept = 4 * 0.75 / (6 * 0.45**2 + 4 * 0.75**2)
    assert receipt.weights[0].retained == pytest.approx(kept, rel=1e-4)
    assert [(p.code, p.severity) for p in receipt.problems] == [("LF504", "warning")]
    merge_state(tmp_path, weight, adapter, min_retained=kept - 0.01)
    with pytest.raises(loraformat.FindingError) as caught:
        merge_state(tmp_path, weight, adapter, min_retained=kept + 0.01)
    assert caught.value.codes == ("LF504",)


def test_the_threshold_of_the_warning_is_an_option(tmp_path: Path) -> None:
    """It may lie below the share, at it or above; a refusal comes before a warning."""
    stored, factors, _ = random_case("bfloat16", (100, 50), 0.02)
    adapter = adapter_of(factors)
    _, receipt = merge_state(tmp_path, stored, adapter, warn_retained=0.0)
    kept = receipt.weights[0].retained
    assert receipt.problems == ()
    for threshold, codes in ((kept - 1e-3, []), (kept + 1e-3, [("LF504", "warning")])):
        _, receipt = merge_state(tmp_path, stored, adapter, warn_retained=threshold)
        assert [(problem.code, problem.severity) for problem in receipt.problems] == codes
    with pytest.raises(loraformat.FindingError) as caught:
        merge_state(tmp_path, stored, adapter, warn_retained=0.0, min_retained=kept + 1e-3)
    assert caught.value.codes == ("LF504",)


def test_a_share_above_the_usual_threshold_can_be_asked_for(tmp_path: Path) -> None:
    stored, factors, _ = random_case("bfloat16", (100, 50))
    adapter = adapter_of(factors)
    _, receipt = merge_state(tmp_path, stored, adapter)
    kept = receipt.weights[0].retained
    assert 0.98 < kept < 1.02
    with pytest.raises(loraformat.FindingError):
        merge_state(tmp_path, stored, adapter, min_retained=kept + 1e-3)


def test_a_weight_of_zeros_takes_the_change_as_it_is(tmp_path: Path) -> None:
    """Zero-initialised layers exist; their relative change has no finite number."""
    rng = np.random.default_rng(49)
    factors = dyadic_factors(rng, 6, 5, 2)
    merged, receipt = merge_state(tmp_path, np.zeros((6, 5), np.float32), adapter_of(factors))
    np.testing.assert_array_equal(merged, product(factors))
    assert receipt.weights[0].relative == np.inf
    assert receipt.as_json()["weights"][0]["relative"] is None
    assert '"relative":null' in receipt.embedded_text()


# --- out of range, and not a number ----------------------------------------------------------------------------------

LARGEST = {
    "float64": 1.7976931348623157e308,
    "float32": 3.4028234663852886e38,
    "float16": 65504.0,
    "bfloat16": 3.3895313892515355e38,
    "float8_e4m3fn": 448.0,
    "float8_e5m2": 57344.0,
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "float64"])
def test_numbers_that_leave_the_range_are_an_error(tmp_path: Path, form: str, sign: int) -> None:
    weight = np.ones((4, 3), FORMS[form])
    weight[2, 1] = sign * LARGEST[form]
    root = np.sqrt(LARGEST[form] / 4)  # Products of factors within float32 cannot move float64 out of its range.
    factors = np.full((1, 3), root, np.float32), np.full((4, 1), sign * root, np.float32)
    with pytest.raises(loraformat.FindingError) as caught:
        merge_state(tmp_path, weight, adapter_of(factors))
    assert caught.value.codes == ("LF503",)
    assert "1 numbers" in caught.value.problems[0].found
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_number_itself_is_in_range(tmp_path: Path, form: str) -> None:
    weight = np.full((4, 3), LARGEST[form], FORMS[form])
    tiny = np.full((1, 3), 1e-6), np.full((4, 1), 1e-6)
    merged, _ = merge_state(tmp_path, weight, adapter_of(tiny))
    assert same_bits(merged, weight)


def test_a_change_that_overflows_by_itself_is_an_error(tmp_path: Path) -> None:
    factors = np.full((1, 3), 1e30, np.float32), np.full((4, 1), 1e30, np.float32)
    with pytest.raises(loraformat.FindingError) as caught:
        merge_state(tmp_path, np.ones((4, 3), np.float32), adapter_of(factors))
    assert caught.value.codes == ("LF503",)


@pytest.mark.parametrize("form", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_numbers_of_the_base_that_are_none_stay_and_are_told(tmp_path: Path, form: str) -> None:
    rng = np.random.default_rng(50)
    weight = dyadic(rng, 6, 5).astype(FORMS[form])
    weight[1, 2] = np.nan
    bad = 1
    if form != "float8_e4m3fn":
        weight[3, 0], weight[5, 4], bad = np.inf, -np.inf, 3
    factors = dyadic_factors(rng, 6, 5, 2)
    merged, receipt = merge_state(tmp_path, weight, adapter_of(factors))
    assert [(p.code, p.severity) for p in receipt.problems if p.code == "LF502"] == [("LF502", "warning")]
    assert f"{bad} numbers" in receipt.problems[0].found
    values, before = wide(merged), wide(weight)
    np.testing.assert_array_equal(values[~np.isfinite(before)], before[~np.isfinite(before)])
    expected = round_once(np.where(np.isfinite(before), before, 0) + product(factors), FORMS[form])
    np.testing.assert_array_equal(values[np.isfinite(before)], wide(expected)[np.isfinite(before)])
    assert np.isfinite(receipt.weights[0].retained)
    assert np.isfinite(receipt.weights[0].relative)


def test_large_but_finite_sums_of_squares_are_no_overflow(tmp_path: Path) -> None:
    """Squares of 1e20 leave float32; the weight and the change do not."""
    weight = np.full((3, 3), 1e20, np.float32)
    factors = np.full((1, 3), 1e9, np.float32), np.full((3, 1), 1e9, np.float32)
    _, receipt = merge_state(tmp_path, weight, adapter_of(factors), min_retained=0.5)
    assert receipt.weights[0].retained == pytest.approx(1.0, abs=1e-2)
    assert receipt.weights[0].relative == pytest.approx(1e-2, rel=1e-3)
    assert receipt.problems == ()


# --- the parts -------------------------------------------------------------------------------------------------------


def test_sums_add_up() -> None:
    total = TileSums(1.0, 2.0, 3.0, 4, 5) + TileSums(10.0, 20.0, 30.0, 40, 50)
    assert total == TileSums(11.0, 22.0, 33.0, 44, 55)
    assert TileSums().retained == 1.0
    assert TileSums().relative == 0.0
    assert TileSums(1.0, 4.0, 16.0).retained == 0.25
    assert TileSums(1.0, 4.0, 16.0).relative == 0.5


def test_buffers_are_kept_and_grow() -> None:
    buffers = TileBuffers()
    small = buffers.take("base", (2, 3), np.dtype(np.float32))
    small[:] = 7
    assert buffers.take("base", (3, 2), np.dtype(np.float32)).ctypes.data == small.ctypes.data
    assert buffers.take("delta", (2, 3), np.dtype(np.float32)).ctypes.data != small.ctypes.data
    assert buffers.take("base", (9, 9), np.dtype(np.float64)).shape == (9, 9)
