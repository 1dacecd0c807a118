"""Codes of 8 bits, int8 or uint8, with scales and zero points.

What ONNX's DequantizeLinear, MatMulInteger and QLinear operators read (one scale for a tensor, for a channel or for a
block of one), and onnxruntime's MatMulNBits with 8 bits (blocks of a row).
"""

from typing import Final

from loraformat.encodings._affine import Layout
from loraformat.encodings._affine_codes import AffineCodes

_LAYOUTS: Final = {
    "int8": Layout(-128, 127, narrow=(-64, 64), signed=True),
    "uint8": Layout(0, 255, narrow=(0, 127)),
}

CODED: Final = AffineCodes("affine8", 8, _LAYOUTS)
