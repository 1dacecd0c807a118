"""Weights that are stored as floating-point numbers, as they are.

numpy and ml_dtypes round correctly (the tests compare them with an independent reference), so most forms are a cast.
Three detours, each for measured speed: numpy widens and narrows float16 without vector instructions, and ml_dtypes
takes some ten nanoseconds for one 8-bit number.
"""

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import BY_NAME, Dtype, is_all_finite
from loraformat.limits import TILE_BYTES

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
        elif stored.dtype == np.float16 and out.dtype == np.float32 and is_all_finite(stored) and _subnormals_work():
            _widen_finite(stored, out)
        elif stored.dtype.itemsize == 2 and stored.dtype != np.float16:  # bfloat16: bits are moved, nothing computed.
            np.copyto(out, stored)
        else:
            with np.errstate(invalid="ignore"):  # A signalling NaN.
                np.copyto(out, stored)

    def add(self, stored: NDArray[Any], out: NDArray[Any]) -> None:
        """Add the values of `stored` to `out`: bfloat16 and wider as they are widened, others a tile at a time."""
        if stored.dtype != np.float16 and stored.dtype.itemsize > 1:
            np.add(stored, out, out=out, dtype=out.dtype)
            return
        flat, sums = stored.reshape(-1), out.reshape(-1)
        for start in range(0, len(flat), _STEP):
            some = flat[start : start + _STEP]
            values = _ROOM.values[: len(some)]
            self.decode(some, values)
            np.add(values, sums[start : start + _STEP], out=sums[start : start + _STEP])

    def encode(self, values: NDArray[Any], out: NDArray[Any]) -> None:
        """Round `values` once (nearest, ties to even) into `out`; see `loraformat.encodings.Encoding`."""
        if out.dtype.itemsize == 1 and values.dtype == np.float32:
            _look_up(_codes_of(out.dtype), values.view(np.uint32), out.view(np.uint8))
        elif out.dtype == np.float16 and values.dtype == np.float32 and values.flags.c_contiguous:
            _narrow(values.reshape(-1), out.reshape(-1))
        else:
            with np.errstate(all="ignore"):
                np.copyto(out, values, casting="unsafe")


ENCODING: Final = Plain()

_STEP: Final = TILE_BYTES // 4
"""Numbers converted at a time, those of a tile: between shorter steps, threads wait for the interpreter."""
_ODD_AND_SIGN: Final = np.array(1 | 1 << 28 | -(1 << 31), np.int32)
_HALF_AND_BIAS: Final = np.array(0xFFF - (112 << 23), np.int32)
_TWICE_SMALLEST: Final = np.array(2 * 0x38800000, np.uint32)
"""2**-14 as float32, without its sign, shifted by one: below it, float16 has fewer digits."""
_TWICE_TOO_LARGE: Final = np.array(2 * 0x477FF000, np.uint32)
"""65520 likewise: from here on, float16 has infinity."""


class _Room(threading.local):
    """What is computed in, once for each thread: memory taken anew for each tile costs page faults."""

    def __init__(self) -> None:
        self.values: NDArray[np.float32] = np.empty(_STEP, np.float32)
        self.bits: NDArray[np.int32] = np.empty(_STEP, np.int32)
        self.strange: NDArray[np.bool_] = np.empty(_STEP, np.bool_)


_ROOM: Final = _Room()


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


def _narrow(values: NDArray[Any], out: NDArray[Any]) -> None:
    """Round float32 to float16, a tile at a time.

    Where the result is a normal number, its bits are the float32's, rounded at bit 13, with another exponent bias. The
    others (subnormal, infinite, NaN), few in a weight, are left to numpy.
    """
    for start in range(0, len(values), _STEP):
        some, sink = values[start : start + _STEP], out[start : start + _STEP]
        _narrow_normal(some.view(np.int32), sink.view(np.uint16), _ROOM.bits[: len(some)])
        doubled, strange = _ROOM.bits[: len(some)].view(np.uint32), _ROOM.strange[: len(some)]
        np.left_shift(some.view(np.uint32), 1, out=doubled)
        np.subtract(doubled, _TWICE_SMALLEST, out=doubled)
        np.greater_equal(doubled, _TWICE_TOO_LARGE - _TWICE_SMALLEST, out=strange)
        with np.errstate(all="ignore"):
            np.copyto(sink, some, casting="unsafe", where=strange)


def _narrow_normal(bits: NDArray[np.int32], out: NDArray[np.uint16], room: NDArray[np.int32]) -> None:
    """Write the float16 patterns of float32 patterns that have a normal one; sums wrap around at 32 bits.

    An arithmetic shift puts the last bit kept at bit 0 and the sign at all bits from 18. Of these, bit 0 makes ties
    even, and bits 28 and 31 carry the sign from bit 31 to bit 28, where the last shift finds it.
    """
    np.right_shift(bits, 13, out=room)
    np.bitwise_and(room, _ODD_AND_SIGN, out=room)
    np.add(room, bits, out=room)
    np.add(room, _HALF_AND_BIAS, out=room)
    np.right_shift(room, 13, out=room)
    np.copyto(out, room, casting="unsafe")


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
