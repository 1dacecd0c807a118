"""Plain number forms against a reference made of integers: tables of exact values, and a search for the nearest."""

import warnings
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from laws.encoding_laws import EncodingLaws, widen
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.encodings import plain
from loraformat.encodings.plain import ENCODING


class Form(NamedTuple):
    """A small number form as its definition has it: OCP 8-bit formats, IEEE 754 binary16, bfloat16."""

    bits: int
    mantissa: int
    bias: int
    specials: str
    """`ieee`: the top exponent is infinity and NaN; `fn`: only all ones is NaN; `fnuz`: only negative zero is NaN."""


FORMS = {
    "float16": Form(16, 10, 15, "ieee"),
    "bfloat16": Form(16, 7, 127, "ieee"),
    "float8_e5m2": Form(8, 2, 15, "ieee"),
    "float8_e4m3fn": Form(8, 3, 7, "fn"),
    "float8_e4m3fnuz": Form(8, 3, 8, "fnuz"),
    "float8_e5m2fnuz": Form(8, 2, 16, "fnuz"),
}


@cache
def magnitudes(name: str) -> tuple[NDArray[np.float64], int]:
    """Return the exact value of each non-negative pattern, and how many of them are finite.

    Patterns above the finite ones have the value that the form would have if it went on: rounding needs one of them.
    """
    form = FORMS[name]
    values = []
    for pattern in range(1 << (form.bits - 1)):
        exponent, mantissa = pattern >> form.mantissa, pattern & ((1 << form.mantissa) - 1)
        units = mantissa if exponent == 0 else mantissa + (1 << form.mantissa)
        values.append(Fraction(units) * Fraction(2) ** (max(exponent, 1) - form.bias - form.mantissa))
    values.append(2 * values[-1] - values[-2])
    exact = np.array([float(value) for value in values])
    assert all(Fraction(number) == value for number, value in zip(exact.tolist(), values, strict=True))
    top = 1 << (form.bits - 1)
    finite = {"ieee": top - (1 << form.mantissa), "fn": top - 1, "fnuz": top}[form.specials]
    return exact, finite


@cache
def decoding_table(name: str) -> NDArray[np.float64]:
    """Return the value of every pattern."""
    form, (exact, finite) = FORMS[name], magnitudes(name)
    half = exact[:-1].copy()
    half[finite:] = np.nan
    if form.specials == "ieee":
        half[finite] = np.inf
    table = np.concatenate([half, -half])
    if form.specials == "fnuz":
        table[len(half)] = np.nan
    return table


def round_reference(values: NDArray[Any], name: str) -> NDArray[np.unsignedinteger[Any]]:
    """Return the patterns nearest to `values`, ties to the even pattern; NaN as the form's highest NaN."""
    form, (exact, finite) = FORMS[name], magnitudes(name)
    size = np.abs(widen(values))
    below = np.clip(np.searchsorted(exact[: finite + 1], size, side="right") - 1, 0, finite)
    above = np.minimum(below + 1, finite)
    # Exact: all of these have few bits, and float64 has room for the differences of neighbours.
    down, up = size - exact[below], exact[above] - size
    pattern = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    overflow = (pattern >= finite) | np.isinf(size)
    top = 1 << (form.bits - 1)
    nan = 1 << (form.bits - 1) if form.specials == "fnuz" else top - 1
    pattern = np.where(overflow, finite if form.specials == "ieee" else nan, pattern)
    negative = np.signbit(values) & (pattern < top) & ((pattern > 0) | (form.specials != "fnuz"))
    pattern = np.where(np.isnan(size), nan, np.where(negative, pattern + top, pattern))
    return pattern.astype(np.uint16 if form.bits == 16 else np.uint8)


def neighbours(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `values` with the float32 numbers on either side."""
    up, down = np.float32(np.inf), np.float32(-np.inf)
    return np.concatenate([values, np.nextafter(values, up), np.nextafter(values, down)])


@cache
def float32_samples(name: str) -> NDArray[np.float32]:
    """Return every value of the form, every midpoint, their neighbours, both signs, the specials, and a crowd."""
    exact, finite = magnitudes(name)
    points = np.concatenate([exact[: finite + 1], (exact[:finite] + exact[1 : finite + 1]) / 2])
    with np.errstate(over="ignore"):
        single = points.astype(np.float32)
    assert (single.astype(np.float64) == points)[: 2 * finite].all() or name == "bfloat16"
    near = neighbours(single)
    crowd = np.random.default_rng(0).integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    specials = np.array([0, np.inf, np.nan, 2.0**-149, 3.4028234e38, 1e-45, 65519.996, 65520], dtype=np.float32)
    return np.concatenate([near, -near, specials, -specials, crowd])


class TestPlain(EncodingLaws):
    encoding = ENCODING
    dtypes = tuple(BY_NAME[name] for name in ("float64", "float32", *FORMS))

    def stored_samples(self, dtype: Dtype) -> NDArray[Any]:
        if dtype.bits <= 16:
            return np.arange(1 << dtype.bits).astype(f"u{dtype.bits // 8}").view(dtype.numpy())
        crowd = np.random.default_rng(1).integers(0, 2**64, 50_000, dtype=np.uint64)
        return crowd.view(dtype.numpy())

    def decode_reference(self, stored: NDArray[Any]) -> NDArray[np.float64]:
        name = stored.dtype.name
        if name not in FORMS:
            return widen(stored)
        return decoding_table(name)[stored.view(f"u{stored.dtype.itemsize}")]

    def value_samples(self, dtype: Dtype) -> NDArray[Any]:
        return float32_samples(dtype.name) if dtype.name in FORMS else self.stored_samples(dtype)

    def encode_reference(self, values: NDArray[Any], dtype: Dtype) -> NDArray[Any]:
        if dtype.name not in FORMS:
            assert values.dtype == dtype.numpy()
            return values
        return round_reference(values, dtype.name).view(dtype.numpy())


@pytest.mark.parametrize("name", FORMS)
def test_the_casts_we_build_on_round_once(name: str) -> None:
    """numpy's and ml_dtypes' own casts, which the fast ways are checked against and built from."""
    values, form = float32_samples(name), BY_NAME[name].numpy()
    with np.errstate(all="ignore"):
        found = values.astype(form)
    expected = round_reference(values, name).view(form)
    finite = ~np.isnan(decoding_table(name)[expected.view(f"u{form.itemsize}")])
    assert found[finite].tobytes() == expected[finite].tobytes()
    assert np.isnan(widen(found[~finite])).all()


def test_the_reference_knows_the_published_numbers() -> None:
    """OCP 8-bit Floating Point Specification, IEEE 754, and ties worked out by hand."""
    largest = {name: magnitudes(name)[0][magnitudes(name)[1] - 1] for name in FORMS}
    assert largest == {
        "float16": 65504,
        "bfloat16": 3.3895313892515355e38,
        "float8_e5m2": 57344,
        "float8_e4m3fn": 448,
        "float8_e4m3fnuz": 240,
        "float8_e5m2fnuz": 57344,
    }
    smallest = {name: magnitudes(name)[0][1] for name in FORMS}
    assert smallest["float16"] == 2.0**-24
    assert smallest["float8_e4m3fn"] == 2.0**-9
    ties = {1 + 2**-11: 0x3C00, 1 + 3 * 2**-11: 0x3C02, 65520: 0x7C00, 65519.996: 0x7BFF, -(2.0**-25): 0x8000}
    assert round_reference(np.array(list(ties)), "float16").tolist() == list(ties.values())
    assert round_reference(np.array([464.0, 464.1, 1.0625]), "float8_e4m3fn").tolist() == [0x7E, 0x7F, 0x38]


def test_a_tie_that_float16_would_make_is_none() -> None:
    """Just above a tie of the 8-bit form: rounded to float16 on the way, it would fall on the tie and go down."""
    above = np.float32(1.0625 + 2.0**-20)
    out = np.zeros(1, dtype=ml_dtypes.float8_e4m3fn)
    ENCODING.encode(np.array([above]), out)
    assert float(out[0]) == 1.125
    assert float(np.array([above]).astype(np.float16).astype(ml_dtypes.float8_e4m3fn)[0]) == 1.0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("float16", 7e4, np.inf),
        ("bfloat16", -3.4e38, -np.inf),
        ("float8_e5m2", 1e6, np.inf),
        ("float8_e4m3fn", 500, np.nan),
        ("float8_e4m3fnuz", -1e3, np.nan),
    ],
)
def test_what_leaves_the_range_is_not_finite_and_not_a_warning(name: str, value: float, expected: float) -> None:
    out = np.zeros((2, 3), dtype=BY_NAME[name].numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ENCODING.encode(np.full((2, 3), value, dtype=np.float32), out)
    np.testing.assert_array_equal(out.astype(np.float64), expected)


def test_float16_steps_meet_without_a_gap() -> None:
    """As many numbers as are converted at a time, and some more; numpy's own cast is the reference."""
    values = (np.random.default_rng(3).standard_normal(plain._STEP + 5) * 0.01).astype(np.float32)
    found = np.zeros(values.size, np.float16)
    plain.ENCODING.encode(values.copy(), found)
    assert found.tobytes() == values.astype(np.float16).tobytes()
    sums = np.ones(values.size, np.float32)
    plain.ENCODING.add(found, sums)
    assert sums.tobytes() == (found.astype(np.float32) + np.float32(1)).tobytes()


@pytest.mark.parametrize("special", [0x7C00, 0xFC00, 0x7C01, 0xFE00, 0xFFFF], ids=hex)
def test_one_special_in_a_float16_tile_is_seen(special: int) -> None:
    stored = np.arange(0x100, dtype=np.uint16)
    stored[77] = special
    tile = np.zeros(0x100, dtype=np.float32)
    ENCODING.decode(stored.view(np.float16), tile)
    np.testing.assert_array_equal(tile, widen(stored.view(np.float16)))
    assert not np.isfinite(tile[77])


def test_float16_subnormals_survive_a_processor_that_drops_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = np.arange(1, 0x400, dtype=np.uint16).view(np.float16)
    tile = np.zeros(stored.shape, dtype=np.float32)

    def widen_and_drop(stored: NDArray[Any], out: NDArray[Any]) -> None:
        out[...] = 0

    assert plain._subnormals_work()
    monkeypatch.setattr(plain, "_widen_finite", widen_and_drop)
    monkeypatch.setattr(plain, "_subnormals_work", lambda: False)
    ENCODING.decode(stored, tile)
    np.testing.assert_array_equal(tile, np.arange(1, 0x400) * 2.0**-24)
