"""Codes of 8 bits, int8 or uint8, with scales and zero points.

What ONNX's DequantizeLinear, MatMulInteger and QLinear operators read (one scale for a tensor, for a channel or for a
block of one), and onnxruntime's MatMulNBits with 8 bits (blocks of a row).
"""

from dataclasses import dataclass
from typing import Final

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding
from loraformat.encodings._affine import Layout, bind_affine

_LAYOUTS: Final = {
    "int8": Layout(-128, 127, narrow=(-64, 64), signed=True),
    "uint8": Layout(0, 255, narrow=(0, 127)),
}


@dataclass(frozen=True, slots=True)
class Affine8:
    """Codes of 8 bits."""

    name: str = "affine8"
    bits: int = 8
    is_read_only: bool = False

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        return bind_affine(coding, _LAYOUTS[form.name])


CODED: Final = Affine8()
