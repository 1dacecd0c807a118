"""Number forms, by every name they have: safetensors, ONNX, numpy, ggml.

numpy and ml_dtypes are imported when a numpy type is asked for, so that naming a number form stays cheap.
The quantised forms of ggml are stored in blocks: `BlockDtype`.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Family = Literal["float", "int", "uint", "bool", "complex", "string"]


@dataclass(frozen=True, slots=True)
class Dtype:
    """One number form.

    Attributes:
        name: numpy's or ml_dtypes' name, e.g. `bfloat16`; the name used everywhere in this project.
        bits: bits of one element as stored.
        family: what kind of number it is.
        safetensors: its name in a safetensors header, or None.
        onnx: its number in `onnx.TensorProto.DataType`, or None.
    """

    name: str
    bits: int
    family: Family
    safetensors: str | None = None
    onnx: int | None = None

    def count_bytes(self, elements: int) -> int:
        """Return the bytes that `elements` elements take, sub-byte forms packed."""
        return (elements * self.bits + 7) // 8

    def numpy(self) -> "np.dtype[Any]":
        """Return the numpy dtype (little-endian); bfloat16 and float8 come from ml_dtypes."""
        return _numpy_dtype(self.name)


@dataclass(frozen=True, slots=True)
class BlockDtype(Dtype):
    """A quantised form whose elements are packed in blocks along the last axis; `bits` is 0, since none stands alone.

    Attributes:
        block_elements: elements of one block.
        block_bytes: bytes of one block: codes and scales together.
    """

    block_elements: int = 1
    block_bytes: int = 1

    def count_bytes(self, elements: int) -> int:
        """Return the bytes that `elements` elements, whole blocks, take."""
        return elements // self.block_elements * self.block_bytes


_ALL: Final = (
    Dtype("float64", 64, "float", "F64", 11),
    Dtype("float32", 32, "float", "F32", 1),
    Dtype("float16", 16, "float", "F16", 10),
    Dtype("bfloat16", 16, "float", "BF16", 16),
    Dtype("float8_e4m3fn", 8, "float", "F8_E4M3", 17),
    Dtype("float8_e4m3fnuz", 8, "float", "F8_E4M3FNUZ", 18),
    Dtype("float8_e5m2", 8, "float", "F8_E5M2", 19),
    Dtype("float8_e5m2fnuz", 8, "float", "F8_E5M2FNUZ", 20),
    Dtype("float8_e8m0fnu", 8, "float", "F8_E8M0", 24),
    Dtype("float4_e2m1fn", 4, "float", "F4", 23),
    Dtype("float6_e2m3fn", 6, "float", "F6_E2M3", 27),
    Dtype("float6_e3m2fn", 6, "float", "F6_E3M2", 28),
    Dtype("int64", 64, "int", "I64", 7),
    Dtype("int32", 32, "int", "I32", 6),
    Dtype("int16", 16, "int", "I16", 5),
    Dtype("int8", 8, "int", "I8", 3),
    Dtype("int4", 4, "int", None, 22),
    Dtype("int2", 2, "int", None, 26),
    Dtype("uint64", 64, "uint", "U64", 13),
    Dtype("uint32", 32, "uint", "U32", 12),
    Dtype("uint16", 16, "uint", "U16", 4),
    Dtype("uint8", 8, "uint", "U8", 2),
    Dtype("uint4", 4, "uint", None, 21),
    Dtype("uint2", 2, "uint", None, 25),
    Dtype("bool", 8, "bool", "BOOL", 9),
    Dtype("complex64", 64, "complex", "C64", 14),
    Dtype("complex128", 128, "complex", None, 15),
    Dtype("string", 0, "string", None, 8),
)

_BLOCKS: Final = {
    number: BlockDtype(name, 0, "float", block_elements=elements, block_bytes=size)
    for number, name, elements, size in (
        (2, "q4_0", 32, 18),
        (3, "q4_1", 32, 20),
        (6, "q5_0", 32, 22),
        (7, "q5_1", 32, 24),
        (8, "q8_0", 32, 34),
        (9, "q8_1", 32, 40),
        (10, "q2_k", 256, 84),
        (11, "q3_k", 256, 110),
        (12, "q4_k", 256, 144),
        (13, "q5_k", 256, 176),
        (14, "q6_k", 256, 210),
        (15, "q8_k", 256, 292),
        (16, "iq2_xxs", 256, 66),
        (17, "iq2_xs", 256, 74),
        (18, "iq3_xxs", 256, 98),
        (19, "iq1_s", 256, 50),
        (20, "iq4_nl", 32, 18),
        (21, "iq3_s", 256, 110),
        (22, "iq2_s", 256, 82),
        (23, "iq4_xs", 256, 136),
        (29, "iq1_m", 256, 56),
        (34, "tq1_0", 256, 54),
        (35, "tq2_0", 256, 66),
        (39, "mxfp4", 32, 17),
        (40, "nvfp4", 64, 36),
        (41, "q1_0", 128, 18),
    )
}
"""Number in `enum ggml_type`, name, elements and bytes of a block (gguf 0.19, GGML_QUANT_SIZES)."""

BY_NAME: Final = {dtype.name: dtype for dtype in _ALL}
BY_SAFETENSORS: Final = {dtype.safetensors: dtype for dtype in _ALL if dtype.safetensors}
BY_ONNX: Final = {dtype.onnx: dtype for dtype in _ALL if dtype.onnx is not None}
BY_GGML: Final[dict[int, Dtype]] = _BLOCKS | {
    number: BY_NAME[name]
    for number, name in (
        (0, "float32"),
        (1, "float16"),
        (24, "int8"),
        (25, "int16"),
        (26, "int32"),
        (27, "int64"),
        (28, "float64"),
        (30, "bfloat16"),
    )
}


@cache
def _numpy_dtype(name: str) -> "np.dtype[Any]":
    import numpy as np

    if name in np.sctypeDict:
        return np.dtype(name).newbyteorder("<")
    import ml_dtypes

    form: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return form


_INFINITIES: Final = {"bfloat16": 0x7F80, "float16": 0x7C00}
"""Patterns of infinity; those of NaN are larger, those of all finite numbers smaller."""
_SIGN: Final = 0x8000


def is_all_finite(values: "NDArray[Any]") -> bool:
    """Say whether numbers of 16 bits hold neither infinity nor NaN, by their patterns: two fast passes."""
    infinity = _INFINITIES[values.dtype.name]
    return not values.size or bool(values.view("i2").max() < infinity and values.view("u2").max() < infinity | _SIGN)
