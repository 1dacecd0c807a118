"""Quantised weights of an ONNX graph: where their scales and zero points are, and what hangs on them."""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeAlias

from loraformat.bases import Site
from loraformat.bases._onnx.operands import (
    ATTENTION,
    DEQUANTISE,
    GATHER,
    INTEGER_PRODUCTS,
    MATMUL_BNB4,
    MATMUL_NBITS,
    OPERANDS,
    QMOE,
    Operand,
    find_holder,
    find_operands,
)
from loraformat.bases._onnx.other_codes import FLOATS, find_bnb4, is_shifted, make_table
from loraformat.bases._onnx.ranges import QUANTISED
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.traces import Trace, trace_constant
from loraformat.bases._onnx.uses import read_attribute, read_expert_bits
from loraformat.containers.onnx_file import OnnxFile
from loraformat.encodings import Coding
from loraformat.problems import Problem
from loraformat.spans import HeldTensor, Part, StoredTensor

if TYPE_CHECKING:
    import onnx

_CODES: Final = {
    **{f"{sign}int{bits}": f"affine{bits}" for sign in ("", "u") for bits in (2, 4, 8, 16)},
    **dict.fromkeys(FLOATS, "float8_scaled"),
}
_WIDE: Final = frozenset({"int16", "uint16"})
"""Codes that DequantizeLinear alone reads."""
_STATIC: Final = frozenset({"QLinearMatMul", "QLinearConv", "com.microsoft.QGemm"})
_RANGES: Final = "the ranges of its activations were measured on the base model"
_NBITS: Final = (("N", 0), ("K", 0), ("bits", 4), ("block_size", 0))
_Shape: TypeAlias = tuple[str, tuple[int, int], tuple[int, int]]


_FLOAT_BIASES: Final = {"Gemm": 2, "Conv": 2}
"""Operators whose bias onnxruntime takes to count in steps of the scales, where it is stored as int32."""


def find_coding(
    opened: OnnxFile, raw: RawSite, stored: StoredTensor, beside: Set[Visit] = frozenset()
) -> Coding | Problem | None:
    """Return how the codes of a site's weight are read; None for a weight that is stored as it is.

    Args:
        opened: the model.
        raw: the site.
        stored: its tensor.
        beside: nodes that read scales and zero points for other sites of the tensor, which change with this one.
    """
    if stored.dtype.name not in _CODES:
        return None
    where = stored.name or raw.trace.name
    count, holder = find_holder(raw)
    if stored.dtype.name in FLOATS and not count:  # Then they are read as the numbers that they are.
        return None
    if count > 1 or (count and holder.op == raw.visit.op) or _is_unknown(holder):
        found_codes = f"numbers stored as {stored.dtype.name} that {holder.op} reads"
        return Problem("LF403", where, found_codes, "one DequantizeLinear, or an operator that does the same")
    found = _find_companions(opened, raw, holder, where)
    if isinstance(found, Problem):
        return found
    companions, operands = found
    if stored.dtype.name in FLOATS and is_shifted(companions):
        return Problem("LF403", where, "8-bit floats with a zero point other than 0", "a zero point of 0")
    readers = {
        role: _list_others(opened, each.trace, each.readers | beside, companions[role])
        for role, each in operands.items()
    }
    shape = _find_blocks(holder, raw, stored, companions["scales"].shape)
    if shape is None:
        found_shape = f"scales of the shape {list(companions['scales'].shape)}"
        return Problem("LF403", where, found_shape, "one for each channel or block")
    encoding, matrix, block = shape
    packed = holder.op in (MATMUL_NBITS, GATHER, QMOE) and stored.dtype.name == "uint8"
    zero = 1 << (int(encoding.removeprefix("affine")) - 1) if packed else 0
    fixed = _find_ties(raw, operands["scales"].readers | {holder}, companions["scales"])
    zeros_fixed = _find_zero_ties(companions, readers.get("zero_points", []))
    if holder.op == MATMUL_BNB4:
        companions["table"] = make_table(holder)
    padding = matrix[1] - int(read_attribute(holder.node, "K", 0)) if holder.op == MATMUL_NBITS else 0
    read_beside = f"{readers['scales'][0]} reads them too" if readers["scales"] else ""
    return Coding(encoding, matrix, block, companions, zero, fixed, zeros_fixed, padding, read_beside)


def agree_on_codes(sites: Sequence[Site]) -> list[Site]:
    """Return the sites; those that read the same codes agree on what these stand for, or nothing is merged there."""
    codings: dict[str, list[Coding]] = defaultdict(list)
    for site in sites:
        if site.weight is not None and site.weight.coding is not None:
            codings[site.weight.key].append(site.weight.coding)
    joined = {key: _join(same) for key, same in codings.items()}
    return [_take_coding(site, joined) for site in sites]


def _take_coding(site: Site, joined: Mapping[str, Coding | None]) -> Site:
    if site.weight is None or site.weight.coding is None:
        return site
    coding = joined[site.weight.key]
    if coding is None:
        found = f"codes of {site.weight.name!r} that two operators read with other scales"
        return replace(site, weight=None, obstacle=Problem("LF403", site.id, found, "one set of scales"))
    part = site.part
    if part is not None and part.columns == (0, coding.matrix[1], 1):  # A table does not say where its padding begins.
        part = replace(part, columns=(0, coding.matrix[1] - coding.padding, 1))
    return replace(site, weight=replace(site.weight, coding=coding), part=part)


def _join(codings: Sequence[Coding]) -> Coding | None:
    """Return what all readers of some codes take them for; None where they differ."""
    first, meanings = codings[0], {_tell(coding) for coding in codings}
    if len(meanings) > 1:
        return None
    return replace(
        first,
        padding=max(coding.padding for coding in codings),
        fixed=_find_said(coding.fixed for coding in codings),
        read_beside=_find_said(coding.read_beside for coding in codings),
        zeros_fixed=_find_said(coding.zeros_fixed for coding in codings),
    )


def _find_said(reasons: Iterable[str]) -> str:
    return next(filter(None, reasons), "")


def _tell(coding: Coding) -> tuple[Hashable, ...]:
    beside = coding.companions.items()
    places = ((role, each.span if isinstance(each, StoredTensor) else each.name) for role, each in beside)
    return coding.encoding, coding.matrix, coding.block, coding.zero, *sorted(places, key=lambda place: place[0])


def find_coded_part(coding: Coding | None, raw: RawSite) -> Part | None:
    """Return where in a matrix of padded blocks the weight itself is."""
    if coding is None or raw.visit.op not in (MATMUL_NBITS, MATMUL_BNB4, GATHER):
        return None
    return Part(coding.matrix, (0, coding.matrix[0], 1), (0, coding.matrix[1] - coding.padding, 1))


def find_ranges(visits: Sequence[Visit]) -> Problem | None:
    """Return what speaks against any merge into a graph that was quantised with activations, ranges and all."""
    for visit in visits:
        scaled = visit.op == "QuantizeLinear" and len(visit.node.input) > 1
        constant = scaled and trace_constant(visit.scope, visit.node.input[0]) is None
        held = visit.op == ATTENTION and trace_constant(visit.scope, visit.node.input[3]) is not None
        held = held or visit.op in _STATIC
        if held or (constant and trace_constant(visit.scope, visit.node.input[1]) is not None):
            where = f"{visit.op} {visit.node.name!r}"
            return Problem("LF441", where, _RANGES, "a model whose activations are quantised as they come")
    return None


def _is_unknown(holder: Visit) -> bool:
    return holder.op != QMOE and not any(holder.op in known for known in (OPERANDS, INTEGER_PRODUCTS, QUANTISED))


def _find_companions(
    opened: OnnxFile, raw: RawSite, holder: Visit, where: str
) -> tuple[dict[str, StoredTensor | HeldTensor], Mapping[str, Operand]] | Problem:
    """Return scales and zero points, and where each is read."""
    operands = find_operands(raw)
    if "scales" not in operands:
        return Problem("LF403", where, f"codes of {holder.op} without constant scales", "scales that are stored")
    companions: dict[str, StoredTensor | HeldTensor] = {}
    for role, each in operands.items():
        opened_tensor = _open_companion(opened, each.trace)
        if isinstance(opened_tensor, Problem):
            return opened_tensor
        companions[role] = opened_tensor
    if holder.op == MATMUL_NBITS and len(holder.node.input) > 4 and holder.node.input[4]:
        return Problem("LF403", where, "columns in another order (g_idx)", "columns in order")
    return companions, operands


def _list_others(opened: OnnxFile, trace: Trace, owners: Set[Visit], stored: StoredTensor | HeldTensor) -> list[str]:
    """Return words for what reads a companion besides the operators that it belongs to."""
    readers = [each.describe(at) for each, at in trace.scope.readers.get(trace.name, ()) if each not in owners]
    if isinstance(stored, StoredTensor):
        readers += [f"the tensor {other!r}" for other in opened.overlaps(stored)]
    return readers


def _open_companion(opened: OnnxFile, trace: Trace) -> StoredTensor | HeldTensor | Problem:
    """Return a companion; zero points that are written one by one are read with the graph."""
    assert trace.tensor is not None, "traced to a constant"
    stored = opened.stored_tensor(trace.tensor)
    return opened.held_tensor(trace.tensor) or stored if isinstance(stored, Problem) else stored


def _find_blocks(holder: Visit, raw: RawSite, stored: StoredTensor, scales: tuple[int, ...]) -> _Shape | None:
    """Return the encoding, the matrix of codes, and the rows and columns that share a scale."""
    if holder.op == MATMUL_BNB4:
        return find_bnb4(holder, stored, math.prod(scales))
    if holder.op == MATMUL_NBITS:
        return _find_nbits(holder, stored, math.prod(scales))
    if holder.op == GATHER:
        return _find_table(holder, raw, stored, scales)
    if holder.op == QMOE:
        return _find_experts(raw, stored, scales)
    encoding = _CODES[stored.dtype.name]
    matrix = (stored.shape[0], math.prod(stored.shape[1:])) if stored.shape else (1, 1)
    if math.prod(scales) == 1:
        return encoding, matrix, matrix
    if (
        not stored.shape
        or matrix[1] * stored.dtype.bits % 8
        or (stored.dtype.name in _WIDE and holder.op != DEQUANTISE)
    ):
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
    if holder.op == DEQUANTISE:
        axis = int(read_attribute(holder.node, "axis", 1))
        return axis + dims if axis < 0 else axis
    rows = holder.op in {"QLinearConv", "ConvInteger"} or bool(read_attribute(holder.node, "transB", 0))
    return 0 if rows ^ raw.trace.flipped else 1


def _find_nbits(holder: Visit, stored: StoredTensor, scales: int) -> _Shape | None:
    n, k, bits, size = (int(read_attribute(holder.node, name, default)) for name, default in _NBITS)
    if bits not in (2, 4, 8) or min(n, k, size) <= 0:
        return None
    blocks = -(-k // size)
    if stored.span.length * 8 != n * blocks * size * bits or scales != n * blocks or stored.shape[0] != n:
        return None
    return f"affine{bits}", (n, blocks * size), (1, size)


def _find_experts(raw: RawSite, stored: StoredTensor, scales: tuple[int, ...]) -> _Shape | None:
    """Return how the rows of all experts lie, one under the other, from codes `(experts, out, in * bits / 8)`."""
    bits, size = read_expert_bits(raw.visit.node, raw.position), int(read_attribute(raw.visit.node, "block_size", 0))
    if bits not in (4, 8) or len(stored.shape) != 3 or not all(stored.shape) or size < 0:
        return None
    experts, rows, length = stored.shape
    columns = length * 8 // bits
    block = size or columns
    wanted = [(experts, rows, -(-columns // block))] if size else [(experts, rows), (experts, rows, 1)]
    if scales not in wanted:
        return None
    return f"affine{bits}", (experts * rows, columns), (1, block)


def _find_table(holder: Visit, raw: RawSite, stored: StoredTensor, scales: tuple[int, ...]) -> _Shape | None:
    """Return how the rows of a table lie: codes of 4 bits may be packed by the byte, as numbers of twice the size."""
    bits, size = (int(read_attribute(holder.node, *each)) for each in (("bits", 4), ("block_size", 128)))
    axes = [int(read_attribute(holder.node, *each)) for each in (("gather_axis", 0), ("quantize_axis", 1))]
    dims = 3 if any(step.op == "Reshape" for step in raw.trace.steps) else 2
    if len(stored.shape) != dims or axes not in ([0, 1], [0, -1]) or size <= 0:
        return None
    bits = bits if stored.dtype.name == "uint8" else stored.dtype.bits
    columns = math.prod(stored.shape[1:]) * stored.dtype.bits // bits if bits in (4, 8) else 0
    if not columns or columns * bits % 8 or scales != (stored.shape[0], -(-columns // size)):
        return None
    return f"affine{bits}", (stored.shape[0], columns), (1, size)


def _find_ties(raw: RawSite, holders: Set[Visit], scales: StoredTensor | HeldTensor) -> str:
    """Return why the scales must stay; nothing when they may change."""
    if isinstance(scales, HeldTensor):
        return "they are no run of bytes in the file"
    places = [(each, OPERANDS[each.op].bias) for each in holders if each.op in OPERANDS]
    places.append((raw.visit, _FLOAT_BIASES.get(raw.visit.op, 0)))
    biases = [bias.name for visit, position in places if (bias := _trace_bias(visit, position)) is not None]
    return f"the bias {min(biases)!r} counts in steps of them" if biases else ""


def _find_zero_ties(companions: Mapping[str, StoredTensor | HeldTensor], readers: Sequence[str]) -> str:
    """Return why zero points must stay; nothing when they may change, or there are none."""
    if readers:
        return f"{readers[0]} reads them too"
    return "they are no run of bytes in the file" if isinstance(companions.get("zero_points"), HeldTensor) else ""


def _trace_bias(visit: Visit, position: int) -> "onnx.TensorProto | None":
    if not position or position >= len(visit.node.input) or not visit.node.input[position]:
        return None
    trace = trace_constant(visit.scope, visit.node.input[position])
    return trace.tensor if trace is not None and trace.tensor is not None and trace.tensor.data_type == 6 else None
