"""Codes of 16 bits: the laws."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws.coded_laws import CodedLaws, Example
from loraformat.encodings.affine16 import CODED


class TestAffine16(CodedLaws):
    encoding = CODED
    forms = ("uint16", "int16")

    def store(self, codes: NDArray[Any], form: str) -> NDArray[Any]:
        return codes.astype(form).view(np.uint8).reshape(len(codes), -1)

    def bounds(self, form: str) -> tuple[int, int]:
        limits = np.iinfo(form)
        return int(limits.min), int(limits.max)

    def make(self, form: str, block: tuple[int, int], with_zeros: bool) -> Example:
        """Values of the size of those of other forms: float32 holds so many codes of larger ones only roughly."""
        made = super().make(form, block, with_zeros)
        return made._replace(scales=made.scales * np.float32(1e-3))

    def store_zeros(self, zeros: NDArray[Any], form: str) -> NDArray[Any]:
        return zeros.astype(form)
