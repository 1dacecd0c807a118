"""The randomised search against numpy's full SVD."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loraformat.algebra._random import generator
from loraformat.algebra._randomised import leading_svd


def make(rows: int, columns: int, values: NDArray[np.float64], seed: int = 0) -> NDArray[np.float32]:
    """Return a matrix with these singular values."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((columns, len(values))))[0]
    return ((left * values) @ right.T).astype(np.float32)


def best_error(matrix: NDArray[np.float32], rank: int) -> float:
    return float(np.linalg.norm(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[rank:]))


SPECTRA = {
    "slow": np.arange(1, 301) ** -0.5,
    "harmonic": np.arange(1, 301) ** -1.0,
    "exponential": np.exp(-np.arange(300) / 15.0),
    "flat": np.ones(300),
    "step": np.r_[np.full(8, 5.0), np.full(292, 0.5)],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("shape", "rank"), [((300, 430), 4), ((430, 300), 17)])
def test_the_error_is_within_one_per_cent_of_the_best(spectrum: str, shape: tuple[int, int], rank: int) -> None:
    matrix = make(*shape, SPECTRA[spectrum])
    found = leading_svd(matrix, generator("test", 0, spectrum), rank=rank)
    left, values, right = found.svd
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])
    error = float(np.linalg.norm(matrix - (left * values) @ right))
    assert error <= 1.01 * best_error(matrix, rank)
    assert found.left_out == pytest.approx(error, rel=1e-4), "the stated error is the real one"
    assert found.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-6)
    np.testing.assert_allclose(left.T @ left, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(right @ right.T, np.eye(rank), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_a_low_rank_is_found_exactly(rank: int) -> None:
    matrix = make(330, 510, np.linspace(3.0, 1.0, rank))
    found = leading_svd(matrix, generator("test", 1, "low"), leave=1e-5)
    assert len(found.svd.values) == rank
    np.testing.assert_allclose(found.svd.values, np.linspace(3.0, 1.0, rank), rtol=1e-5)
    assert found.left_out < 1e-5


def test_a_rank_beyond_a_third_goes_by_the_gram_matrix() -> None:
    values = np.arange(1, 121) ** -0.5
    for shape in ((120, 200), (200, 120)):
        matrix = make(*shape, values)
        found = leading_svd(matrix, generator("test", 1, "dense"), rank=90)
        np.testing.assert_allclose(found.svd.values, values[:90], rtol=1e-5)
        assert found.left_out == pytest.approx(best_error(matrix, 90), rel=1e-6)


@given(leave=st.floats(0.02, 0.9), rows=st.integers(20, 140), seed=st.integers(0, 99))
def test_no_more_values_than_needed(leave: float, rows: int, seed: int) -> None:
    """The rank is that of the best cut, or one more where an iteration stopped just short of it."""
    matrix = make(rows, 150, np.arange(1, rows + 1) ** -0.8, seed)
    norm = float(np.linalg.norm(matrix.astype(np.float64)))
    found = leading_svd(matrix, generator("test", seed, "leave"), leave=leave * norm)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    tails = np.sqrt(np.r_[np.cumsum(values[::-1] ** 2)[::-1], 0.0])
    fewest = int(np.flatnonzero(tails <= leave * norm)[0])
    assert found.left_out <= leave * norm
    assert fewest <= len(found.svd.values) <= fewest + 1


def test_it_depends_on_the_generator_alone() -> None:
    matrix = make(200, 90, SPECTRA["slow"][:90])
    first, again, other = (leading_svd(matrix, generator("test", seed, "x"), rank=5) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.svd.left, again.svd.left)
    assert not np.array_equal(first.svd.left, other.svd.left)


def test_zero_has_no_values() -> None:
    found = leading_svd(np.zeros((30, 20), np.float32), generator("test", 0, "zero"), rank=3)
    assert len(found.svd.values) == 0
    assert (found.left_out, found.norm) == (0.0, 0.0)


def test_generators_follow_from_the_name() -> None:
    """The first bits of Philox keyed with SHA-256, as anybody can compute them."""
    import hashlib

    key = int.from_bytes(hashlib.sha256(b"purpose\n7\na.b").digest()[:16], "little")
    expected = np.random.Philox(key=key).random_raw(4)
    np.testing.assert_array_equal(generator("purpose", 7, "a.b").bit_generator.random_raw(4), expected)
    assert generator("purpose", 7, "a.c").bit_generator.random_raw() != expected[0]
