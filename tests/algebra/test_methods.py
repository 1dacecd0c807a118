"""The other methods, each against its formula in float64 on dense matrices."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import loraformat
from algebra.adapters import Dense, delta_of, deltas_of, distance, every_slot, factors, weighted
from graphs import make_adapter, make_target
from loraformat.adapter import Adapter
from loraformat.algebra import _dense
from loraformat.algebra._dense import add, cut_tiles, drop_random, elect, find_threshold, keep_largest, walk
from loraformat.algebra._lowrank import Cut
from loraformat.algebra._targets import open_delta
from loraformat.algebra.methods import METHODS
from loraformat.kinds._matrices import Values
from loraformat_cli.commands.compose import command

ALL = 99
"""A rank that cuts nothing off, so that the result is the formula's."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(4)


@pytest.fixture
def items(rng: np.random.Generator) -> list[tuple[Adapter, float]]:
    return [(every_slot(rng, 2, 0.7), 0.4), (every_slot(rng, 3, 1.1), -0.9), (every_slot(rng, 1, 2.0), 1.0)]


def test_the_command_line_has_them_all() -> None:
    (option,) = (param for param in command.params if param.name == "method")
    assert tuple(option.type.choices) == tuple(METHODS)  # type: ignore[attr-defined]


# --- linear ----------------------------------------------------------------------------------------------------------


def test_task_arithmetic_is_the_sum(items: list[tuple[Adapter, float]]) -> None:
    for name, delta in deltas_of(loraformat.compose(items, "task-arithmetic")).items():
        assert distance(delta, weighted(*items)[name]) < 1e-6


def test_the_mean_counts_adapters_without_the_target(
    items: list[tuple[Adapter, float]], rng: np.random.Generator
) -> None:
    made = loraformat.compose([*items, (make_adapter(make_target("q", factors(rng, 5, 4, 2))), 1.5)], "mean")
    for name, delta in deltas_of(made).items():
        if name != "q":
            assert distance(delta, weighted(*items)[name] / 2.0) < 1e-6


def slerp(one: Dense, other: Dense, t: float) -> Dense:
    angle = np.arccos(np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other))
    return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * other) / np.sin(angle)


def test_slerp_runs_on_the_arc(items: list[tuple[Adapter, float]]) -> None:
    (one, _), (other, _), _ = items
    made = loraformat.compose([(one, 1.0), (other, 3.0)], "slerp")
    for name, delta in deltas_of(made).items():
        assert distance(delta, slerp(deltas_of(one)[name], deltas_of(other)[name], 0.75)) < 1e-6


def test_slerp_of_one_direction_or_of_nothing_is_the_chord(rng: np.random.Generator) -> None:
    q, v = (make_target(name, factors(rng, 5, 4, 2)) for name in "qv")
    made = loraformat.compose([(make_adapter(q, v), 1.0), (3.0 * make_adapter(q), 1.0)], "slerp")
    assert distance(delta_of(made.targets[0]), 2 * delta_of(q)) < 1e-6
    assert distance(delta_of(made.targets[1]), 0.5 * delta_of(v)) < 1e-6


# --- number by number ------------------------------------------------------------------------------------------------


def top(matrix: Dense, density: float) -> Dense:
    kept = int(density * matrix.size)
    limit = np.sort(np.abs(matrix), axis=None)[-kept]
    return np.where(np.abs(matrix) >= limit, matrix, 0)


def vote(parts: Sequence[Dense]) -> Dense:
    stacked = np.stack(parts)
    agree = np.sign(stacked) == np.where(stacked.sum(0) >= 0, 1, -1)
    return (stacked * agree).sum(0) / np.maximum(1, agree.sum(0))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_magnitude_pruning_and_ties(items: list[tuple[Adapter, float]], density: float) -> None:
    pruned = loraformat.compose(items, "magnitude-prune", density=density, rank=ALL)
    voted = loraformat.compose(items, "ties", density=density, rank=ALL)
    for name in deltas_of(items[0][0]):
        parts = [weight * top(deltas_of(adapter)[name], density) for adapter, weight in items]
        assert distance(deltas_of(pruned)[name], sum(parts)) < 2e-6
        assert distance(deltas_of(voted)[name], vote(parts)) < 2e-6


def test_a_cut_of_ties_is_the_best_of_its_rank(items: list[tuple[Adapter, float]]) -> None:
    reductions: list[loraformat.Reduction] = []
    made = loraformat.compose(items, "ties", rank=2, report=reductions.append)
    for target, reduction in zip(made.targets, reductions, strict=True):
        dense = vote([weight * top(deltas_of(adapter)[target.name], 0.5) for adapter, weight in items])
        left, sizes, right = np.linalg.svd(dense, full_matrices=False)
        assert distance(delta_of(target), (left[:, :2] * sizes[:2]) @ right[:2]) < 1e-5
        assert reduction.error == pytest.approx(np.linalg.norm(sizes[2:]) / np.linalg.norm(sizes), rel=1e-5)
        assert (target.rank, target.scale) == (2, 1.0)


def test_dare_keeps_and_rescales_what_its_seed_says(items: list[tuple[Adapter, float]]) -> None:
    density = 0.3
    kept = {}
    for name in deltas_of(items[0][0]):
        parts = []
        for position, (adapter, weight) in enumerate(items):
            target = next(target for target in adapter.targets if target.name == name)
            dense = open_delta(target)
            turned = dense.shape[1] > dense.shape[0]
            dropped = np.concatenate(
                list(drop_random(dense.transposed() if turned else dense, density, f"7\n{position}\n{name}"))
            )
            dropped = dropped.T if turned else dropped
            whole = deltas_of(adapter)[name]
            np.testing.assert_allclose(dropped[dropped != 0], (whole / density)[dropped != 0], rtol=1e-4, atol=1e-6)
            parts.append(weight * dropped.astype(np.float64))
        kept[name] = parts
    summed = loraformat.compose(items, "dare", density=density, seed=7, rank=ALL)
    voted = loraformat.compose(items, "dare-ties", density=density, seed=7, rank=ALL)
    for name, parts in kept.items():
        assert distance(deltas_of(summed)[name], sum(parts)) < 2e-6
        assert distance(deltas_of(voted)[name], vote(parts)) < 2e-6


def test_chance_depends_on_seed_and_target_alone(rng: np.random.Generator) -> None:
    q, v = (make_target(name, factors(rng, 40, 30, 2)) for name in "qv")
    both = [make_adapter(q, v), make_adapter(q)]
    settings = {"density": 0.5, "rank": 30}
    first = loraformat.compose(both, "dare", seed=1, **settings)
    alone = loraformat.compose([make_adapter(q)] * 2, "dare", seed=1, **settings)
    other = loraformat.compose([make_adapter(q)] * 2, "dare", seed=2, **settings)
    np.testing.assert_array_equal(delta_of(first.targets[0]), delta_of(alone.targets[0]))
    assert distance(delta_of(other.targets[0]), delta_of(alone.targets[0])) > 0.1
    once = [delta_of(loraformat.compose([make_adapter(t)], "dare", seed=1, **settings).targets[0]) for t in (q, v)]
    shared = np.mean((np.abs(once[0]) > 1e-4) == (np.abs(once[1]) > 1e-4))
    assert abs(shared - 0.5) < 0.1  # equal chances, but not the same ones


def philox(key: int, block: int) -> list[int]:
    """Return four words of Philox4x64-10 (Salmon et al., 2011): ten rounds on a counter."""
    mask, words, keys = 2**64 - 1, [block, 0, 0, 0], [key & (2**64 - 1), key >> 64]
    for _ in range(10):
        one, other = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [other >> 64 ^ words[1] ^ keys[0], other & mask, one >> 64 ^ words[3] ^ keys[1], one & mask]
        keys = [(keys[0] + 0x9E3779B97F4A7C15) & mask, (keys[1] + 0xBB67AE8584CAA73B) & mask]
    return words


def test_the_stream_of_chances_is_philox() -> None:
    """No library decides it: a row takes 32 bits for each number, of whole words of 64, low half first."""
    key = int.from_bytes(hashlib.sha256(b"loraformat-drop-1\n0\n0\nq").digest()[:16], "little")
    words = [word for block in range(1, 4) for word in philox(key, block)]
    halves = np.array([half for word in words for half in (word % 2**32, word >> 32)]).reshape(3, 8)
    dropped = np.concatenate(list(drop_random(Values(np.ones((3, 7), np.float32)), 0.3, "0\n0\nq")))
    np.testing.assert_array_equal(dropped > 0, halves[:, :7] < round(0.3 * 2**32))
    assert set(dropped.ravel().tolist()) == {0.0, float(np.float32(1) / np.float32(0.3))}


@given(matrix=arrays(np.float32, (5, 7), elements=st.floats(-3, 3, width=32)), kept=st.integers(1, 35))
def test_the_threshold_is_that_of_sorting(matrix: np.ndarray, kept: int) -> None:
    assert find_threshold(Values(matrix), kept) == np.sort(np.abs(matrix), axis=None)[-kept]


def test_of_nothing_kept_nothing_is_left() -> None:
    assert not np.concatenate(list(keep_largest(Values(np.ones((2, 3), np.float32)), 0.1, ""))).any()


@pytest.mark.parametrize("sparsify", [keep_largest, drop_random])
def test_tiles_do_not_show(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, sparsify: _dense.Sparsify
) -> None:
    delta = Values(rng.standard_normal((23, 9)).astype(np.float32))
    (whole,) = sparsify(delta, 0.4, "s")
    monkeypatch.setattr(_dense, "TILE_BYTES", 4 * 9 * 5)
    tiles = list(sparsify(delta, 0.4, "s"))
    assert [len(tile) for tile in tiles] == [5, 5, 5, 5, 3]
    np.testing.assert_array_equal(np.concatenate(tiles), whole)
    assert 0.2 < np.count_nonzero(whole) / whole.size < 0.6


def test_a_cut_of_tiles_is_that_of_the_matrix(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((23, 9)).astype(np.float32)
    monkeypatch.setattr(_dense, "TILE_BYTES", 4 * 9 * 5)
    cut = cut_tiles((23, 9), lambda: walk(Values(matrix)), Cut(rank=4))
    left, sizes, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    assert distance(cut.up @ cut.down, (left[:, :4] * sizes[:4]) @ right[:4]) < 1e-7
    assert cut.error == pytest.approx(np.linalg.norm(sizes[4:]) / np.linalg.norm(sizes), rel=1e-6)
    nothing = cut_tiles((23, 9), lambda: walk(Values(matrix * 0)), Cut(rule="energy", threshold=0.9))
    assert (nothing.rank, nothing.error, nothing.up.any()) == (1, 0.0, np.False_)


def test_votes() -> None:
    parts = [np.array([[1.0, -2.0, 1.0, 0.0]], np.float32), np.array([[3.0, 1.0, -1.0, 0.0]], np.float32)]
    np.testing.assert_array_equal(elect(parts, [1.0, 1.0]), [[2.0, -2.0, 1.0, 0.0]])
    np.testing.assert_array_equal(elect(parts, [1.0, -1.0]), [[-3.0, -1.5, 1.0, 0.0]])
    np.testing.assert_array_equal(add(parts, [0.5, 2.0]), [[6.5, 1.0, -1.5, 0.0]])
