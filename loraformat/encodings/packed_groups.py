"""Packed whole numbers with scales of groups, beside which zero points are packed by column, or groups in any order.

compressed-tensors' `pack-quantized` (codes and zero points are both stored plus half their range), and MLX's affine
codes, which have the value of code 0 (`biases`) in the place of a zero point. Codes of 2, 4 or 8 bits.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding
from loraformat.encodings._read_only import ReadOnlyCoder, unpack

Array = NDArray[Any]


class GroupCoder(ReadOnlyCoder):
    """A `Coder` that decodes.

    Args:
        coding: the weight's.
        bits: of one code.
        scales: `(rows, groups)` float32.
        zeros: the same, or one number; None where there are values of code 0.
        firsts: `(rows, groups)` float32, the value of code 0.
        groups: which group each column is of.
    """

    def __init__(
        self, coding: Coding, bits: int, scales: Array, zeros: Array | None, firsts: Array | None, groups: Array
    ) -> None:
        super().__init__(coding)
        self._bits, self._scales, self._zeros, self._firsts = bits, scales, zeros, firsts
        self._groups = groups

    def decode(self, codes: Array, rows: range, out: NDArray[np.float32]) -> None:
        """Write `(code - zero point) * scale`, or `code * scale + first`."""
        out[...] = unpack(codes, self._bits)[:, : out.shape[1]]
        if self._zeros is not None:
            zeros = self._zeros if self._zeros.size == 1 else self._zeros[rows.start : rows.stop][:, self._groups]
            np.subtract(out, zeros, out=out)
        np.multiply(out, self._scales[rows.start : rows.stop][:, self._groups], out=out)
        if self._firsts is not None:
            np.add(out, self._firsts[rows.start : rows.stop][:, self._groups], out=out)

    def steps(self, rows: range, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scales without their signs."""
        return np.abs(self._scales[rows.start : rows.stop][:, self._groups])


@dataclass(frozen=True, slots=True)
class PackedGroups:
    """Packed whole numbers with scales of groups."""

    name: str = "packed_groups"
    bits: int = 4
    is_read_only: bool = True

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        held, (rows, columns) = coding.companions, coding.matrix
        scales = held["scales"].read().astype(np.float32).reshape(rows, -1)
        groups = np.arange(columns) // coding.block[1]
        if "order" in held:
            groups = np.clip(held["order"].read().reshape(-1), 0, scales.shape[1] - 1)
        if "firsts" in held:
            firsts = held["firsts"].read().astype(np.float32).reshape(rows, -1)
            return GroupCoder(coding, form.bits, scales, None, firsts, groups)
        zeros: Array = np.array([coding.zero], np.float32)
        if "zero_points" in held:
            words = held["zero_points"].read_bytes().view(np.uint32).reshape(-1, scales.shape[1])
            columnwise = unpack(np.ascontiguousarray(words.T), form.bits)
            zeros = columnwise.T[:rows].astype(np.float32)
        return GroupCoder(coding, form.bits, scales, zeros, None, groups)


CODED: Final = PackedGroups()
