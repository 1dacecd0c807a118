"""Quantised weights of an ONNX graph: where their scales and zero points are, and what hangs on them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from loraformat.bases._onnx_scopes import Trace, Visit, trace_constant
from loraformat.bases._onnx_sites import RawSite
from loraformat.bases._onnx_uses import read_attribute
from loraformat.containers.onnx_file import OnnxFile
from loraformat.encodings import Coding
from loraformat.problems import Problem
from loraformat.spans import HeldTensor, Part, StoredTensor

if TYPE_CHECKING:
    import onnx

_DEQUANTISE: Final = "DequantizeLinear"
_MATMUL_NBITS: Final = "com.microsoft.MatMulNBits"
_GATHER: Final = "com.microsoft.GatherBlockQuantized"
_ATTENTION: Final = "com.microsoft.QAttention"
_CODES: Final = {"int8": "affine8", "uint8": "affine8", "int4": "affine4", "uint4": "affine4"}
_INTEGER_PRODUCTS: Final = frozenset({"MatMulInteger", "ConvInteger"})
_STEPS: Final = 6
_STATIC: Final = frozenset({"QLinearMatMul", "QLinearConv", "com.microsoft.QGemm"})
_RANGES: Final = "the ranges of its activations were measured on the base model"
_NBITS: Final = (("N", 0), ("K", 0), ("bits", 4), ("block_size", 0))
_Shape: TypeAlias = tuple[str, tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Operands:
    """Where an operator has what belongs to its weight's codes.

    Attributes:
        scales: the input with the scales.
        zeros: the input with the zero points.
        bias: the input with a bias that counts in steps of the scales; 0 for none.
    """

    scales: int
    zeros: int
    bias: int = 0


_OPERANDS: Final[Mapping[str, _Operands]] = {
    _DEQUANTISE: _Operands(1, 2),
    "QLinearMatMul": _Operands(4, 5),
    "QLinearConv": _Operands(4, 5, bias=8),
    "com.microsoft.QGemm": _Operands(4, 5, bias=6),
    "com.microsoft.DynamicQuantizeMatMul": _Operands(2, 3),
    "com.microsoft.MatMulIntegerToFloat": _Operands(3, 5),
    _MATMUL_NBITS: _Operands(2, 3),
    _GATHER: _Operands(2, 3),
    _ATTENTION: _Operands(4, 7),
}
_FLOAT_BIASES: Final = {"Gemm": 2, "Conv": 2}
"""Operators whose bias onnxruntime takes to count in steps of the scales, where it is stored as int32."""


def find_coding(opened: OnnxFile, raw: RawSite, stored: StoredTensor) -> Coding | Problem | None:
    """Return how the codes of a site's weight are read; None for a weight that is stored as it is.

    Args:
        opened: the model.
        raw: the site.
        stored: its tensor.
    """
    if stored.dtype.name not in _CODES:
        return None
    where = stored.name or raw.trace.name
    holders = [step for step in raw.trace.steps if step.op == _DEQUANTISE]
    holder = holders[0] if holders else _find_after(raw.visit) or raw.visit
    if len(holders) > 1 or (holders and holder.op == raw.visit.op) or _is_unknown(holder):
        found_codes = f"numbers stored as {stored.dtype.name} that {holder.op} reads"
        return Problem("LF403", where, found_codes, "one DequantizeLinear, or an operator that does the same")
    found = _find_companions(opened, holder, where)
    if isinstance(found, Problem):
        return found
    companions, readers, zero_readers = found
    shape = _find_blocks(holder, raw, stored, companions["scales"].shape)
    if shape is None:
        found_shape = f"scales of the shape {list(companions['scales'].shape)}"
        return Problem("LF403", where, found_shape, "one for each channel or block")
    encoding, matrix, block = shape
    packed = holder.op in (_MATMUL_NBITS, _GATHER) and stored.dtype.name == "uint8"
    zero = 1 << (int(read_attribute(holder.node, "bits", 4)) - 1) if packed else 0
    fixed = _find_ties(raw, holder, companions["scales"], readers)
    zeros_fixed = _find_zero_ties(companions, zero_readers)
    padding = matrix[1] - int(read_attribute(holder.node, "K", 0)) if holder.op == _MATMUL_NBITS else 0
    return Coding(encoding, matrix, block, companions, zero, fixed, zeros_fixed, padding)


def _find_after(visit: Visit) -> Visit | None:
    """Return what dequantises codes after they were looked up, with one scale for all."""
    readers = visit.scope.readers.get(visit.node.output[0], ()) if visit.op == "Gather" else ()
    if len(readers) != 1 or readers[0][0].op != _DEQUANTISE:
        return None
    scales = _trace(readers[0][0], 1)
    is_one = scales is not None and scales.tensor is not None and math.prod(scales.tensor.dims) == 1
    return readers[0][0] if is_one else None


def find_coded_part(coding: Coding | None, raw: RawSite) -> Part | None:
    """Return where in a matrix of padded blocks the weight itself is."""
    if coding is None or raw.visit.op not in (_MATMUL_NBITS, _GATHER):
        return None
    return Part(coding.matrix, (0, coding.matrix[0], 1), (0, coding.matrix[1] - coding.padding, 1))


def find_ranges(visits: Sequence[Visit]) -> Problem | None:
    """Return what speaks against any merge into a graph that was quantised with activations, ranges and all."""
    for visit in visits:
        scaled = visit.op == "QuantizeLinear" and len(visit.node.input) > 1
        constant = scaled and trace_constant(visit.scope, visit.node.input[0]) is None
        held = visit.op == _ATTENTION and trace_constant(visit.scope, visit.node.input[3]) is not None
        held = held or visit.op in _STATIC
        if held or (constant and trace_constant(visit.scope, visit.node.input[1]) is not None):
            where = f"{visit.op} {visit.node.name!r}"
            return Problem("LF441", where, _RANGES, "a model whose activations are quantised as they come")
    return None


def _is_unknown(holder: Visit) -> bool:
    return holder.op not in _OPERANDS and holder.op not in _INTEGER_PRODUCTS


def _find_companions(
    opened: OnnxFile, holder: Visit, where: str
) -> tuple[dict[str, StoredTensor | HeldTensor], list[str], list[str]] | Problem:
    """Return scales and zero points, and what reads each besides the weight's own operator."""
    operands = _OPERANDS.get(holder.op)
    scales, owner = (_trace(holder, operands.scales), holder) if operands else _find_product_scales(holder)
    zeros = _trace(holder, operands.zeros if operands else 3)
    if scales is None or owner is None or scales.tensor is None:
        return Problem("LF403", where, f"codes of {holder.op} without constant scales", "scales that are stored")
    found = {"scales": _open_companion(opened, scales)}
    if zeros is not None:
        found["zero_points"] = _open_companion(opened, zeros)
    for tensor in found.values():
        if isinstance(tensor, Problem):
            return tensor
    if holder.op == _MATMUL_NBITS and len(holder.node.input) > 4 and holder.node.input[4]:
        return Problem("LF403", where, "columns in another order (g_idx)", "columns in order")
    companions = {role: each for role, each in found.items() if not isinstance(each, Problem)}
    readers = _list_others(opened, scales, owner, companions["scales"])
    zero_readers = _list_others(opened, zeros, holder, companions["zero_points"]) if zeros is not None else []
    return companions, readers, zero_readers


def _list_others(opened: OnnxFile, trace: Trace, owner: Visit, stored: StoredTensor | HeldTensor) -> list[str]:
    """Return words for what reads a companion besides the operator that it belongs to."""
    readers = [each.describe(at) for each, at in trace.scope.readers.get(trace.name, ()) if each is not owner]
    if isinstance(stored, StoredTensor):
        readers += [f"the tensor {other!r}" for other in opened.overlaps(stored)]
    return readers


def _trace(visit: Visit, position: int) -> Trace | None:
    inputs = visit.node.input
    if position >= len(inputs) or not inputs[position]:
        return None
    trace = trace_constant(visit.scope, inputs[position])
    return trace if trace is not None and not trace.blocked and all(s.op == "Identity" for s in trace.steps) else None


def _find_product_scales(visit: Visit) -> tuple[Trace | None, Visit | None]:
    """Return the scale of a product of codes: on its way to a float it is multiplied by that of X times that of W."""
    current = visit
    for _ in range(_STEPS):
        readers = current.scope.readers.get(next(iter(current.node.output), ""), ())
        if len(readers) != 1:
            return None, None
        current, position = readers[0]
        if current.op == "Mul":
            return _pick_constant(current, current.node.input[1 - position])
        if current.op not in {"Cast", "Reshape"}:
            return None, None
    return None, None


def _pick_constant(product: Visit, name: str) -> tuple[Trace | None, Visit | None]:
    made_by = product.scope.producer(name)
    if not isinstance(made_by, Visit):
        return trace_constant(product.scope, name), product
    if made_by.op != "Mul":
        return None, None
    constant = [trace for position in (0, 1) if (trace := _trace(made_by, position)) is not None]
    return (constant[0], made_by) if len(constant) == 1 else (None, None)


def _open_companion(opened: OnnxFile, trace: Trace) -> StoredTensor | HeldTensor | Problem:
    """Return a companion; zero points that are written one by one are read with the graph."""
    assert trace.tensor is not None, "traced to a constant"
    stored = opened.stored_tensor(trace.tensor)
    return opened.held_tensor(trace.tensor) or stored if isinstance(stored, Problem) else stored


def _find_blocks(holder: Visit, raw: RawSite, stored: StoredTensor, scales: tuple[int, ...]) -> _Shape | None:
    """Return the encoding, the matrix of codes, and the rows and columns that share a scale."""
    if holder.op == _MATMUL_NBITS:
        return _find_nbits(holder, stored, math.prod(scales))
    if holder.op == _GATHER:
        return _find_table(holder, stored, scales)
    encoding = _CODES[stored.dtype.name]
    matrix = (stored.shape[0], math.prod(stored.shape[1:])) if stored.shape else (1, 1)
    if math.prod(scales) == 1:
        return encoding, matrix, matrix
    if not stored.shape or (encoding == "affine4" and matrix[1] % 2):
        return None
    axis = _find_axis(holder, raw, len(stored.shape))
    size = int(read_attribute(holder.node, "block_size", 0))
    if size > 0 and len(stored.shape) == len(scales) == 2 and axis in (0, 1):
        block = (size, 1) if axis == 0 else (1, size)
        wanted = (-(-matrix[0] // block[0]), -(-matrix[1] // block[1]))
        return (encoding, matrix, block) if scales == wanted else None
    if size or math.prod(scales) != stored.shape[axis]:
        return None
    if axis == 0:
        return encoding, matrix, (1, matrix[1])
    return (encoding, matrix, (matrix[0], 1)) if axis == 1 and len(stored.shape) == 2 else None


def _find_axis(holder: Visit, raw: RawSite, dims: int) -> int:
    """Return the axis of the stored tensor whose channels have scales of their own."""
    if holder.op == _DEQUANTISE:
        axis = int(read_attribute(holder.node, "axis", 1))
        return axis + dims if axis < 0 else axis
    rows = holder.op in {"QLinearConv", "ConvInteger"} or bool(read_attribute(holder.node, "transB", 0))
    return 0 if rows ^ raw.trace.flipped else 1


def _find_nbits(holder: Visit, stored: StoredTensor, scales: int) -> _Shape | None:
    n, k, bits, size = (int(read_attribute(holder.node, name, default)) for name, default in _NBITS)
    if bits not in (4, 8) or min(n, k, size) <= 0:
        return None
    blocks = -(-k // size)
    if stored.span.length * 8 != n * blocks * size * bits or scales != n * blocks or stored.shape[0] != n:
        return None
    return f"affine{bits}", (n, blocks * size), (1, size)


def _find_table(holder: Visit, stored: StoredTensor, scales: tuple[int, ...]) -> _Shape | None:
    """Return how the rows of a table lie: codes of 4 bits may be packed by the byte, as numbers of twice the size."""
    bits, size = (int(read_attribute(holder.node, *each)) for each in (("bits", 4), ("block_size", 128)))
    axes = [int(read_attribute(holder.node, *each)) for each in (("gather_axis", 0), ("quantize_axis", 1))]
    if len(stored.shape) != 2 or axes not in ([0, 1], [0, -1]) or size <= 0:
        return None
    bits = bits if stored.dtype.name == "uint8" else stored.dtype.bits
    columns = stored.shape[1] * stored.dtype.bits // bits if bits in (4, 8) else 0
    if not columns or columns * bits % 8 or scales != (stored.shape[0], -(-columns // size)):
        return None
    return f"affine{bits}", (stored.shape[0], columns), (1, size)


def _find_ties(raw: RawSite, holder: Visit, scales: StoredTensor | HeldTensor, readers: Sequence[str]) -> str:
    """Return why the scales must stay; nothing when they may change."""
    if readers:
        return f"{readers[0]} reads them too"
    if isinstance(scales, HeldTensor):
        return "they are no run of bytes in the file"
    operands = _OPERANDS.get(holder.op)
    position = (operands.bias if operands else 0) or _FLOAT_BIASES.get(raw.visit.op, 0)
    bias = _trace_bias(raw.visit, position) if position else None
    return f"the bias {bias.name!r} counts in steps of them" if bias is not None else ""


def _find_zero_ties(companions: Mapping[str, StoredTensor | HeldTensor], readers: Sequence[str]) -> str:
    """Return why zero points must stay; nothing when they may change, or there are none."""
    if readers:
        return f"{readers[0]} reads them too"
    return "they are no run of bytes in the file" if isinstance(companions.get("zero_points"), HeldTensor) else ""


def _trace_bias(visit: Visit, position: int) -> "onnx.TensorProto | None":
    if position >= len(visit.node.input) or not visit.node.input[position]:
        return None
    trace = trace_constant(visit.scope, visit.node.input[position])
    return trace.tensor if trace is not None and trace.tensor is not None and trace.tensor.data_type == 6 else None
