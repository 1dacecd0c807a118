"""Codes of 2 bits, four in a byte, with scales and zero points.

What onnxruntime's MatMulNBits with 2 bits reads, and DequantizeLinear from int2 and uint2. They are decoded, and float
weights encoded; what was decoded, changed a little and encoded again has lost the change.
"""

from dataclasses import dataclass
from typing import Final

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding
from loraformat.encodings._affine import Layout, bind_affine

_LAYOUTS: Final = {
    "int2": Layout(-2, 1, narrow=(0, -1), bits=2, signed=True),
    "uint8": Layout(0, 3, narrow=(0, -1), bits=2),
    "uint2": Layout(0, 3, narrow=(0, -1), bits=2),
}


@dataclass(frozen=True, slots=True)
class Affine2:
    """Codes of 2 bits."""

    name: str = "affine2"
    bits: int = 2
    is_read_only: bool = False

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        return bind_affine(coding, _LAYOUTS[form.name])


CODED: Final = Affine2()
