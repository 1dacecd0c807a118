"""Measures of subspaces against float64 numpy written from the formulas."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.algebra.subspaces import compare_directions, effective_rank, find_directions, project, stable_rank


def phi_by_the_paper(first: np.ndarray, second: np.ndarray, i: int, j: int) -> float:
    """Equation 4 of arXiv 2106.09685: right singular vectors of A (rank, in)."""
    u = np.linalg.svd(first, full_matrices=False)[2][:i].T
    v = np.linalg.svd(second, full_matrices=False)[2][:j].T
    return float(np.linalg.norm(u.T @ v, "fro") ** 2 / min(i, j))


@given(rank=st.integers(1, 6), other=st.integers(1, 9), width=st.integers(12, 40), seed=st.integers(0, 99))
def test_phi_is_the_papers(rank: int, other: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((rank, width)), rng.standard_normal((other, width))
    phi = compare_directions(find_directions(first), find_directions(second))
    assert phi.shape == (rank, other)
    for i in range(1, rank + 1):
        for j in range(1, other + 1):
            assert phi[i - 1, j - 1] == pytest.approx(phi_by_the_paper(first, second, i, j), abs=1e-5)
    assert (phi >= 0).all()
    assert (phi <= 1 + 1e-6).all()


def test_phi_of_a_space_and_one_that_holds_it_is_one() -> None:
    rng = np.random.default_rng(0)
    small = rng.standard_normal((3, 50))
    large = np.vstack([small, rng.standard_normal((4, 50))])
    assert compare_directions(find_directions(small), find_directions(large))[-1, -1] == pytest.approx(1, abs=1e-6)
    apart = compare_directions(np.eye(10, 3, dtype=np.float32), np.eye(10, dtype=np.float32)[:, 5:8])
    assert not apart.any()


def test_directions_of_zeros_are_left_out() -> None:
    rng = np.random.default_rng(0)
    down = np.vstack([rng.standard_normal((2, 30)), np.zeros((2, 30))])
    assert find_directions(down).shape == (30, 2)
    assert find_directions(np.zeros((4, 30))).shape == (30, 0)


def test_ranks_of_known_spectra() -> None:
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([5.0, 0.0, 0.0])) == pytest.approx(1)
    shares = np.array([0.5, 0.25, 0.25])
    assert effective_rank(8 * shares) == pytest.approx(math.exp(-(0.5 * math.log(0.5) + 0.5 * math.log(0.25))))
    assert stable_rank(np.array([2.0, 2.0, 1.0])) == pytest.approx(2.25)
    assert (effective_rank(np.zeros(3)), stable_rank(np.zeros(3)), stable_rank(np.zeros(0))) == (0, 0, 0)


def test_projection_of_a_weight_on_its_own_directions_is_their_strength() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((23, 41))
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    assert project(weight, u[:, :5], vt[:5].T) == pytest.approx(float(np.linalg.norm(s[:5])), rel=1e-9)
    assert project(weight, u[:, :5], vt[5:10].T) == pytest.approx(0, abs=1e-9)
