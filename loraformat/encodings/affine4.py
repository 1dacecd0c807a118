"""Codes of 4 bits, two in a byte, with scales and zero points.

What onnxruntime's MatMulNBits with 4 bits reads, and DequantizeLinear from int4 and uint4. They are decoded, and float
weights encoded. What was decoded, changed a little and encoded again has lost the change: nobody should offer that.
"""

from dataclasses import dataclass
from typing import Final

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding
from loraformat.encodings._affine import Layout, bind_affine

_LAYOUTS: Final = {
    "int4": Layout(-8, 7, narrow=(0, -1), bits=4, signed=True),
    "uint8": Layout(0, 15, narrow=(0, -1), bits=4),
    "uint4": Layout(0, 15, narrow=(0, -1), bits=4),
}


@dataclass(frozen=True, slots=True)
class Affine4:
    """Codes of 4 bits."""

    name: str = "affine4"
    bits: int = 4
    is_read_only: bool = False

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        return bind_affine(coding, _LAYOUTS[form.name])


CODED: Final = Affine4()
