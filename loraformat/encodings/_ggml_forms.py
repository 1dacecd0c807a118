"""What the bytes of ggml's blocks stand for, form by form: `(blocks, bytes)` to `(blocks, numbers)` of float32.

Layouts and the order of products are those of `ggml-common.h` and `ggml-quants.c` (2025): codes of 32 numbers lie in 16
bytes, the lower halves first; blocks of 256 numbers have scales for parts of 16 or 32, which are codes themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]

_IQ4: Final = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_E2M1: Final = np.array([0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""Twice the values of float4_e2m1, whose scales are halves."""


@dataclass(frozen=True, slots=True)
class Form:
    """One form of blocks.

    Attributes:
        decode: makes numbers of bytes.
        part: how many numbers share a scale.
        widest: the widest gap between codes that are neighbours, in units of the narrowest.
    """

    decode: Callable[[Array], Floats]
    part: int
    widest: float = 1.0


def _halves(blocks: Array, start: int, stop: int) -> Array:
    """Return the codes of 4 bits in bytes, `(blocks, 2 * bytes)`: those of the lower halves, then the others."""
    packed = blocks[:, start:stop]
    return np.concatenate([packed & 0xF, packed >> 4], axis=1)


def _float16(blocks: Array, start: int) -> Floats:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _bits(blocks: Array, start: int, stop: int) -> Array:
    """Return single bits, the lowest of a byte first: `(blocks, 8 * bytes)`."""
    return np.unpackbits(blocks[:, start:stop], axis=1, bitorder="little")


def _pairs(blocks: Array, start: int, stop: int, run: int, shifts: Sequence[int]) -> Array:
    """Return codes of 2 bits: of each run of bytes those at the first shift, then those at the next."""
    packed = blocks[:, start:stop].reshape(len(blocks), -1, 1, run)
    return (packed >> np.array(shifts, np.uint8)[:, None] & 3).reshape(len(blocks), -1)


def _apart(codes: Array, part: int) -> Floats:
    return codes.reshape(len(codes), -1, part).astype(np.float32)


def _join(values: Array) -> Floats:
    return values.reshape(len(values), -1).astype(np.float32, copy=False)


def _scale(middle: int, codes: Callable[[Array], Array]) -> Callable[[Array], Floats]:
    return lambda blocks: _float16(blocks, 0) * (codes(blocks).astype(np.float32) - np.float32(middle))


def _shift(codes: Callable[[Array], Array]) -> Callable[[Array], Floats]:
    return lambda blocks: _float16(blocks, 0) * codes(blocks).astype(np.float32) + _float16(blocks, 2)


def _five(start: int) -> Callable[[Array], Array]:
    """Codes of 5 bits: the highest ones stand before the halves."""
    return lambda blocks: _halves(blocks, start + 4, start + 20) | _bits(blocks, start, start + 4) << 4


def _read_scales(blocks: Array, start: int) -> tuple[Array, Array]:
    """Return eight scales and eight least values of 6 bits, which stand in twelve bytes."""
    packed = blocks[:, start : start + 12].reshape(-1, 3, 4)
    scales = np.concatenate([packed[:, 0] & 63, packed[:, 2] & 15 | packed[:, 0] >> 2 & 48], axis=1)
    least = np.concatenate([packed[:, 1] & 63, packed[:, 2] >> 4 | packed[:, 1] >> 2 & 48], axis=1)
    return scales, least


def _spread(blocks: Array, codes: Array, scales: Array, least: Array, at: int) -> Floats:
    """Return `d * scale * code - dmin * least`; d stands at a byte, and dmin behind it."""
    part = codes.shape[1] // scales.shape[1]
    steps = (_float16(blocks, at) * scales.astype(np.float32))[:, :, None]
    shifts = (_float16(blocks, at + 2) * least.astype(np.float32))[:, :, None]
    return _join(steps * _apart(codes, part) - shifts)


def _q2_k(blocks: Array) -> Floats:
    codes = _pairs(blocks, 16, 80, 32, (0, 2, 4, 6))
    return _spread(blocks, codes, blocks[:, :16] & 15, blocks[:, :16] >> 4, 80)


def _q3_k(blocks: Array) -> Floats:
    low = _pairs(blocks, 32, 96, 32, (0, 2, 4, 6))
    high = _bits(blocks, 0, 32).reshape(-1, 32, 8).transpose(0, 2, 1).reshape(len(blocks), -1)
    packed, lower = blocks[:, 96:108], _halves(blocks, 96, 104)
    upper = (packed[:, 8:, None].transpose(0, 2, 1) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(-1, 16)
    scales = (lower | upper << 4).astype(np.float32) - np.float32(32)
    codes = low.astype(np.float32) - np.float32(4) * (1 - high.astype(np.float32))
    return _join((_float16(blocks, 108) * scales)[:, :, None] * _apart(codes, 16))


def _runs(blocks: Array, start: int, stop: int) -> Array:
    """Return codes of 4 bits: of each 32 bytes the lower halves, then the upper."""
    packed = blocks[:, start:stop].reshape(len(blocks), -1, 1, 32)
    return (packed >> np.array([0, 4], np.uint8)[:, None] & 15).reshape(len(blocks), -1)


def _q4_k(blocks: Array) -> Floats:
    return _spread(blocks, _runs(blocks, 16, 144), *_read_scales(blocks, 4), 0)


def _q5_k(blocks: Array) -> Floats:
    high = _bits(blocks, 16, 48).reshape(-1, 32, 8).transpose(0, 2, 1).reshape(len(blocks), -1)
    return _spread(blocks, _runs(blocks, 48, 176) | high << 4, *_read_scales(blocks, 4), 0)


def _q6_k(blocks: Array) -> Floats:
    packed = blocks[:, :128].reshape(len(blocks), 2, 1, 64)
    low = (packed >> np.array([0, 4], np.uint8)[:, None] & 15).reshape(len(blocks), -1)
    high = _pairs(blocks, 128, 192, 32, (0, 2, 4, 6))
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    codes = (low | high << 4).astype(np.float32) - np.float32(32)
    return _join((_float16(blocks, 208) * scales)[:, :, None] * _apart(codes, 16))


def _iq4_xs(blocks: Array) -> Floats:
    low = blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15
    upper = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> (2 * np.arange(8, dtype=np.uint16)) & 3
    scales = (low.reshape(-1, 8) | upper << 4).astype(np.float32) - np.float32(32)
    packed = blocks[:, 8:].reshape(len(blocks), 8, 1, 16)
    values = _IQ4[packed >> np.array([0, 4], np.uint8)[:, None] & 15].reshape(len(blocks), 8, 32)
    return _join((_float16(blocks, 0) * scales)[:, :, None] * values)


def _mxfp4(blocks: Array) -> Floats:
    scales = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return _join(scales * _E2M1[_halves(blocks, 1, 17)])


def _tq2_0(blocks: Array) -> Floats:
    codes = _pairs(blocks, 0, 64, 32, (0, 2, 4, 6))
    return _join((codes.astype(np.float32) - np.float32(1)) * _float16(blocks, 64))


FORMS: Final[Mapping[str, Form]] = {
    "q4_0": Form(_scale(8, lambda blocks: _halves(blocks, 2, 18)), 32),
    "q4_1": Form(_shift(lambda blocks: _halves(blocks, 4, 20)), 32),
    "q5_0": Form(_scale(16, _five(2)), 32),
    "q5_1": Form(_shift(_five(4)), 32),
    "q2_k": Form(_q2_k, 16),
    "q3_k": Form(_q3_k, 16),
    "q4_k": Form(_q4_k, 32),
    "q5_k": Form(_q5_k, 32),
    "q6_k": Form(_q6_k, 16),
    "iq4_nl": Form(lambda blocks: _float16(blocks, 0) * _IQ4[_halves(blocks, 2, 18)], 32, 24 / 11),
    "iq4_xs": Form(_iq4_xs, 32, 24 / 11),
    "mxfp4": Form(_mxfp4, 32, 4.0),
    "tq2_0": Form(_tq2_0, 256),
}
"""By the names of `enum ggml_type`. Those that are not here look up codes of many bits in tables of thousands."""
