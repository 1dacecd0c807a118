"""Weights of a base as float32 matrices, read tile by tile; and the difference of two."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.bases import Site
from loraformat.encodings import ENCODINGS, Encoding, choose_encoding
from loraformat.errors import refuse
from loraformat.limits import TILE_BYTES
from loraformat.spans import Span, StoredTensor

_FLOAT32_BYTES: Final = 4
_EXPONENT_BITS: Final = 0x7F800000
_BIAS: Final = 127
_FORMS: Final[Mapping[str, tuple[int, int]]] = {
    "float64": (52, -1022),
    "float32": (23, -126),
    "float16": (10, -14),
    "bfloat16": (7, -126),
    "float8_e4m3fn": (3, -6),
    "float8_e4m3fnuz": (3, -7),
    "float8_e5m2": (2, -14),
    "float8_e5m2fnuz": (2, -15),
}
"""Binary digits behind the point, and the exponent of the smallest normal number."""


_LARGEST: Final = float(1 << 40)
"""Sums of the squares of a weight's numbers are in float32: so much they hold, and no weight has."""


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """W′ − W of one parameter.

    Attributes:
        matrix: (rows, columns) float32, oriented as the canonical `(out, in * kernel)`.
        rounding: √Σ(ulp/2)² over W′: the Frobenius norm that rounding W′ once to its stored form can have at most.
    """

    matrix: NDArray[np.float32]
    rounding: float

    @property
    def norm(self) -> float:
        """‖W′ − W‖ in the Frobenius norm."""
        return float(np.linalg.norm(self.matrix))


def hold_the_same(one: StoredTensor, other: StoredTensor) -> bool:
    """Say whether two stored tensors have the same form, shape and bits."""
    if one.is_contiguous and other.is_contiguous:
        return one.equals(other)
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and one.read().tobytes() == other.read().tobytes()


def find_encoding(tensor: StoredTensor) -> Encoding | None:
    """Return the encoding that a stored tensor's numbers are in, or None."""
    name = choose_encoding(tensor.dtype)
    return ENCODINGS.find(name) if name is not None else None


def matrix_shape(tensor: StoredTensor) -> tuple[int, int]:
    """Return the first dimension and the product of the rest."""
    return tensor.shape[0], math.prod(tensor.shape[1:])


def read_tiles(tensor: StoredTensor) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield the stored matrix in order, some rows at a time in float32, each with its place.

    Raises:
        FindingError: LF723 a number that is not finite, or larger than any of a weight.
    """
    encoding = find_encoding(tensor)
    if encoding is None:
        raise refuse("LF403", tensor.name, f"numbers stored as {tensor.dtype.name}", "a floating-point form")
    rows, columns = matrix_shape(tensor)
    row_bytes = tensor.dtype.count_bytes(columns)
    step = max(1, TILE_BYTES // (columns * _FLOAT32_BYTES))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        span = Span(tensor.span.path, tensor.span.offset + start * row_bytes, (stop - start) * row_bytes)
        stored = StoredTensor(tensor.name, tensor.dtype, (stop - start, columns), span, tensor.file).read()
        tile = np.empty(stored.shape, encoding.work_dtype(tensor.dtype))
        encoding.decode(stored, tile)
        if not max(tile.max(initial=0.0), -tile.min(initial=0.0)) <= _LARGEST:  # NaN is not either.
            found = "numbers beyond 2^40" if np.isfinite(tile).all() else "NaN or infinity"
            raise refuse("LF723", f"{tensor.file.path}, tensor {tensor.name!r}", found, "numbers of a model's weight")
        yield slice(start, stop), tile


def require_plain(site: Site) -> None:
    """Raise LF403 for a quantised weight: its codes are not its numbers."""
    if site.weight is not None and site.weight.coding is not None:
        raise refuse("LF403", site.weight.name, f"codes ({site.weight.coding.encoding})", "a floating-point form")


def read_weight(site: Site, *, transposed: bool) -> NDArray[np.float32]:
    """Return the canonical matrix `(out, in * kernel)` of a site's weight, whole, as float32; LF723 if not finite."""
    assert site.weight is not None, "chosen so"
    require_plain(site)
    matrix = np.empty(matrix_shape(site.weight.tensor), np.float32)
    for rows, tile in read_tiles(site.weight.tensor):
        matrix[rows] = tile
    if site.divisor != 1:
        matrix *= np.float32(site.divisor)
    return matrix.T if transposed else matrix


def roundoff(dtype: str) -> float:
    """Return half the distance from 1 to the next number of a form."""
    return float(2.0 ** -(_FORMS[dtype][0] + 1))


def subtract(tuned: Site, base: Site, *, transposed: tuple[bool, bool]) -> Difference:
    """Return the difference of two sites' weights, one dense matrix; each weight is read tile by tile.

    Args:
        tuned: where W′ is.
        base: where W is, of the same canonical shape.
        transposed: for each, whether the stored matrix is the transpose of the canonical one.

    Raises:
        FindingError: LF723 a number that is not finite.
    """
    assert tuned.weight is not None, "chosen so"
    assert base.weight is not None, "chosen so"
    require_plain(tuned)
    require_plain(base)
    matrix = np.empty(matrix_shape(tuned.weight.tensor), np.float32)
    rounded = 0.0
    for rows, tile in read_tiles(tuned.weight.tensor):
        np.multiply(tile, tuned.divisor, out=matrix[rows], casting="same_kind")
        rounded += _sum_half_ulps(tile, tuned.weight.tensor)
    seen = matrix.T if transposed[0] != transposed[1] else matrix
    for rows, tile in read_tiles(base.weight.tensor):
        seen[rows] -= (tile * base.divisor).astype(np.float32, copy=False)
    return Difference(matrix.T if transposed[0] else matrix, abs(tuned.divisor) * math.sqrt(rounded))


def _sum_half_ulps(tile: NDArray[Any], tensor: StoredTensor) -> float:
    """Return Σ(ulp/2)² of numbers in the stored form: ulp(w) = 2^(⌊log₂|w|⌋ − digits), not below the smallest."""
    digits, least = _FORMS[tensor.dtype.name]
    bits = tile.astype(np.float32, copy=False).view(np.int32)
    counts = np.bincount(((bits & _EXPONENT_BITS) >> 23).reshape(-1), minlength=256)
    exponents = np.maximum(np.arange(256) - _BIAS, least) - digits
    return float(counts @ np.exp2(2.0 * (exponents - 1)))
