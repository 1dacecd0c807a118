"""Codes of 16 bits, int16 or uint16, with scales and zero points: what ONNX's DequantizeLinear reads."""

from dataclasses import dataclass
from typing import Final

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding
from loraformat.encodings._affine import Layout, bind_affine

_LAYOUTS: Final = {
    "int16": Layout(-32768, 32767, narrow=(0, -1), bits=16, signed=True),
    "uint16": Layout(0, 65535, narrow=(0, -1), bits=16),
}


@dataclass(frozen=True, slots=True)
class Affine16:
    """Codes of 16 bits."""

    name: str = "affine16"
    bits: int = 16
    is_read_only: bool = False

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        return bind_affine(coding, _LAYOUTS[form.name])


CODED: Final = Affine16()
