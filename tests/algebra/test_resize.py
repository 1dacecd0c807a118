"""Cutting ranks: against numpy's SVD of the dense change."""

import numpy as np
import pytest

import loraformat
from algebra.adapters import delta_of, deltas_of, distance, every_slot, factors, values
from graphs import make_adapter, make_target
from loraformat.adapter import Adapter, ScalingRule
from loraformat.errors import LoraformatError


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(8)


def falling(rng: np.random.Generator, name: str, *sizes: float) -> loraformat.Target:
    """Return a target of 9 by 7 whose change has the singular values `sizes`."""
    left = np.linalg.qr(rng.standard_normal((9, len(sizes))))[0] * np.array(sizes)
    right = np.linalg.qr(rng.standard_normal((7, len(sizes))))[0].T
    turn = np.linalg.qr(rng.standard_normal((len(sizes), len(sizes))))[0]
    pair = ((turn.T @ right).astype(np.float32), (left @ turn).astype(np.float32))
    return make_target(name, pair, scale=len(sizes) / 2, rule=ScalingRule.ALPHA_OVER_RANK)


def test_the_best_of_its_rank_in_every_slot(rng: np.random.Generator) -> None:
    adapter = every_slot(rng, 4, 0.7)
    made = loraformat.resize(adapter, 2)
    for target in made.targets:
        left, sizes, right = np.linalg.svd(deltas_of(adapter)[target.name], full_matrices=False)
        assert distance(delta_of(target), (left[:, :2] * sizes[:2]) @ right[:2]) < 1e-6
        assert (target.rank, target.scaling.value, target.scale) == (2, 2.0, 1.0)
    assert [target.slot for target in made.targets] == [target.slot for target in adapter.targets]


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({"rank": 3}, [3, 2]),
        ({"energy": 0.98}, [3, 1]),  # 64, 16, 4, 1 of 85: 0.753, 0.941, 0.988; 100, 1 of 101
        ({"max_error": 0.25}, [2, 1]),  # √5 of √85: 0.243
        ({"sv_ratio": 5}, [3, 1]),  # above 1.6; above 2
        ({"sv_fro": 0.96}, [2, 1]),  # √0.941 = 0.970
        ({"sv_cumulative": 0.9}, [3, 1]),  # 8, 4, 2, 1 of 15: 0.8, 0.933; 10, 1 of 11: 0.909
        ({"max_error": 0.0, "rank": 3}, [3, 2]),
        ({"rank": 4, "ranks": {"a": 1}}, [1, 2]),
        ({"ranks": {"*": 3, "b": 1}}, [3, 1]),
    ],
)
def test_rules_and_ranks_of_targets(rng: np.random.Generator, settings: dict, ranks: list[int]) -> None:
    adapter = make_adapter(falling(rng, "a", 8, 4, 2, 1), falling(rng, "b", 10, 1))
    assert [target.rank for target in loraformat.resize(adapter, **settings).targets] == ranks


def kohya_rank(values: np.ndarray, method: str, number: float) -> int:
    """Return what kohya's resize_lora.py keeps: index_sv_* of its lines 59-85, and one more (reference, section 11)."""
    if method == "sv_ratio":
        index = int((values > values[0] / number).sum())
    elif method == "sv_fro":
        index = int(np.searchsorted(np.cumsum(values**2) / np.sum(values**2), number**2)) + 1
    else:
        index = int(np.searchsorted(np.cumsum(values) / np.sum(values), number)) + 1
    return max(1, min(index, len(values) - 1)) + 1


@pytest.mark.parametrize("method", ["sv_ratio", "sv_fro", "sv_cumulative"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8, 0.9])
def test_kohya_keeps_one_more(rng: np.random.Generator, method: str, share: float) -> None:
    target = falling(rng, "a", 8, 4, 2, 1, 0.5, 0.25)
    number = 1 / (1 - share) if method == "sv_ratio" else share
    found = loraformat.resize(make_adapter(target), **{method: number}).targets[0].rank
    sizes = np.linalg.svd(delta_of(target), compute_uv=False)[:6]
    assert kohya_rank(sizes, method, number) == found + 1


def test_what_loses_nothing_stays_as_it_is(rng: np.random.Generator) -> None:
    adapter = make_adapter(make_target("q", factors(rng, 9, 7, 2)), values("head", weight=np.ones((3, 4), np.float32)))
    reductions: list[loraformat.Reduction] = []
    made = loraformat.resize(adapter, 4, report=reductions.append)
    assert made.targets == adapter.targets
    assert [reduction.as_json() for reduction in reductions] == [{"target": "q", "before": 2, "after": 2, "error": 0.0}]


def test_a_rank_that_was_never_used_goes(rng: np.random.Generator) -> None:
    down, up = factors(rng, 9, 7, 2)
    twice = make_target("q", (np.concatenate([down, down]), np.concatenate([up, up], axis=1)))
    (target,) = loraformat.resize(make_adapter(twice), max_error=1e-6).targets
    assert target.rank == 2
    assert distance(delta_of(target), delta_of(twice)) < 1e-6


@pytest.mark.parametrize(("form", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3), ("float64", 1e-12)])
def test_the_number_form_of_what_is_cut(rng: np.random.Generator, form: str, tolerance: float) -> None:
    adapter = make_adapter(make_target("k", factors(rng, 9, 7, 1)), make_target("q", factors(rng, 9, 7, 4)))
    k, q = loraformat.resize(adapter, 2, dtype=form).targets
    assert k == adapter.targets[0]
    assert {factor.dtype.name for factor in q.factors.values()} == {form}
    left, sizes, right = np.linalg.svd(delta_of(adapter.targets[1]), full_matrices=False)
    assert distance(delta_of(q), (left[:, :2] * sizes[:2]) @ right[:2]) < tolerance


def test_what_leaves_the_number_form_is_refused(rng: np.random.Generator) -> None:
    adapter = make_adapter(make_target("q", factors(rng, 9, 7, 4), scale=1e12))
    with pytest.raises(LoraformatError) as caught:
        loraformat.resize(adapter, 2, dtype="float16")
    assert caught.value.codes == ("LF503",)


def test_of_a_change_of_zeros_rank_one_is_left(rng: np.random.Generator) -> None:
    down, up = factors(rng, 9, 7, 4)
    (target,) = loraformat.resize(make_adapter(make_target("q", (down, up * 0))), energy=0.9).targets
    assert (target.rank, np.abs(delta_of(target)).max()) == (1, 0.0)


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({}, "LF705"),
        ({"energy": 0.9, "sv_fro": 0.9}, "LF705"),
        ({"sv_ratio": 0.5}, "LF705"),
        ({"sv_ratio": float("inf")}, "LF705"),
        ({"energy": float("nan")}, "LF705"),
        ({"rank": 0}, "LF705"),
        ({"rank": 1, "dtype": "int8"}, "LF705"),
        ({"ranks": {"x": 1}}, "LF706"),
        ({"ranks": {"q": 0}}, "LF705"),
    ],
)
def test_refusals(rng: np.random.Generator, settings: dict, code: str) -> None:
    adapter: Adapter = make_adapter(make_target("q", factors(rng, 9, 7, 2)))
    with pytest.raises(LoraformatError) as caught:
        loraformat.resize(adapter, **settings)
    assert caught.value.codes == (code,)


def test_numbers_that_are_none(rng: np.random.Generator) -> None:
    down, up = factors(rng, 9, 7, 2)
    up[3, 1] = np.inf
    with pytest.raises(LoraformatError) as caught:
        loraformat.resize(make_adapter(make_target("q", (down, up))), 1)
    assert caught.value.codes == ("LF501",)
