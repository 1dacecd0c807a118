"""What a merge measures: the share of a change that survived rounding, and numbers that left their range."""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import is_all_finite

_NARROW_BYTES: Final = 2
_MOST_SQUARES: Final = 1e290
"""What the sums of all tiles of a weight add up to is finite when each is below."""
_LARGEST: Final = 1e140
"""Of larger numbers, which only float64 has, the squares are not summed."""


@dataclass(frozen=True, slots=True)
class TileSums:
    """What one tile, or the tiles of one weight, add up to; float64.

    Attributes:
        kept: Σ Δ·(W′−W).
        wanted: Σ Δ².
        base: Σ W².
        overflowed: numbers that left the range of the stored form.
        not_finite: numbers of the base that were NaN or infinite before.
        error: the largest |W′ − (W+Δ)| beside the largest |W+Δ| of its tile.
    """

    kept: float = 0.0
    wanted: float = 0.0
    base: float = 0.0
    overflowed: int = 0
    not_finite: int = 0
    error: float = 0.0

    def __add__(self, other: "TileSums") -> "TileSums":
        return TileSums(
            self.kept + other.kept,
            self.wanted + other.wanted,
            self.base + other.base,
            self.overflowed + other.overflowed,
            self.not_finite + other.not_finite,
            max(self.error, other.error),
        )

    @property
    def retained(self) -> float:
        """Share of the delta that survived rounding; 1.0 when there was none."""
        return self.kept / self.wanted if self.wanted else 1.0

    @property
    def relative(self) -> float:
        """‖Δ‖ / ‖W‖; 0.0 for a zero delta."""
        if not self.wanted:
            return 0.0
        return float(np.sqrt(self.wanted / self.base)) if self.base else float("inf")


def sum_up(base: NDArray[Any], delta: NDArray[Any], merged: NDArray[Any], found: NDArray[Any]) -> TileSums:
    """Return the sums of a tile; `merged` and `found` are overwritten.

    A number that overflowed makes the sums infinite or NaN, as does one of the base that was so before: only then is
    it looked for.

    Args:
        base: W.
        delta: Δ.
        merged: W + Δ before it was rounded.
        found: the values that were written.
    """
    w, d, m, f = (array.reshape(-1) for array in (base, delta, merged, found))
    largest = _largest(m)
    error = 0.0
    if found is not merged:
        difference = _largest(np.subtract(f, m, out=m))
        error = difference / largest if largest and math.isfinite(difference / largest) else 0.0
    np.subtract(f, w, out=f)
    sums = float(np.dot(f, d)), float(np.dot(d, d)), float(np.dot(w, w))
    if abs(sum(sums)) < _MOST_SQUARES:
        return TileSums(*sums, error=error)
    before = np.isfinite(w)
    overflowed = int(np.count_nonzero(before & ~np.isfinite(f)))
    return TileSums(*_sum_wide(w, d, f), overflowed, int(np.count_nonzero(~before)))


def count_broken(base: NDArray[Any], finite: NDArray[np.bool_]) -> TileSums:
    """Return how many numbers left the range of the output's form, and how many of the base were never in it.

    Args:
        base: W.
        finite: which numbers that were written are.
    """
    before = np.isfinite(base)
    return TileSums(overflowed=int(np.count_nonzero(before & ~finite)), not_finite=int(np.count_nonzero(~before)))


def is_in_range(merged: NDArray[Any], written: NDArray[Any]) -> bool:
    """Say whether all numbers are surely finite in the form of `written`; False may be said too often.

    Args:
        merged: W + Δ before it was rounded.
        written: the same in the output's form.
    """
    if written.dtype.itemsize > 1 and _are_below_two(written):
        return True
    if written.dtype.itemsize == _NARROW_BYTES:  # Read off the narrow form, which is half the memory.
        return is_all_finite(written)
    flat = merged.reshape(-1)
    if written.dtype.itemsize >= flat.dtype.itemsize:
        return math.isfinite(np.dot(flat, flat))
    import ml_dtypes

    return _largest(flat) <= float(ml_dtypes.finfo(written.dtype).max)  # type: ignore[no-untyped-call]


def _are_below_two(values: NDArray[Any]) -> bool:
    """Say whether no number has the exponent's highest bit, as nearly no weight does: one pass over the patterns."""
    bits = 8 * values.dtype.itemsize
    seen = int(np.bitwise_or.reduce(values.reshape(-1).view(f"u{values.dtype.itemsize}")))
    return not seen & 1 << bits - 2


def _largest(values: NDArray[Any]) -> float:
    """Return the largest absolute value; NaN where there is one."""
    return float(max(values.max(initial=0), -values.min(initial=0)))


def _sum_wide(w: NDArray[Any], d: NDArray[Any], change: NDArray[Any]) -> tuple[float, float, float]:
    """Return the sums in float64, without the places that are not finite or have squares that are not."""
    wide_d, wide_w, wide_change = d.astype(np.float64), w.astype(np.float64), change.astype(np.float64)
    good = np.logical_and.reduce([np.abs(each) <= _LARGEST for each in (wide_change, wide_w, wide_d)])
    wide_d[~good] = wide_w[~good] = wide_change[~good] = 0.0
    return float(wide_change @ wide_d), float(wide_d @ wide_d), float(wide_w @ wide_w)
