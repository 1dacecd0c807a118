"""Recipes of weights whose codes are floats of 8 or 4 bits, or whole numbers of 8 bits, with a scale for each part."""

import math
from dataclasses import replace
from typing import Final

from loraformat.bases._coded_state import CodedTensor, Outcome, Parts, Recipe, describe, reform
from loraformat.encodings import Coding

_ROLES: Final = {
    ".weight_scale": "scales",
    ".weight_scale_inv": "scales",
    ".scale_weight": "scales",
    "_scales": "scales",
    ".weight_zero_point": "zero_points",
    "._weight_scale": "scales",
    "._weight_zero_point": "zero_points",
    ".weight._scale": "scales",
    ".weight_global_scale": "global_divisor",
    ".weight_scale_2": "global_factor",
}
_EIGHT_BITS: Final = frozenset({"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"})
_SCALES: Final = frozenset({"float32", "bfloat16", "float16"})
_INPUTS: Final = (
    *(".input_scale", ".input_zero_point", ".input_global_scale", ".activation_scale", ".activation_scale_inv"),
    *(".scale_input", ".input_scale_ub", ".weight_shape"),
)
"""What goes with a weight and is of activations, or told by shapes as well."""
_BESIDE_SCALES: Final = (".weight_zero_point", ".weight_scale_2", *_INPUTS)
_MX_BLOCK: Final = 32
_NV_BLOCK: Final = 16
_BNB_STEPS: Final = 127


def _find_block(matrix: tuple[int, int], scales: tuple[int, ...], stated: object = None) -> tuple[int, int] | None:
    """Return rows and columns that share a scale: of the whole, of a row, or a block as stated or as it divides."""
    count = math.prod(scales)
    if count == 1:
        return matrix
    if scales in ((matrix[0],), (matrix[0], 1)):
        return 1, matrix[1]
    if len(scales) != 2:
        return None
    if isinstance(stated, list | tuple) and len(stated) == 2 and all(isinstance(n, int) and n > 0 for n in stated):
        block = (int(stated[0]), int(stated[1]))
    else:
        block = (-(-matrix[0] // scales[0]), -(-matrix[1] // scales[1]))
        if any(size % part for size, part in zip(matrix, scales, strict=True)):
            block = (128, 128)
    wanted = tuple(-(-size // part) for size, part in zip(matrix, block, strict=True))
    return block if wanted == scales else None


def _read_scaled(parts: Parts) -> Outcome | None:
    """Read 8-bit floats or int8 of a matrix, with scales of the whole, of rows or of blocks."""
    codes, companions = parts.codes, parts.companions(_ROLES)
    scales = companions["scales"]
    if codes.dtype.name == "uint8":
        return _read_float4(parts)
    encoding = "affine8" if codes.dtype.name == "int8" else "float8_scaled"
    if codes.dtype.name not in _EIGHT_BITS and encoding != "affine8":
        return None
    if len(codes.shape) != 2 or scales.dtype.name not in _SCALES or not codes.is_contiguous or not codes.elements:
        return describe({"weight": codes, **parts.beside})
    matrix = (codes.shape[0], codes.shape[1])
    block = _find_block(matrix, scales.shape, parts.settings.get("weight_block_size"))
    zeros = companions.get("zero_points")
    sound = zeros is None or (encoding == "affine8" and (zeros.dtype.name, zeros.shape) == ("int8", scales.shape))
    if block is None or not sound:
        return describe({"weight": codes, **parts.beside})
    return CodedTensor(f"{parts.stem}.weight", codes, Coding(encoding, matrix, block, companions))


def _read_torchao(parts: Parts) -> Outcome | None:
    """Read torchao's int8 and 8-bit floats; whole numbers in groups are of fewer bits, each in a byte of its own."""
    scales = parts.companions(_ROLES)["scales"]
    if parts.codes.dtype.name == "int8" and scales.shape not in ((), (1,), (1, 1), (parts.codes.shape[0], 1)):
        return f"codes of few bits that lie in bytes: {describe({'qdata': parts.codes, **parts.beside})}"
    return _read_scaled(parts)


def _read_bnb8(parts: Parts) -> Outcome | None:
    """Read bitsandbytes' int8, beside which is the largest number of each row: 127 steps."""
    codes, largest = parts.codes, parts.beside[".SCB"]
    if codes.dtype.name != "int8" or len(codes.shape) != 2 or not codes.elements or not codes.is_contiguous:
        return describe({"weight": codes, **parts.beside})
    if largest.elements != codes.shape[0] or largest.dtype.name not in _SCALES:
        return describe({"weight": codes, **parts.beside})
    matrix = (codes.shape[0], codes.shape[1])
    companions = parts.companions({".SCB": "scales"})
    coding = Coding("affine8", matrix, (1, matrix[1]), companions, unit=1 / _BNB_STEPS)
    return CodedTensor(f"{parts.stem}.weight", codes, coding)


def _read_float4(parts: Parts) -> Outcome | None:
    """Read two 4-bit floats in a byte, with scales of blocks of 16 (8-bit floats) or 32 (exponents)."""
    codes, companions = parts.codes, parts.companions(_ROLES)
    scales = companions["scales"]
    block = _MX_BLOCK if scales.dtype.name in ("uint8", "float8_e8m0fnu") else _NV_BLOCK
    known = block == _MX_BLOCK or scales.dtype.name == "float8_e4m3fn"
    inner = [name for name in ("global_divisor", "global_factor") if name in companions]
    if len(codes.shape) != 2 or codes.dtype.name != "uint8" or not known or bool(inner) is (block == _MX_BLOCK):
        return describe({"weight": codes, **parts.beside})
    matrix = (codes.shape[0], codes.shape[1] * 2)
    held = reform(codes, matrix, 4)
    if held is None or scales.shape != (matrix[0], matrix[1] // block) or matrix[1] % block:
        return describe({"weight": codes, **parts.beside})
    if any(companions[name].elements != 1 or companions[name].dtype.name != "float32" for name in inner):
        return describe({"weight": codes, **parts.beside})
    return CodedTensor(f"{parts.stem}.weight", held, Coding("float4_scaled", matrix, (1, block), companions))


def _read_experts(parts: Parts) -> Outcome | None:
    """Read the packed experts of gpt-oss: MXFP4 of the transpose of what the model has in floats, expert by expert."""
    codes, scales = parts.codes, parts.beside["_scales"]
    if codes.dtype.name != "uint8" or len(codes.shape) != 4 or codes.shape[3] * 2 != _MX_BLOCK:
        return None
    experts, rows, blocks, _ = codes.shape
    held = reform(codes, (experts, rows, blocks * _MX_BLOCK), 4)
    if held is None or scales.dtype.name != "uint8" or scales.shape != codes.shape[:3]:
        return describe({"blocks": codes, **parts.beside})
    coding = Coding("float4_scaled", (experts * rows, blocks * _MX_BLOCK), (1, _MX_BLOCK), parts.companions(_ROLES))
    return CodedTensor(parts.stem, replace(held, name=parts.stem), coding, turned=True)


RECIPES: Final = (
    Recipe("packed MXFP4", "_blocks", ("_scales",), (), _read_experts),
    Recipe("bitsandbytes int8", ".weight", (".SCB",), (".weight_format",), _read_bnb8),
    Recipe("8-bit floats", ".weight", (".weight_scale_inv",), _INPUTS, _read_scaled),
    Recipe("8-bit floats", ".weight", (".scale_weight",), _INPUTS, _read_scaled),
    Recipe("torchao", "._weight_qdata", ("._weight_scale",), ("._weight_zero_point",), _read_torchao),
    Recipe("Quanto", ".weight._data", (".weight._scale",), (".input_scale", ".output_scale"), _read_scaled),
    Recipe("scaled codes", ".weight", (".weight_scale",), _BESIDE_SCALES, _read_scaled),
)
PACKED_FLOATS: Final = _read_float4
"""Read what compressed-tensors packs, where its scales say that these are floats."""
SCALE_ROLES: Final = _ROLES
INPUTS: Final = _INPUTS
