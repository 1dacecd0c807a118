"""Weights that are stored as floating-point numbers, as they are.

numpy and ml_dtypes round correctly (the tests compare them with an independent reference), so most forms are a cast.
Two detours, each for measured speed: numpy widens float16 without vector instructions, and ml_dtypes takes some ten
nanoseconds for one 8-bit number.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import BY_NAME, Dtype

_FORMS: Final = frozenset(
    BY_NAME[name]
    for name in (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
    )
)


@dataclass(frozen=True, slots=True)
class Plain:
    """Plain floating-point numbers."""

    name: str = "plain"

    def accepts(self, dtype: Dtype) -> bool:
        """Say whether `dtype` is a floating-point form whose elements fill whole bytes."""
        return dtype in _FORMS

    def work_dtype(self, dtype: Dtype) -> np.dtype[Any]:
        """Return float64 for float64, float32 for all others."""
        return np.dtype(np.float64 if dtype.name == "float64" else np.float32)

    def decode(self, stored: NDArray[Any], out: NDArray[Any]) -> None:
        """Write the values of `stored` into `out`, exactly."""
        if stored.dtype.itemsize == 1:
            _look_up(_values_of(stored.dtype), stored.view(np.uint8), out)
        elif stored.dtype == np.float16 and out.dtype == np.float32 and _all_finite(stored) and _subnormals_work():
            _widen_finite(stored, out)
        else:
            with np.errstate(invalid="ignore"):  # A signalling NaN.
                np.copyto(out, stored)

    def encode(self, values: NDArray[Any], out: NDArray[Any]) -> None:
        """Round `values` once (nearest, ties to even) into `out`; see `loraformat.encodings.Encoding`."""
        if out.dtype.itemsize == 1 and values.dtype == np.float32:
            _look_up(_codes_of(out.dtype), values.view(np.uint32), out.view(np.uint8))
        else:
            with np.errstate(all="ignore"):
                np.copyto(out, values, casting="unsafe")


ENCODING: Final = Plain()


def _all_finite(stored: NDArray[Any]) -> bool:
    """Say whether a float16 array holds neither infinity nor NaN: patterns from 0x7c00 and from 0xfc00 up."""
    if not stored.size:
        return True
    return bool(stored.view(np.int16).max() < 0x7C00 and stored.view(np.uint16).max() < 0xFC00)


def _subnormals_work() -> bool:
    """Say whether this thread computes with subnormals: a library built with -ffast-math may have switched them off."""
    return bool(np.multiply(np.float32(2.0**-149), np.float32(2.0)))


def _widen_finite(stored: NDArray[Any], out: NDArray[Any]) -> None:
    """Move float16's bits to their places in float32 and mend the exponent's bias by an exact multiplication."""
    bits = out.view(np.int32)
    np.copyto(bits, stored.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70002000), out=bits)  # Drops the copies of the sign in bits 28 to 30.
    np.multiply(out, np.float32(2.0**112), out=out)


def _look_up(table: NDArray[Any], keys: NDArray[Any], out: NDArray[Any]) -> None:
    """Write `table[key]` for each key, some thousands at a time.

    Keys of 32 bits are float32 patterns and are reduced to 16 bits first. The reduction is rounding to odd: the bits
    cut off leave a mark in the last bit kept. That bit lies two or more places below an 8-bit form's last, so the
    table's rounding sees what one rounding would have seen.
    """
    steps = np.nditer(
        [keys, out],
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=[["readonly"], ["writeonly"]],
    )
    with steps:
        for some, sink in steps:
            if some.dtype == np.uint32:
                marked = some & np.uint32(0xFFFF)
                marked += np.uint32(0xFFFF)
                marked |= some
                some = marked >> np.uint32(16)
            np.take(table, some, out=sink, mode="clip")


@cache
def _values_of(form: np.dtype[Any]) -> NDArray[np.float32]:
    """Return the value of each 8-bit pattern."""
    with np.errstate(all="ignore"):
        return np.arange(1 << 8, dtype=np.uint8).view(form).astype(np.float32)


@cache
def _codes_of(form: np.dtype[Any]) -> NDArray[np.uint8]:
    """Return the 8-bit pattern nearest to each float32 whose lower 16 bits are zero."""
    bits = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    with np.errstate(all="ignore"):
        return bits.view(np.float32).astype(form).view(np.uint8)
