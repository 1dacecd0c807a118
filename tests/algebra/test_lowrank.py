"""Singular values from factors, against numpy's SVD of the dense product."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.algebra._lowrank import RULES, Cut, compare_subspaces, factor_svd, truncate

SIZES = st.integers(1, 12)


@given(rows=SIZES, columns=SIZES, rank=SIZES, seed=st.integers(0, 2**32 - 1))
def test_the_svd_is_that_of_the_product(rows: int, columns: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
    left, values, right = factor_svd(up, down)
    count = min(rows, rank, columns)
    assert (left.shape, values.shape, right.shape) == ((rows, count), (count,), (count, columns))
    np.testing.assert_allclose((left * values) @ right, up @ down, atol=1e-12 * np.abs(up @ down).max() + 1e-13)
    np.testing.assert_allclose(values, np.linalg.svd(up @ down, compute_uv=False)[:count], atol=1e-11)
    np.testing.assert_allclose(left.T @ left, np.eye(count), atol=1e-12)
    np.testing.assert_allclose(right @ right.T, np.eye(count), atol=1e-12)


def test_signs_do_not_depend_on_those_of_the_factors() -> None:
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((9, 4)), rng.standard_normal((4, 7))
    for one, other in zip(factor_svd(up, down), factor_svd(-up, -down), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    left, _, right = np.linalg.svd(up @ down, full_matrices=False)
    signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])])
    np.testing.assert_allclose(factor_svd(up, down).right, (right * signs[:, None])[:4], atol=1e-10)


def test_half_precision_factors_are_taken_as_they_are() -> None:
    rng = np.random.default_rng(1)
    up, down = rng.standard_normal((9, 4)).astype(np.float16), rng.standard_normal((4, 7)).astype(np.float16)
    expected = np.linalg.svd(up.astype(np.float64) @ down.astype(np.float64), compute_uv=False)[:4]
    np.testing.assert_allclose(factor_svd(up, down).values, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        (Cut(), 4),
        (Cut(rank=3), 3),
        (Cut(rank=9), 4),
        (Cut(rule="energy", threshold=0.76), 1),  # energies 64, 16, 4, 0 of 84
        (Cut(rule="energy", threshold=0.77), 2),
        (Cut(rule="energy", threshold=1.0), 3),  # a zero carries none
        (Cut(rule="max_error", threshold=0.49), 1),  # tails √20, √4, 0 of √84
        (Cut(rule="max_error", threshold=0.48), 2),
        (Cut(rule="max_error", threshold=0.0), 3),
        (Cut(rule="sv_ratio", threshold=2.0), 1),  # strictly above 8 / 2
        (Cut(rule="sv_ratio", threshold=2.1), 2),
        (Cut(rule="sv_fro", threshold=0.8729), 2),  # √(64/84) = 0.87287
        (Cut(rule="sv_fro", threshold=0.8728), 1),
        (Cut(rule="sv_cumulative", threshold=0.57), 1),  # 8, 4, 2 of 14
        (Cut(rule="sv_cumulative", threshold=0.58), 2),
        (Cut(rule="sv_cumulative", threshold=1.0), 3),
        (Cut(rank=2, rule="energy", threshold=1.0), 2),
    ],
)
def test_where_the_values_are_cut(cut: Cut, kept: int) -> None:
    assert cut.choose(np.array([8.0, 4.0, 2.0, 0.0])) == kept


@pytest.mark.parametrize("rule", RULES)
def test_of_nothing_one_value_is_kept(rule: str) -> None:
    assert Cut(rule=rule, threshold=0.5).choose(np.zeros(3)) == 1


def test_a_cut_is_the_best_approximation_and_knows_its_error() -> None:
    rng = np.random.default_rng(2)
    up, down = rng.standard_normal((13, 6)), rng.standard_normal((6, 8))
    left, values, right = np.linalg.svd(up @ down)
    best = (left[:, :2] * values[:2]) @ right[:2]
    cut = truncate(factor_svd(up, down), 2)
    np.testing.assert_allclose(cut.up @ cut.down, best, atol=1e-12)
    assert cut.rank == 2
    assert cut.error == pytest.approx(np.linalg.norm(up @ down - best) / np.linalg.norm(up @ down))
    assert truncate(factor_svd(up * 0, down), 1).error == 0.0


def test_similarity_of_subspaces() -> None:
    axes = np.eye(5)
    assert compare_subspaces(axes[:, :2], axes[:, :4]) == 1.0
    assert compare_subspaces(axes[:, :2], axes[:, 3:]) == 0.0
    turned = np.array([[np.cos(0.3)], [np.sin(0.3)], [0], [0], [0]])
    assert compare_subspaces(axes[:, :1], turned) == pytest.approx(np.cos(0.3) ** 2)
