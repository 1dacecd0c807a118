"""Codes of 16 bits, int16 or uint16, with scales and zero points: what ONNX's DequantizeLinear reads."""

from typing import Final

from loraformat.encodings._affine import Layout
from loraformat.encodings._affine_codes import AffineCodes

_LAYOUTS: Final = {
    "int16": Layout(-32768, 32767, narrow=(0, -1), bits=16, signed=True),
    "uint16": Layout(0, 65535, narrow=(0, -1), bits=16),
}

CODED: Final = AffineCodes("affine16", 16, _LAYOUTS)
