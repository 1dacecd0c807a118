"""Fingerprints as SPEC section 7 has them: positions, tolerance, and how likely a false match is."""

import hashlib
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import write_tensors
from loraformat.containers import CONTAINERS
from loraformat.fingerprint import DISTINCT, SAMPLES, Fingerprint, positions, sample_weight
from loraformat.spans import StoredTensor

NAME = "model.layers.0.self_attn.q_proj"
OUT, INNER = 48, 80
FORMS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def expected_positions(target: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """R-061, word by word."""
    out, width = shape[0], int(np.prod(shape[1:]))
    places = []
    for j in range(16):
        h = hashlib.sha256(
            b"loraformat-fingerprint-1" + b"\x0a" + target.encode("utf-8") + b"\x0a" + b"%d" % j
        ).digest()
        r = sum(byte << (8 * (7 - place)) for place, byte in enumerate(h[0:8])) % out
        c = sum(byte << (8 * (7 - place)) for place, byte in enumerate(h[8:16])) % width
        places.append((r, c))
    return places


def expected_samples(target: str, canonical: np.ndarray[Any, Any]) -> list[float]:
    matrix = canonical.reshape(canonical.shape[0], -1)
    return [float(np.float32(matrix[r, c])) for r, c in expected_positions(target, canonical.shape)]


def stored(folder: Path, array: np.ndarray[Any, Any]) -> StoredTensor:
    container = CONTAINERS.find("safetensors")
    assert container is not None
    path = write_tensors(folder / "weight.safetensors", {"w": array, "before": np.ones(3, np.float32)})
    tensor = container.open(path).tensors["w"]
    assert isinstance(tensor, StoredTensor)
    return tensor


def take(weight: np.ndarray[Any, Any], target: str = NAME) -> Fingerprint:
    return Fingerprint(weight.shape, tuple(expected_samples(target, weight)))


# --- positions -------------------------------------------------------------------------------------------------------


@given(st.text(), st.lists(st.integers(1, 70000), min_size=2, max_size=5).map(tuple))
def test_positions_are_those_of_the_specification(target: str, shape: tuple[int, ...]) -> None:
    assert positions(target, shape) == expected_positions(target, shape)


def test_positions_of_one_name_for_other_implementations() -> None:
    """Written down once: a change here is a change of the format."""
    assert positions("model.q", (48, 80)) == expected_positions("model.q", (48, 80))
    assert len(positions("model.q", (48, 80))) == SAMPLES == 16
    assert positions("model.q", (1, 1)) == [(0, 0)] * 16
    assert positions("model.q", (48, 80)) != positions("model.k", (48, 80))
    assert positions("model.q", (48, 8, 10)) == positions("model.q", (48, 80))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(OUT, INNER), (12, 5, 3), (7, 4, 3, 2)])
def test_samples_are_the_weights_numbers(tmp_path: Path, form: Any, transposed: bool, shape: tuple[int, ...]) -> None:
    canonical = np.random.default_rng(1).standard_normal(shape).astype(form)
    matrix = canonical.reshape(shape[0], -1)
    tensor = stored(tmp_path, matrix.T if transposed else canonical)
    assert list(sample_weight(NAME, shape, tensor, transposed=transposed)) == expected_samples(NAME, canonical)


def test_only_the_samples_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = stored(tmp_path, np.ones((400, 300), np.float32))
    seen: list[int] = []
    real = type(tensor.file).read_into

    def read_into(file: Any, buffer: Any, offset: int) -> None:
        seen.append(memoryview(buffer).nbytes)
        real(file, buffer, offset)

    monkeypatch.setattr(type(tensor.file), "read_into", read_into)
    sample_weight(NAME, (400, 300), tensor, transposed=False)
    assert seen == [4] * SAMPLES


# --- matching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spread", [1.0, 0.02, 300.0])
def test_a_cast_weight_is_known_again(tmp_path: Path, form: Any, transposed: bool, spread: float) -> None:
    rng = np.random.default_rng(2)
    for place in range(20):
        weight = (rng.standard_normal((OUT, INNER)) * spread).astype(np.float32)
        cast = weight.astype(form)
        tensor = stored(tmp_path, cast.T if transposed else cast)
        name = f"layers.{place}"
        assert take(weight, name).matches(sample_weight(name, weight.shape, tensor, transposed=transposed))


def test_a_cast_fingerprint_knows_the_original(tmp_path: Path) -> None:
    weight = np.random.default_rng(3).standard_normal((OUT, INNER)).astype(np.float32)
    cast = weight.astype(ml_dtypes.bfloat16)
    assert take(cast).matches(sample_weight(NAME, weight.shape, stored(tmp_path, weight), transposed=False))


def test_foreign_weights_do_not_match(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((OUT, INNER)).astype(np.float32)
    mine = take(weight)
    others = {
        "another": rng.standard_normal((OUT, INNER)).astype(np.float32),
        "tuned by 2 %": weight * np.float32(1.02),
        "negated": -weight,
        "rolled": np.roll(weight, 1, axis=1),
        "not a number": weight * np.float32(np.nan),
    }
    for what, other in others.items():
        assert not mine.matches(expected_samples(NAME, other)), what
    turned = stored(tmp_path, weight)
    assert not mine.matches(sample_weight(NAME, weight.shape, turned, transposed=True)), "read the other way round"


def test_the_bounds_of_the_tolerance() -> None:
    """R-062: |s - v| <= 2^-8·|s| + 2^-12·m, where m is the largest of the sixteen."""
    samples = [8.0, 1.0, -1.0, 0.0, *([2.0] * 12)]
    slack = 8.0 * 2.0**-12
    fingerprint = Fingerprint((4, 4), tuple(samples))
    for place, sample in enumerate(samples[:4]):
        bound = abs(sample) * 2.0**-8 + slack
        for sign in (-1, 1):
            near, far = list(samples), list(samples)
            near[place] += sign * bound
            far[place] += sign * bound * (1 + 2.0**-20)
            assert fingerprint.matches(near)
            assert not fingerprint.matches(far)


def test_what_is_telling() -> None:
    assert DISTINCT == 8
    assert not Fingerprint((4, 4), (0.5,) * 16).is_telling
    assert not Fingerprint((4, 4), (*map(float, range(7)), *[6.0] * 9)).is_telling
    assert Fingerprint((4, 4), (*map(float, range(8)), *[7.0] * 8)).is_telling


def test_zero_matches_zero_alone() -> None:
    zeros = Fingerprint((4, 4), (0.0,) * 16)
    assert zeros.matches((0.0,) * 16)
    assert not zeros.matches((*[0.0] * 15, 1e-30))


# --- how likely a false match is -------------------------------------------------------------------------------------

PAIRS = 1_600_000


def chance(rng: np.random.Generator) -> float:
    """Return the share of samples of foreign weights, normally distributed, that agree: R-062 in plain numpy."""
    own, foreign = (rng.standard_normal((PAIRS // 16, 16)) for _ in range(2))
    largest = np.abs(own).max(axis=1, keepdims=True)
    return float((np.abs(own - foreign) <= 2.0**-8 * np.abs(own) + 2.0**-12 * largest).mean())


def test_the_chance_of_one_sample() -> None:
    """Section 7 says about 0.002. By the integral it is 2·(2^-8·E|s|φ(s) + 2^-12·E[m]·Eφ(s)) = 0.0015."""
    rate = chance(np.random.default_rng(7))
    predicted = 2 * (2**-8 / (2 * math.pi) + 2**-12 * 1.97 / (2 * math.sqrt(math.pi)))
    assert rate < 0.004
    assert rate == pytest.approx(predicted, rel=0.1)


def test_the_chance_of_all_samples() -> None:
    """Sixteen about 10^-43, eight distinct ones 10^-21: the specification errs on the safe side."""
    rate = chance(np.random.default_rng(8))
    assert 16 * math.log10(rate) < -43
    assert 8 * math.log10(rate) < -21


def test_the_estimate_is_of_our_own_rule() -> None:
    """The numpy formula above and `matches` agree, on pairs that are near enough for both answers to occur."""
    rng = np.random.default_rng(9)
    answers = []
    for _ in range(3000):
        own = rng.standard_normal(16)
        other = own * (1 + rng.uniform(-1, 1, 16) * 2.0**-8 * rng.uniform(0.5, 1.5))
        bound = 2.0**-8 * np.abs(own) + 2.0**-12 * np.abs(own).max()
        answers.append(Fingerprint((4, 4), tuple(own.tolist())).matches(other.tolist()))
        assert answers[-1] == bool((np.abs(own - other) <= bound).all())
    assert 300 < sum(answers) < 2700
