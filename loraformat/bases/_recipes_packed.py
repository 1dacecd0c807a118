"""Recipes of weights whose codes are packed, several in a byte or word."""

from collections.abc import Mapping
from typing import Any, Final

from loraformat.bases._coded_state import CodedTensor, Outcome, Parts, Recipe, count_groups, describe, reform
from loraformat.bases._recipes_floats import INPUTS, PACKED_FLOATS, SCALE_ROLES
from loraformat.encodings import Coding
from loraformat.errors import LoraformatError
from loraformat.spans import StoredTensor
from loraformat.strict_json import parse_json_object

_BITS: Final = (2, 4, 8)
_WORD_BITS: Final = 32
_WORDS: Final = frozenset({"int32", "uint32"})
_SCALES: Final = frozenset({"float32", "bfloat16", "float16"})
_TABLE: Final = 16
_NESTED_TABLE: Final = 256
_MAX_STATE_BYTES: Final = 1 << 16
_BNB_ROLES: Final = {
    ".weight.absmax": "scales",
    ".weight.quant_map": "table",
    ".weight.nested_absmax": "nested_scales",
    ".weight.nested_quant_map": "nested_table",
    ".weight.quant_state.bitsandbytes__nf4": "state",
    ".weight.quant_state.bitsandbytes__fp4": "state",
}


def _odd(parts: Parts) -> str:
    return describe({"codes": parts.codes, **parts.beside})


def _find_bits(codes: StoredTensor, packed: int, settings: Mapping[str, Any], numbers: int = 0) -> int:
    """Return the bits of a code: by how many numbers lie along the packed axis, or as stated; 0 where neither tells."""
    bits = packed * _WORD_BITS // numbers if numbers else settings.get("bits", 4)
    return bits if bits in _BITS and codes.dtype.name in _WORDS else 0


def _read_bnb4(parts: Parts) -> Outcome | None:
    """Read bitsandbytes' NF4 or FP4."""
    companions = parts.companions(_BNB_ROLES)
    state = companions.get("state")
    if state is None or state.span.length > _MAX_STATE_BYTES:
        return "no quant_state"
    try:
        stated = parse_json_object(state.read_bytes().tobytes(), state.name)
    except LoraformatError:
        return "a quant_state that is no JSON"
    shape, size = stated.get("shape"), stated.get("blocksize")
    if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(isinstance(n, int) for n in shape):
        return f"a weight of the shape {shape!r:.80}"
    matrix: tuple[int, int] = (shape[0], shape[1])  # type: ignore[assignment]
    held = reform(parts.codes, matrix, 4)
    if held is None or matrix[1] % 2 or not isinstance(size, int) or size <= 0:
        return _odd(parts)
    blocks = -(-matrix[0] * matrix[1] // size)
    if companions["scales"].elements != blocks or companions["table"].elements != _TABLE:
        return _odd(parts)
    if not _check_nested(companions, stated, blocks):
        return _odd(parts)
    return CodedTensor(f"{parts.stem}.weight", held, Coding("bnb4", matrix, (1, size), companions))


def _check_nested(companions: Mapping[str, StoredTensor], stated: Mapping[str, Any], blocks: int) -> bool:
    """Say whether what the largest numbers of blocks are stored as is sound."""
    scales, outer, table = (companions.get(role) for role in ("scales", "nested_scales", "nested_table"))
    assert scales is not None, "asked for"
    if outer is None or table is None:
        return scales.dtype.family == "float" and outer is table is None
    size, offset = stated.get("nested_blocksize"), stated.get("nested_offset")
    if not isinstance(size, int) or size <= 0 or not isinstance(offset, int | float):
        return False
    return scales.dtype.name == "uint8" and table.elements == _NESTED_TABLE and outer.elements == -(-blocks // size)


def _read_gptq(parts: Parts) -> Outcome | None:
    """Read GPTQ's words, or AWQ's, which have the same names and other shapes."""
    settings, codes = parts.settings, parts.codes
    roles = {".scales": "scales", ".qzeros": "zero_points", ".g_idx": "order"}
    companions = parts.companions(roles)
    scales, zeros, order = companions["scales"], companions["zero_points"], companions.get("order")
    if len(codes.shape) != 2 or len(scales.shape) != 2 or len(zeros.shape) != 2 or scales.dtype.name not in _SCALES:
        return _odd(parts)
    if codes.shape[1] != scales.shape[1]:
        return _read_awq(parts, companions)
    bits = _find_bits(codes, codes.shape[0], settings, order.elements if order is not None else 0)
    rows = codes.shape[0] * _WORD_BITS // bits if bits else 0
    held, size = reform(codes, (rows, codes.shape[1]), bits or 4), count_groups(rows, scales.shape[::-1])
    packed = (scales.shape[0], scales.shape[1] * bits // _WORD_BITS)
    if held is None or not size or zeros.shape != packed or zeros.dtype.name not in _WORDS:
        return _odd(parts)
    if order is not None and (order.elements != rows or order.dtype.name not in ("int32", "int64")):
        return _odd(parts)
    first = _find_first_zero(settings)
    if first is None:
        return "AutoRound's words, without a packing_format that says from what number zero points count"
    coding = Coding("gptq", (rows, codes.shape[1]), (size, 1), companions, first, rows_together=_WORD_BITS // bits)
    return CodedTensor(f"{parts.stem}.weight", held, coding, turned=True)


def _find_first_zero(settings: Mapping[str, Any]) -> int | None:
    """Return what a stored zero point of 0 stands for: 1, or 0 in GPTQ's second version; None where nothing tells.

    AutoRound's own form has 0, and what it packs for AutoGPTQ 1 (`export_to_autoround/export.py`, 2026).
    """
    if not str(settings.get("quant_method", "")).endswith("auto-round"):
        return int(settings.get("checkpoint_format", "gptq") != "gptq_v2")
    packing = str(settings.get("packing_format") or settings.get("backend") or "")
    if not packing.startswith("auto_round"):
        return None
    return int("gptq" in packing and "gptqmodel" not in packing)


def _read_awq(parts: Parts, companions: Mapping[str, StoredTensor]) -> Outcome:
    codes, scales, zeros = parts.codes, companions["scales"], companions["zero_points"]
    matrix, version = (codes.shape[0], codes.shape[1] * 8), str(parts.settings.get("version", "gemm")).lower()
    held, size = reform(codes, matrix, 4), count_groups(codes.shape[0], scales.shape[::-1])
    if version != "gemm":
        return f"the version {version!r:.40} of AWQ"
    packed = (scales.shape[0], codes.shape[1])
    if held is None or not size or scales.shape[1] != matrix[1] or zeros.shape != packed:
        return _odd(parts)
    if not {codes.dtype.name, zeros.dtype.name} <= _WORDS:
        return _odd(parts)
    return CodedTensor(f"{parts.stem}.weight", held, Coding("awq", matrix, (size, 1), companions), turned=True)


def _read_packed(parts: Parts) -> Outcome | None:
    """Read what compressed-tensors packs: whole numbers in words, or 4-bit floats in bytes."""
    codes, companions = parts.codes, parts.companions({**SCALE_ROLES, ".weight_g_idx": "order"})
    if codes.dtype.name == "uint8":
        return PACKED_FLOATS(parts)
    shape, scales, zeros = companions.get("weight_shape"), companions["scales"], companions.get("zero_points")
    if shape is None or shape.elements != 2 or shape.dtype.name not in ("int64", "int32") or len(scales.shape) != 2:
        return _odd(parts)
    matrix: tuple[int, int] = tuple(int(n) for n in shape.read().reshape(-1))  # type: ignore[assignment]
    bits = codes.span.length * 8 // max(1, matrix[0] * matrix[1])
    held = reform(codes, matrix, bits) if bits in _BITS and codes.dtype.name in _WORDS else None
    size = count_groups(matrix[1], scales.shape)
    if held is None or not size or scales.shape[0] != matrix[0] or scales.dtype.name not in _SCALES:
        return _odd(parts)
    order = companions.get("order")
    if order is not None and (order.elements != matrix[1] or order.dtype.name not in ("int32", "int64")):
        return _odd(parts)
    if zeros is not None and zeros.shape != (-(-matrix[0] * bits // _WORD_BITS), scales.shape[1]):
        return _odd(parts)
    zero = 1 << (bits - 1)
    if order is None and zeros is None and bits in (4, 8):
        return CodedTensor(f"{parts.stem}.weight", held, Coding(f"affine{bits}", matrix, (1, size), companions, zero))
    return CodedTensor(f"{parts.stem}.weight", held, Coding("packed_groups", matrix, (1, size), companions, zero))


def _read_mlx(parts: Parts) -> Outcome | None:
    """Read MLX's affine codes; `biases` are the values of code 0."""
    codes, companions = parts.codes, parts.companions({".scales": "scales", ".biases": "firsts"})
    scales, firsts = companions["scales"], companions["firsts"]
    own = parts.settings.get(parts.stem)
    bits = _find_bits(codes, 0, own if isinstance(own, Mapping) else parts.settings)
    if codes.dtype.name != "uint32" or len(codes.shape) != 2 or len(scales.shape) != 2 or not bits:
        return _odd(parts)
    matrix = (codes.shape[0], codes.shape[1] * _WORD_BITS // bits)
    held, size = reform(codes, matrix, bits), count_groups(matrix[1], scales.shape)
    sound = scales.shape == firsts.shape and scales.shape[0] == matrix[0]
    if held is None or not size or not sound or not {scales.dtype.name, firsts.dtype.name} <= _SCALES:
        return _odd(parts)
    return CodedTensor(f"{parts.stem}.weight", held, Coding("packed_groups", matrix, (1, size), companions))


RECIPES: Final = (
    Recipe("bitsandbytes 4 bits", ".weight", tuple(_BNB_ROLES)[:2], tuple(_BNB_ROLES)[2:], _read_bnb4),
    Recipe("GPTQ or AWQ", ".qweight", (".scales", ".qzeros"), (".g_idx",), _read_gptq),
    Recipe(
        "compressed-tensors",
        ".weight_packed",
        (".weight_scale",),
        (".weight_zero_point", ".weight_g_idx", ".weight_global_scale", *INPUTS),
        _read_packed,
    ),
    Recipe("MLX", ".weight", (".scales", ".biases"), (), _read_mlx),
)
