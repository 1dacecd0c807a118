"""GPTQ's codes of 2, 4 or 8 bits: `(code - zero point) * scale`, stored transposed, `(in, out)`.

`qweight` has in each int32 the codes of neighbouring inputs, `qzeros` in each the zero points of neighbouring outputs
(less one, in files of the first version: `Coding.zero`, where the last code stands for 0), `g_idx` the group of each
input.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding
from loraformat.encodings._read_only import ReadOnlyCoder, unpack

Array = NDArray[Any]
_WORD_BITS: Final = 32


class GptqCoder(ReadOnlyCoder):
    """A `Coder` that decodes.

    Args:
        coding: the weight's; rows are inputs.
        bits: of one code.
        scales: `(groups, out)` float32.
        zeros: the same.
        groups: which group each row is of.
    """

    def __init__(self, coding: Coding, bits: int, scales: Array, zeros: Array, groups: Array) -> None:
        super().__init__(coding)
        self._bits, self._scales, self._zeros, self._groups = bits, scales, zeros, groups

    def decode(self, codes: Array, rows: range, out: NDArray[np.float32]) -> None:
        """Write `(code - zero point) * scale`, of which only the product is rounded."""
        per = _WORD_BITS // self._bits
        words = np.ascontiguousarray(codes).reshape(-1).view(np.uint32).reshape(-1, out.shape[1])
        for place in range(per):
            out[place::per] = (words >> np.uint32(self._bits * place)) & np.uint32((1 << self._bits) - 1)
        groups = self._groups[rows.start : rows.stop]
        np.subtract(out, self._zeros[groups], out=out)
        np.multiply(out, self._scales[groups], out=out)

    def steps(self, rows: range, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scales without their signs."""
        return np.abs(self._scales[self._groups[rows.start : rows.stop]])


@dataclass(frozen=True, slots=True)
class Gptq:
    """GPTQ's codes."""

    name: str = "gptq"
    bits: int = 4
    is_read_only: bool = True

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        held, (rows, columns) = coding.companions, coding.matrix
        scales = held["scales"].read().astype(np.float32).reshape(-1, columns)
        stored = held["zero_points"].read_bytes().reshape(len(scales), -1)
        zeros = ((unpack(stored, form.bits) + np.uint8(coding.zero)) & ((1 << form.bits) - 1)).astype(np.float32)
        groups = np.arange(rows) // coding.block[0]
        if "order" in held:
            groups = np.clip(held["order"].read().reshape(-1), 0, len(scales) - 1)
        return GptqCoder(coding, form.bits, scales, zeros, groups)


CODED: Final = Gptq()
