"""AWQ's codes of 4 bits, stored transposed, `(in, out)`: in each int32 those of eight outputs, in an order of its own.

The version `gemm` of AutoAWQ, which transformers, vLLM and others read.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding
from loraformat.encodings._read_only import ReadOnlyCoder, unpack

Array = NDArray[Any]
_ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which place of its word the code of each of eight neighbouring outputs is."""


class AwqCoder(ReadOnlyCoder):
    """A `Coder` that decodes.

    Args:
        coding: the weight's; rows are inputs.
        scales: `(groups, out)` float32.
        zeros: the same.
    """

    def __init__(self, coding: Coding, scales: Array, zeros: Array) -> None:
        super().__init__(coding)
        self._scales, self._zeros = scales, zeros

    def decode(self, codes: Array, rows: range, out: NDArray[np.float32]) -> None:
        """Write `(code - zero point) * scale`, of which only the product is rounded."""
        groups = np.arange(rows.start, rows.stop) // self.coding.block[0]
        np.subtract(_unpack(codes), self._zeros[groups], out=out)
        np.multiply(out, self._scales[groups], out=out)

    def steps(self, rows: range, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scales without their signs."""
        return np.abs(self._scales[np.arange(rows.start, rows.stop) // self.coding.block[0]])


def _unpack(stored: Array) -> Array:
    """Return codes of rows of whole words."""
    codes = unpack(stored, 4)
    return codes.reshape(len(codes), -1, len(_ORDER))[:, :, list(_ORDER)].reshape(codes.shape)


@dataclass(frozen=True, slots=True)
class Awq:
    """AWQ's codes of 4 bits."""

    name: str = "awq"
    bits: int = 4
    is_read_only: bool = True

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        held, columns = coding.companions, coding.matrix[1]
        scales = held["scales"].read().astype(np.float32).reshape(-1, columns)
        zeros = _unpack(held["zero_points"].read_bytes().reshape(len(scales), -1)).astype(np.float32)
        return AwqCoder(coding, scales, zeros)


CODED: Final = Awq()
