"""4-bit floats (e2m1) with scales of blocks of a row: MXFP4 and NVFP4.

MXFP4 has a power of two for each 32 numbers, its exponent in a byte (e8m0). NVFP4 has an 8-bit float for each 16, and
one more number for the tensor, by which compressed-tensors divides (`global_divisor`) and ModelOpt multiplies
(`global_factor`). The first of two codes in a byte is in its lower half.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding
from loraformat.encodings._read_only import E2M1, ReadOnlyCoder, spread_groups, unpack

Array = NDArray[Any]
_BIAS: Final = 127
_NOT_A_NUMBER: Final = 255
_GAP: Final = np.float32(2)
"""Between the two largest numbers of the form."""


class Float4Coder(ReadOnlyCoder):
    """A `Coder` that decodes.

    Args:
        coding: the weight's.
        scales: `(rows, blocks)` float32.
    """

    def __init__(self, coding: Coding, scales: Array) -> None:
        super().__init__(coding)
        self._scales = scales

    def decode(self, codes: Array, rows: range, out: NDArray[np.float32]) -> None:
        """Write `float4 * scale`."""
        np.multiply(E2M1[unpack(codes, 4)], self._spread(rows), out=out)

    def steps(self, rows: range, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the largest distance that codes of the block have."""
        return np.abs(self._spread(rows)) * _GAP

    def _spread(self, rows: range) -> Array:
        return spread_groups(self._scales[rows.start : rows.stop], self.coding.block[1], self.coding.matrix[1])


@dataclass(frozen=True, slots=True)
class Float4Scaled:
    """4-bit floats with scales."""

    name: str = "float4_scaled"
    bits: int = 2
    is_read_only: bool = True

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        held = coding.companions
        stored = held["scales"].read().reshape(coding.matrix[0], -1)
        scales = (
            _read_powers(stored) if stored.dtype.itemsize == 1 and "float8_e4m3" not in stored.dtype.name else stored
        )
        scales = scales.astype(np.float32)
        if "global_divisor" in held:
            scales = scales / held["global_divisor"].read().reshape(-1)[:1].astype(np.float32)
        if "global_factor" in held:
            scales = scales * held["global_factor"].read().reshape(-1)[:1].astype(np.float32)
        return Float4Coder(coding, scales)


def _read_powers(stored: Array) -> Array:
    """Return the powers of two that bytes are the exponents of."""
    exponents = stored.view(np.uint8)
    powers = np.ldexp(np.float32(1), exponents.astype(np.int32) - _BIAS)
    return np.where(exponents == _NOT_A_NUMBER, np.float32(np.nan), powers)


CODED: Final = Float4Scaled()
