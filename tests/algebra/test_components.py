"""Directions of a covariance: plain ones are eigenvectors; smooth and sparse ones are what they are called."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loraformat.algebra.components import PLAIN, Structure, leading_components

WIDTH = 40


def covariance_of(
    directions: NDArray[np.float64], strengths: list[float], noise: float, seed: int = 0
) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((2000, len(strengths))) * strengths
    data = weights @ directions + noise * rng.standard_normal((2000, WIDTH))
    return data.T @ data / len(data)


def roughness(rows: NDArray[np.float64]) -> float:
    return float(np.sum(np.diff(rows, axis=1) ** 2))


@given(count=st.integers(1, 8), seed=st.integers(0, 50))
def test_plain_components_are_the_leading_eigenvectors(count: int, seed: int) -> None:
    root = np.random.default_rng(seed).standard_normal((WIDTH, WIDTH))
    covariance = root @ root.T
    rows = leading_components(covariance, count, PLAIN)
    values = np.linalg.eigvalsh(covariance)[::-1]
    np.testing.assert_allclose(covariance @ rows.T, rows.T * values[:count], rtol=0, atol=1e-8 * values[0])
    np.testing.assert_allclose(rows @ rows.T, np.eye(count), atol=1e-10)
    assert (rows[np.arange(count), np.abs(rows).argmax(axis=1)] > 0).all(), "signs are fixed"


def test_smooth_components_are_smoother_and_find_what_is_smooth() -> None:
    wave = np.sin(np.arange(WIDTH) / WIDTH * np.pi)[None]
    wave /= np.linalg.norm(wave)
    covariance = covariance_of(wave, [0.6], 0.8, seed=3)
    plain = leading_components(covariance, 1, PLAIN)
    smooth = leading_components(covariance, 1, Structure(smoothness=5.0))
    assert roughness(smooth) < 0.2 * roughness(plain)
    assert abs(smooth @ wave.T).item() > abs(plain @ wave.T).item()


@pytest.mark.parametrize("count", [1, 4])
def test_smooth_components_solve_their_problem(count: int) -> None:
    """C v = μ (I + λ DᵀD) v by an independent route: the eigenvectors of (I + λ DᵀD)⁻¹ C span the same space."""
    root = np.random.default_rng(4).standard_normal((WIDTH, WIDTH))
    covariance = root @ root.T
    rows = leading_components(covariance, count, Structure(smoothness=2.0))
    step = np.diff(np.eye(WIDTH), axis=0)
    values, vectors = np.linalg.eig(np.linalg.inv(np.eye(WIDTH) + 2.0 * step.T @ step) @ covariance)
    expected = np.linalg.qr(vectors[:, np.argsort(-values.real)[:count]].real)[0]
    assert np.linalg.norm(rows @ expected) ** 2 == pytest.approx(count, abs=1e-8)


def test_sparse_components_find_what_is_sparse() -> None:
    truth = np.zeros((2, WIDTH))
    truth[0, 3:7], truth[1, 20:26] = 0.5, 1 / np.sqrt(6)
    covariance = covariance_of(truth, [2.0, 1.0], 0.3, seed=5)
    rows = leading_components(covariance, 2, Structure(sparsity=0.3))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)
    for row, expected in zip(rows, truth, strict=True):
        assert set(np.flatnonzero(row)) == set(np.flatnonzero(expected))
        assert abs(row @ expected) > 0.98
    plain = leading_components(covariance, 2, PLAIN)
    assert np.count_nonzero(plain) == plain.size
