"""Codes of 2 bits, four in a byte, with scales and zero points.

What onnxruntime's MatMulNBits with 2 bits reads, and DequantizeLinear from int2 and uint2. They are decoded, and float
weights encoded; what was decoded, changed a little and encoded again has lost the change.
"""

from typing import Final

from loraformat.encodings._affine import Layout
from loraformat.encodings._affine_codes import AffineCodes

_LAYOUTS: Final = {
    "int2": Layout(-2, 1, narrow=(0, -1), bits=2, signed=True),
    "uint8": Layout(0, 3, narrow=(0, -1), bits=2),
    "uint2": Layout(0, 3, narrow=(0, -1), bits=2),
}

CODED: Final = AffineCodes("affine2", 2, _LAYOUTS)
