"""One step of an inverse wavelet transform of a few coefficients, formed some rows at a time.

The filters are computed, not listed: √2 times the polynomial ((1 + z)/2)^n·Q(z), where Q has, of every pair of zeros
z, 1/z that Daubechies' polynomial gives, one. `db` takes those inside the unit circle, `sym` those whose phase is
nearest to linear (Daubechies, Ten Lectures on Wavelets, 1992, sections 6.4 and 8.1.1).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.kinds._deltas import PartOf, cut

_OUTSIDE: Final[Mapping[int, int]] = {2: 0, 3: 0, 4: 2, 5: 1, 6: 5, 7: 1, 8: 10, 9: 6, 10: 21}
"""Of symlets: which zeros are taken outside the unit circle, bits in the order of their y."""

WAVELETS: Final = (*(f"db{order}" for order in range(1, 11)), *(f"sym{order}" for order in _OUTSIDE))


@lru_cache(maxsize=8)
def make_filters(name: str) -> NDArray[np.float64]:
    """Return the two filters of reconstruction `(2, length)`: what a low and what a high coefficient becomes."""
    order = int(name.removeprefix("db").removeprefix("sym"))
    outside = _OUTSIDE[order] if name.startswith("sym") else 0
    zeros: list[complex] = []
    for place, zero in enumerate(_find_zeros(order)):
        taken = 1 / zero if outside >> place & 1 else zero
        zeros += [taken] if abs(taken.imag) < 1e-9 else [taken, taken.conjugate()]
    low = np.real(np.poly(zeros)) if zeros else np.ones(1)
    for _ in range(order):
        low = np.convolve(low, [1.0, 1.0])
    low *= math.sqrt(2) / low.sum()
    high = low[::-1] * (-1.0) ** np.arange(2 * order)
    return np.stack([low, high])


def _find_zeros(order: int) -> list[complex]:
    """Return the zeros inside the unit circle, one of each conjugate pair, by the y = (2 - z - 1/z) / 4 they are of."""
    if order == 1:
        return []
    roots = np.roots([math.comb(order - 1 + power, power) for power in range(order - 1, -1, -1)])
    upper = sorted((y for y in roots if y.imag > -1e-12), key=lambda y: float(y.real))
    pairs = (np.roots([1, 4 * y - 2, 1]) for y in upper)
    return [complex(pair[np.argmin(np.abs(pair))]) for pair in pairs]


@dataclass(frozen=True, slots=True)
class _Axis:
    """Where coefficients stand along one axis, and what each becomes along it.

    Attributes:
        size: rows, or columns, of the change.
        places: (n,) place of each coefficient in its band.
        bands: (n,) 0 for the low filter, 1 for the high one.
    """

    size: int
    places: NDArray[np.intp]
    bands: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class WaveletDelta:
    """The sum of the waves of some coefficients.

    Attributes:
        filters: (2, length).
        rows: the coefficients along rows.
        columns: along columns.
        values: (n,) the coefficients, the scale folded in.
    """

    filters: NDArray[np.float64]
    rows: _Axis
    columns: _Axis
    values: NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.rows.size, self.columns.size

    def transposed(self) -> "WaveletDelta":
        """Return the transposed change."""
        return WaveletDelta(self.filters, self.columns, self.rows, self.values)

    def part(self, rows: slice, columns: slice) -> PartOf:
        """Return some of its rows and columns."""
        return cut(self, rows, columns)

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`: waves along rows, then along columns."""
        length = self.filters.shape[1]
        half = _pad(self.columns.size, length) // 2
        waves = np.zeros((2, stop - start, half))
        first = 2 * self.rows.places - (length - 2) - start
        near = np.flatnonzero((first < stop - start) & (first + length > 0))
        for step in range(length):
            row = first[near] + step
            hit = near[(row >= 0) & (row < stop - start)]
            where = (self.columns.bands[hit], first[hit] + step, self.columns.places[hit])
            np.add.at(waves, where, self.values[hit] * self.filters[self.rows.bands[hit], step])
        whole = np.zeros((stop - start, 2 * half + length))
        for step in range(length):
            whole[:, step : step + 2 * half : 2] += waves[0] * self.filters[0, step] + waves[1] * self.filters[1, step]
        np.copyto(out, whole[:, length - 2 : length - 2 + self.columns.size], casting="same_kind")


def place_waves(
    shape: tuple[int, int],
    places: tuple[NDArray[np.intp], NDArray[np.intp]],
    values: NDArray[np.float64],
    filters: NDArray[np.float64],
) -> WaveletDelta:
    """Return the change of coefficients at places of a matrix, which lies in the middle of a slightly larger one.

    That one has four quarters. As PEFT joins them, right of the middle rows get the high filter, below it columns do.
    """
    length = filters.shape[1]
    sizes = [_pad(size, length) for size in shape]
    moved = [place + (padded - size) // 2 for place, padded, size in zip(places, sizes, shape, strict=True)]
    halves = [np.divmod(place, padded // 2) for place, padded in zip(moved, sizes, strict=True)]
    (below, row), (right, column) = halves
    return WaveletDelta(filters, _Axis(shape[0], row, right), _Axis(shape[1], column, below), values)


def _pad(size: int, length: int) -> int:
    """Return how many coefficients there are for so many numbers: an even number."""
    return (size + length - 1) // 2 * 2
