"""Codes of 2 bits: the laws, and packed zero points."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from laws.coded_laws import CodedLaws, Example, held
from loraformat.dtypes import BY_NAME
from loraformat.encodings import Coding
from loraformat.encodings.affine2 import CODED


def pack(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Pack rows, the first of four codes in the lowest two bits."""
    rows = []
    for row in codes:
        own = [int(code) & 3 for code in row] + [0] * (-len(row) % 4)
        rows.append([own[i] | own[i + 1] << 2 | own[i + 2] << 4 | own[i + 3] << 6 for i in range(0, len(own), 4)])
    return np.array(rows, np.uint8)


class TestAffine2(CodedLaws):
    encoding = CODED
    forms = ("uint8", "int2")

    def store(self, codes: NDArray[Any], form: str) -> NDArray[Any]:
        return pack(codes)

    def bounds(self, form: str) -> tuple[int, int]:
        return (-2, 1) if form == "int2" else (0, 3)

    def store_zeros(self, zeros: NDArray[Any], form: str) -> NDArray[Any]:
        return pack(zeros)

    def make(self, form: str, block: tuple[int, int], with_zeros: bool) -> Example:
        """Zero points are the two codes with others on both sides."""
        least, most = self.bounds(form)
        made = super().make(form, block, with_zeros=False)
        if not with_zeros:
            return made
        zeros = np.random.default_rng(3).integers(least + 1, most, made.scales.shape)
        return made._replace(zeros=zeros, zero=0)


@pytest.mark.parametrize("blocks", [1, 3, 4, 5])
def test_zero_points_fill_whole_bytes_of_a_row(blocks: int) -> None:
    """Encoded afresh, what fills up a byte stays as it was."""
    rng = np.random.default_rng(blocks)
    zeros, codes = rng.integers(0, 4, (3, blocks)), rng.integers(0, 4, (3, 8 * blocks))
    zeros[0, 0] = 3 - zeros[-1, -1]
    stored = pack(zeros)
    stored[:, -1] |= np.uint8(0xFF << (blocks % 4 * 2) & 0xFF if blocks % 4 else 0)
    scales = rng.uniform(0.1, 0.2, (3, blocks)).astype(np.float32)
    companions = {"scales": held("s", scales), "zero_points": held("z", stored)}
    coder = CODED.bind(Coding("affine2", codes.shape, (1, 8), companions), BY_NAME["uint8"])
    out = np.empty(codes.shape, np.float32)
    coder.decode(pack(codes), range(3), out)
    wide = np.repeat(scales, 8, axis=1)
    np.testing.assert_array_equal(out, (codes - np.repeat(zeros, 8, axis=1)).astype(np.float32) * wide)
    fit = coder.start_afresh()
    fit.see(pack(codes), range(3), out, np.zeros_like(out))
    np.testing.assert_array_equal(fit.finish().tensors()["zero_points"], stored.reshape(-1))
