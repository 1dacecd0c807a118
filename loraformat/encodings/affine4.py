"""Codes of 4 bits, two in a byte, with scales and zero points.

What onnxruntime's MatMulNBits with 4 bits reads, and DequantizeLinear from int4 and uint4. They are decoded, and float
weights encoded. What was decoded, changed a little and encoded again has lost the change: nobody should offer that.
"""

from typing import Final

from loraformat.encodings._affine import Layout
from loraformat.encodings._affine_codes import AffineCodes

_LAYOUTS: Final = {
    "int4": Layout(-8, 7, narrow=(0, -1), bits=4, signed=True),
    "uint8": Layout(0, 15, narrow=(0, -1), bits=4),
    "uint4": Layout(0, 15, narrow=(0, -1), bits=4),
}

CODED: Final = AffineCodes("affine4", 4, _LAYOUTS)
