"""bitsandbytes' codes of 4 bits, NF4 and FP4: a table of sixteen values, times the largest number of the block.

Blocks are of the flattened weight; the first of two codes in a byte is in its upper half. With `double_quant`, the
largest numbers are codes themselves, of a table of 256 values, in blocks of their own, with an offset
(`bitsandbytes.functional.QuantState`).
"""

from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding
from loraformat.encodings._read_only import ReadOnlyCoder
from loraformat.strict_json import parse_json_object

Array = NDArray[Any]


class BlockTableCoder(ReadOnlyCoder):
    """A `Coder` that decodes.

    Args:
        coding: the weight's; `block` is one row of as many columns as a block has numbers.
        table: `(16,)` float32, the value of each code.
        scales: one float32 for each block of the flattened weight.
    """

    def __init__(self, coding: Coding, table: Array, scales: Array) -> None:
        super().__init__(coding)
        self._table = table
        self._scales = scales
        self._gap = np.float32(np.diff(np.sort(table)).max())

    def decode(self, codes: Array, rows: range, out: NDArray[np.float32]) -> None:
        """Write `table[code] * scale`."""
        packed = codes.view(np.uint8).reshape(len(out), -1)
        out[:, 0::2], out[:, 1::2] = self._table[packed >> 4], self._table[packed & 0xF]
        np.multiply(out, self._spread(rows), out=out)

    def steps(self, rows: range, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the largest distance that codes of the block have."""
        return self._spread(rows) * self._gap

    def _spread(self, rows: range) -> Array:
        columns, size = self.coding.matrix[1], self.coding.block[1]
        start, stop = rows.start * columns, rows.stop * columns
        first = start // size
        spread = np.repeat(self._scales[first : -(-stop // size)], size)
        return spread[start - first * size : stop - first * size].reshape(len(rows), columns)


@dataclass(frozen=True, slots=True)
class Bnb4:
    """bitsandbytes' codes of 4 bits."""

    name: str = "bnb4"
    bits: int = 4
    is_read_only: bool = True

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        held = coding.companions
        scales = held["scales"].read().reshape(-1)
        if "nested_scales" in held:
            state = cast(dict[str, Any], parse_json_object(held["state"].read_bytes().tobytes(), held["state"].name))
            outer = held["nested_scales"].read().reshape(-1).astype(np.float32)
            spread = np.repeat(outer, int(state["nested_blocksize"]))[: len(scales)]
            scales = held["nested_table"].read().reshape(-1).astype(np.float32)[scales] * spread
            scales = scales + np.float32(state["nested_offset"])
        return BlockTableCoder(coding, held["table"].read().reshape(-1).astype(np.float32), scales.astype(np.float32))


CODED: Final = Bnb4()
