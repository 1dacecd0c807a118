"""The exact sum: against dense sums in float64, and bit by bit where no number is rounded."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loraformat
from algebra.adapters import delta_of, deltas_of, distance, every_slot, factors, values, weighted
from builders import MemoryFactor, read_onnx, write_onnx, write_peft
from graphs import make_adapter, make_target, same_bits
from loraformat.adapter import BaseBinding, ScalingRule, SlotKind
from loraformat.algebra._sums import choose_unit
from loraformat.algebra.compose import RECORD_KEY
from loraformat.errors import LoraformatError
from loraformat.fingerprint import Fingerprint

ROUNDED = 2.0**-24
"""What one rounding to float32 can change, relatively."""
NUMBERS = st.floats(-8, 8).filter(lambda number: abs(number) > 1e-3)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@given(
    weights=st.lists(st.tuples(NUMBERS, NUMBERS, st.integers(1, 4)), min_size=1, max_size=4), seed=st.integers(0, 99)
)
def test_a_sum_is_the_sum_in_every_slot(weights: list[tuple[float, float, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = [(every_slot(rng, rank, scale), weight) for weight, scale, rank in weights]
    made = loraformat.compose(items)
    for target in made.targets:
        assert target.rank == sum(rank for _, _, rank in weights)
        # One rounding of a factor moves each product by at most its share.
        size = sum(
            abs(weight * t.scale)
            * np.abs(t.factors[b].read().reshape(-1, t.rank)).astype(float)
            @ np.abs(t.factors[a].read().reshape(t.rank, -1)).astype(float)
            for adapter, weight in items
            for t in adapter.targets
            if t.name == target.name
            for a, b in [sorted(t.factors)]
        )
        error = np.abs(delta_of(target) - weighted(*items)[target.name])
        assert (error <= size * (ROUNDED + 1e-14)).all()


def test_shapes_stay_those_of_the_slot(rng: np.random.Generator) -> None:
    made = loraformat.compose([every_slot(rng, 2, 1.0), every_slot(rng, 3, 1.0)])
    shapes = {t.name: [t.factors[role].shape for role in sorted(t.factors)] for t in made.targets}
    assert shapes == {
        "conv": [(5, 4, 3, 2), (5, 5, 1, 1)],
        "embedding": [(5, 11), (6, 5)],
        "linear": [(5, 5), (7, 5)],
        "linear-transposed": [(5, 9), (4, 5)],
    }
    assert {t.name: t.slot for t in made.targets}["linear-transposed"] is SlotKind.LINEAR_TRANSPOSED


@pytest.mark.parametrize("form", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e4m3fnuz])
def test_signs_and_equal_scales_round_nothing(rng: np.random.Generator, form: np.dtype) -> None:
    one, other = factors(rng, 6, 9, 2, dtype=form), factors(rng, 6, 9, 3, dtype=form)
    other[1][0, 0] = 0
    made = loraformat.compose(
        [
            (make_adapter(make_target("q", one, scale=0.3)), 1.0),
            (make_adapter(make_target("q", other, scale=0.3)), -1.0),
        ]
    )
    (target,) = made.targets
    down, up = target.factors["lora_A.weight"], target.factors["lora_B.weight"]
    assert (down.dtype.name, up.dtype.name) == (np.dtype(form).name, np.dtype(form).name)
    assert target.scale == 0.3
    assert same_bits(down.read(), np.concatenate([one[0], other[0]]))
    np.testing.assert_array_equal(
        up.read().astype(np.float64), np.concatenate([one[1], -other[1]], 1).astype(np.float64)
    )


def test_powers_of_two_round_nothing(rng: np.random.Generator) -> None:
    """0.3, -0.6 and 2.4 differ by powers of two: half-precision factors are held by float32 exactly."""
    parts = [factors(rng, 6, 9, rank, dtype=np.float16) for rank in (2, 1, 3)]
    items = [
        (make_adapter(make_target("q", part, scale=0.3)), weight)
        for part, weight in zip(parts, (1, -2, 8), strict=True)
    ]
    (target,) = loraformat.compose(items).targets
    ratios = np.repeat([1 / 8, -2 / 8, 1], (2, 1, 3)) * 8 / (target.scale / 0.3)
    expected = np.concatenate([up for _, up in parts], axis=1).astype(np.float64) * ratios
    np.testing.assert_array_equal(target.factors["lora_B.weight"].read().astype(np.float64), expected)
    assert target.factors["lora_A.weight"].dtype.name == "float16"


def test_the_multiplier_leaves_most_untouched() -> None:
    assert choose_unit([0.7, 0.3, 0.6], [4, 1, 2]) == 0.7
    assert choose_unit([0.7, 0.3, 0.6], [2, 1, 2]) == 0.6  # 0.3 and 0.6 share a mantissa
    assert choose_unit([-0.5, 0.0], [1, 8]) == 0.5
    assert choose_unit([0.0], [1]) == 1.0


def test_forms_that_differ_are_joined_in_one_that_holds_both(rng: np.random.Generator) -> None:
    half, brain = factors(rng, 5, 4, 2, dtype=np.float16), factors(rng, 5, 4, 2, dtype=ml_dtypes.bfloat16)
    (target,) = loraformat.compose([make_adapter(make_target("q", part)) for part in (half, brain)]).targets
    assert {factor.dtype.name for factor in target.factors.values()} == {"float32"}
    expected = np.concatenate([half[1].astype(np.float32), brain[1].astype(np.float32)], axis=1)
    assert same_bits(target.factors["lora_B.weight"].read(), expected)


def test_rules_ranks_and_target_sets_may_differ(rng: np.random.Generator) -> None:
    one = make_adapter(
        make_target("k", factors(rng, 6, 4, 3), scale=16, rule=ScalingRule.ALPHA_OVER_SQRT_RANK),
        make_target("q", factors(rng, 5, 4, 3), scale=16, rule=ScalingRule.ALPHA_OVER_RANK),
    )
    other = make_adapter(make_target("q", factors(rng, 5, 4, 2), scale=0.5), make_target("v", factors(rng, 3, 4, 2)))
    made = loraformat.compose([(one, 0.25), (other, -1.5)])
    for name, delta in deltas_of(made).items():
        assert distance(delta, weighted((one, 0.25), (other, -1.5))[name]) < 1e-7
    k, q, v = made.targets
    assert k.scaling == replace(one.targets[0].scaling, value=4.0)  # alone, it keeps its rule and its factors
    assert k.factors is one.targets[0].factors
    assert (q.rank, v.scale) == (5, -1.5)


def test_one_adapter_with_weight_one_is_itself(rng: np.random.Generator) -> None:
    adapter = every_slot(rng, 2, 0.7)
    assert loraformat.compose([adapter]).targets == adapter.targets


def test_weight_zero_leaves_an_adapter_out(rng: np.random.Generator) -> None:
    one, other = every_slot(rng, 2, 0.7), every_slot(rng, 3, 1.0)
    made = loraformat.compose([one, (other, 0.0)])
    assert [target.factors for target in made.targets] == [target.factors for target in one.targets]
    (nothing,) = loraformat.compose([(make_adapter(make_target("q", factors(rng, 5, 4, 2))), 0.0)]).targets
    assert nothing.scale == 0


def test_nothing_is_read_before_it_is_written(rng: np.random.Generator, tmp_path: Path) -> None:
    """A factor that is deleted from the file after composing would be missed: the sum holds the file, not numbers."""
    paths = [write_peft(tmp_path / name, {"q": factors(rng, 6, 4, 2)}, alpha=3) for name in "ab"]
    made = loraformat.compose([(paths[0], 0.5), paths[1]])
    assert len(made.targets[0].factors["lora_A.weight"].files) == 2
    with pytest.raises(LoraformatError) as caught:
        loraformat.save(made, paths[0] / "adapter_model.safetensors", force=True)
    assert caught.value.codes == ("LF602",)
    saved = loraformat.load(loraformat.save(made, tmp_path / "sum.safetensors"))
    expected = weighted(*((loraformat.load(path), weight) for path, weight in zip(paths, (0.5, 1), strict=True)))
    assert distance(delta_of(saved.targets[0]), expected["q"]) < 1e-7


def test_a_sum_says_what_it_is_of(rng: np.random.Generator) -> None:
    base = BaseBinding("org/model", "main")
    one = replace(every_slot(rng, 2, 1.0, base=base), sha256="ab", metadata={"x.licence": "MIT", "x.author": "a"})
    other = replace(
        every_slot(rng, 2, 1.0, base=BaseBinding("org/model")), metadata={"x.licence": "MIT", "x.author": "b"}
    )
    made = loraformat.compose([(one, 0.5), other], rank=2)
    assert made.base == base
    record = json.loads(made.metadata[RECORD_KEY])
    assert record == {
        "method": "sum",
        "rank": 2,
        "adapters": [{"sha256": "ab", "weight": 0.5}, {"sha256": "", "weight": 1}],
    }
    assert {key for key in made.metadata if key != RECORD_KEY} == {"x.licence"}


# --- values that replace ---------------------------------------------------------------------------------------------


def replaced(base: np.ndarray, target: loraformat.Target, role: str = "weight") -> np.ndarray:
    """Return W + λ(V − W)."""
    return base + target.scale * (target.factors[role].read().astype(np.float64) - base)


@pytest.mark.parametrize("method", ["sum", "mean"])
def test_values_that_replace_are_blended(rng: np.random.Generator, method: str) -> None:
    base, one, other = (rng.standard_normal((3, 4)).astype(np.float32) for _ in range(3))
    first, second = (make_adapter(values("head", scale, weight=array)) for array, scale in ((one, 1.0), (other, 0.5)))
    (made,) = loraformat.compose([(first, 0.5), (second, 0.75)], method).targets
    weights = np.array([0.5, 0.75]) / (1.25 if method == "mean" else 1)
    expected = base + weights[0] * (one - base.astype(float)) + weights[1] * 0.5 * (other - base.astype(float))
    np.testing.assert_allclose(replaced(base, made), expected, atol=1e-6)


def test_values_of_one_adapter_pass(rng: np.random.Generator) -> None:
    head = values("head", weight=rng.standard_normal((3, 4)).astype(np.float16), bias=np.ones(3, np.float16))
    q = make_target("q", factors(rng, 5, 4, 2))
    made = loraformat.compose([make_adapter(head, q), (make_adapter(q), 0.5)])
    assert made.targets[0] == head
    (ties, _) = loraformat.compose([(make_adapter(head, q), 0.5), make_adapter(q)], "ties", rank=1).targets
    assert (ties.factors, ties.scale) == (head.factors, 0.5)


def test_equal_values_stay_to_the_bit(rng: np.random.Generator) -> None:
    head = values("head", weight=rng.standard_normal((3, 4)).astype(np.float32))
    (made,) = loraformat.compose([(make_adapter(head), 0.3), (make_adapter(head), 0.7)]).targets
    assert same_bits(made.factors["weight"].read(), head.factors["weight"].read())
    assert made.scale == pytest.approx(1.0)


# --- what stands beside the factors ----------------------------------------------------------------------------------


def beside(rng: np.random.Generator, name: str, scale: float, *roles: str) -> loraformat.Target:
    target = make_target(name, factors(rng, 6, 4, 2), scale=scale)
    shapes = {"lora_B.bias": (6,), "base_layer.bias": (6,), "base_layer.weight": (6, 4)}
    extra = {role: MemoryFactor(role, rng.standard_normal(shapes[role]).astype(np.float32)) for role in roles}
    return replace(target, factors=dict(target.factors) | extra)


@pytest.mark.parametrize("rank", [None, 2])
def test_biases_are_summed(rng: np.random.Generator, rank: int | None) -> None:
    targets = [beside(rng, "q", 0.7, "lora_B.bias"), beside(rng, "q", 1.3), beside(rng, "q", 0.5, "lora_B.bias")]
    weights = [0.5, 2.0, -1.0]
    items = [(make_adapter(target), weight) for target, weight in zip(targets, weights, strict=True)]
    (made,) = loraformat.compose(items, rank=rank).targets
    first, third = (targets[place].factors["lora_B.bias"].read().astype(float) for place in (0, 2))
    found = made.scale * made.factors["lora_B.bias"].read().astype(float)
    np.testing.assert_allclose(found, 0.35 * first - 0.5 * third, rtol=1e-6, atol=1e-7)
    assert set(made.factors) == {"lora_A.weight", "lora_B.weight", "lora_B.bias"}


def test_a_bias_has_no_vote(rng: np.random.Generator) -> None:
    adapter = make_adapter(beside(rng, "q", 0.7, "lora_B.bias"))
    assert codes(adapter, adapter, method="ties", rank=2) == ("LF703",)


def test_values_of_the_base_pass_alone(rng: np.random.Generator) -> None:
    adapter = make_adapter(beside(rng, "q", 0.7, "base_layer.weight"))
    assert loraformat.compose([adapter, make_adapter(beside(rng, "v", 1.0))]).targets[0] == adapter.targets[0]
    assert (
        codes((adapter, 0.5))
        == codes(adapter, adapter)
        == codes(adapter, make_adapter(beside(rng, "q", 1.0)))
        == ("LF702",)
    )
    for call in (lambda: 0.5 * adapter, lambda: loraformat.resize(adapter, 1)):
        with pytest.raises(LoraformatError, match="values of the base's own"):
            call()


# --- refusals --------------------------------------------------------------------------------------------------------


def codes(*items: object, method: str = "sum", **settings: object) -> tuple[str, ...]:
    with pytest.raises(LoraformatError) as caught:
        loraformat.compose(items, method, **settings)  # type: ignore[arg-type]
    assert all(problem.advice for problem in caught.value.problems)
    return caught.value.codes


@pytest.fixture
def plain(rng: np.random.Generator) -> loraformat.Adapter:
    return make_adapter(make_target("q", factors(rng, 6, 4, 2)))


def test_different_bases(plain: loraformat.Adapter) -> None:
    named = [
        replace(plain, base=BaseBinding(name, revision)) for name, revision in (("a", None), ("b", None), ("a", "1"))
    ]
    assert codes(named[0], named[1]) == ("LF701",)
    assert codes(named[2], replace(plain, base=BaseBinding("a", "2"))) == ("LF701",)
    assert loraformat.compose(named[:2], allow_different_bases=True).base.name == "a"
    assert loraformat.compose([named[0], named[2], plain]).base == BaseBinding("a", "1")


def test_different_fingerprints(plain: loraformat.Adapter) -> None:
    def stamped(first: float) -> loraformat.Adapter:
        print_ = Fingerprint((6, 4), (first, *map(float, range(1, 16))))
        return replace(plain, targets=(replace(plain.targets[0], fingerprint=print_),))

    assert codes(stamped(0.5), stamped(5.0)) == ("LF701",)
    made = loraformat.compose([plain, stamped(0.5), stamped(0.5001)])
    assert made.targets[0].fingerprint == stamped(0.5).targets[0].fingerprint


def test_shapes_and_slots_that_disagree(rng: np.random.Generator, plain: loraformat.Adapter) -> None:
    assert codes(plain, make_adapter(make_target("q", factors(rng, 6, 5, 2)))) == ("LF704",)
    other = make_target("q", factors(rng, 6, 4, 2), SlotKind.LINEAR_TRANSPOSED)
    assert codes(plain, make_adapter(other)) == ("LF704",)
    assert codes(plain, make_adapter(values("q", weight=np.ones((6, 4), np.float32)))) == ("LF704",)
    heads = [make_adapter(values("head", weight=np.ones((rows, 4), np.float32))) for rows in (3, 5)]
    assert codes(*heads) == ("LF704",)


def test_numbers_that_are_none(rng: np.random.Generator, plain: loraformat.Adapter) -> None:
    bad = factors(rng, 6, 4, 2)
    bad[0][1, 2] = np.nan
    assert codes(plain, make_adapter(make_target("q", bad))) == ("LF501",)
    assert codes((plain, float("nan"))) == ("LF207",)
    assert codes((plain, 1e300), (make_adapter(make_target("q", factors(rng, 6, 4, 2), scale=1e300)), 1e300)) == (
        "LF207",
    )


def test_a_number_that_leaves_float32(rng: np.random.Generator, plain: loraformat.Adapter) -> None:
    made = loraformat.compose([(plain, 1.0), (plain, 1.0), (plain, 1e60)])
    with pytest.raises(LoraformatError) as caught:
        made.targets[0].factors["lora_B.weight"].read()
    assert caught.value.codes == ("LF503",)


def test_values_whose_weights_cancel() -> None:
    head = make_adapter(values("head", weight=np.ones((3, 4), np.float32)))
    assert codes(head, (head, -1.0)) == ("LF702",)
    assert codes(head, head, method="ties", rank=2) == ("LF703",)


@pytest.mark.parametrize(
    ("method", "settings", "code"),
    [
        ("median", {}, "LF705"),
        ("ties", {}, "LF703"),
        ("dare", {"rank": 2, "density": 0.0}, "LF705"),
        ("dare", {"rank": 2, "density": 1.5}, "LF705"),
        ("slerp", {}, "LF705"),
        ("sum", {"energy": 0.9, "max_error": 0.1}, "LF705"),
        ("sum", {"rank": 0}, "LF705"),
        ("sum", {"energy": 1.5}, "LF705"),
    ],
)
def test_settings(plain: loraformat.Adapter, method: str, settings: dict[str, float], code: str) -> None:
    assert codes(plain, plain, plain, method=method, **settings) == (code,)


def test_a_mean_of_weights_that_cancel(plain: loraformat.Adapter) -> None:
    assert codes(plain, (plain, -1.0), method="mean") == ("LF705",)
    assert codes() == ("LF705",)


# --- cuts ------------------------------------------------------------------------------------------------------------


def test_a_cut_is_the_best_of_its_rank_in_every_slot(rng: np.random.Generator) -> None:
    items = [(every_slot(rng, 2, 0.7), 0.4), (every_slot(rng, 3, 1.1), -0.9), (every_slot(rng, 1, 2.0), 1.0)]
    reductions: list[loraformat.Reduction] = []
    made = loraformat.compose(items, rank=2, report=reductions.append)
    for target, reduction in zip(made.targets, reductions, strict=True):
        dense = weighted(*items)[target.name]
        left, sizes, right = np.linalg.svd(dense, full_matrices=False)
        assert distance(delta_of(target), (left[:, :2] * sizes[:2]) @ right[:2]) < 1e-6
        assert (target.rank, target.scale, reduction.target, reduction.before, reduction.after) == (
            2,
            1.0,
            target.name,
            6,
            2,
        )
        assert reduction.error == pytest.approx(np.linalg.norm(sizes[2:]) / np.linalg.norm(sizes))
        assert {factor.dtype.name for factor in target.factors.values()} == {"float32"}


def test_a_cut_by_error_keeps_the_error(rng: np.random.Generator) -> None:
    items = [(every_slot(rng, 3, 1.0), 1.0), (every_slot(rng, 3, 0.1), 1.0)]
    made = loraformat.compose(items, max_error=0.2)
    for name, delta in deltas_of(made).items():
        assert distance(delta, weighted(*items)[name]) <= 0.2
    assert any(target.rank < 6 for target in made.targets)


def test_a_cut_that_cuts_nothing_is_the_exact_sum(rng: np.random.Generator) -> None:
    one, other = (make_adapter(make_target("q", factors(rng, 9, 8, rank))) for rank in (2, 3))
    (target,) = loraformat.compose([one, other], rank=5).targets
    (exact,) = loraformat.compose([one, other]).targets
    assert same_bits(target.factors["lora_B.weight"].read(), exact.factors["lora_B.weight"].read())


def test_the_same_subspace_twice_needs_no_more_rank(rng: np.random.Generator) -> None:
    adapter = make_adapter(make_target("q", factors(rng, 9, 8, 2)))
    (target,) = loraformat.compose([adapter, (adapter, 0.5)], max_error=1e-6).targets
    assert target.rank == 2
    assert distance(delta_of(target), 1.5 * delta_of(adapter.targets[0])) < 1e-6


# --- merged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.3)])
def test_the_sum_merges_as_its_parts_do(rng: np.random.Generator, tmp_path: Path, weights: tuple[float, float]) -> None:
    base = {name: rng.standard_normal((rows, 10)).astype(np.float32) for name, rows in (("q", 14), ("v", 6))}
    model = write_onnx(tmp_path / "base.onnx", base)
    parts = [
        write_peft(tmp_path / "a", {"q": factors(rng, 14, 10, 2)}, alpha=3),
        write_peft(tmp_path / "b", {"q": factors(rng, 14, 10, 3), "v": factors(rng, 6, 10, 3)}, alpha=8),
    ]
    items = list(zip(parts, weights, strict=True))
    saved = loraformat.save(loraformat.compose(items), tmp_path / "sum.safetensors")
    apart = loraformat.merge(model, items, tmp_path / "apart.onnx").output
    at_once = loraformat.merge(model, [saved], tmp_path / "at_once.onnx").output
    expected = weighted(*((loraformat.load(path), weight) for path, weight in items))
    for (name, weight), one, other in zip(
        base.items(), *(read_onnx(Path(p)).values() for p in (apart, at_once)), strict=True
    ):
        np.testing.assert_allclose(other.T, weight + expected[name], rtol=0, atol=4e-6)
        np.testing.assert_allclose(other, one, rtol=0, atol=4e-6)


def test_a_sum_is_written_target_by_target(rng: np.random.Generator, tmp_path: Path) -> None:
    """No more than a few factors are held while the sum of large adapters is composed and saved."""
    size = 60_000
    paths = []
    for name in "ab":
        parts = {f"layers.{n}.q": factors(rng, 5, size, 4) for n in range(12)}
        paths.append(write_peft(tmp_path / name, parts))
        del parts
    one_bytes = 4 * 4 * (size + 5)
    tracemalloc.start()
    loraformat.save(loraformat.compose(paths), tmp_path / "sum.safetensors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * one_bytes < 2 * 12 * one_bytes
