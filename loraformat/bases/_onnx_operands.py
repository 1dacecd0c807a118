"""Where the graph has what belongs to the codes of a quantised weight: scales, zero points, a bias in their steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from loraformat.bases._onnx_scopes import Trace, Visit, trace_constant
from loraformat.bases._onnx_sites import RawSite

DEQUANTISE: Final = "DequantizeLinear"
MATMUL_NBITS: Final = "com.microsoft.MatMulNBits"
GATHER: Final = "com.microsoft.GatherBlockQuantized"
ATTENTION: Final = "com.microsoft.QAttention"
INTEGER_PRODUCTS: Final = frozenset({"MatMulInteger", "ConvInteger"})
CODE_SUFFIXES: Final = ("_Q4", "_Q8", "_DQ", "_quantized")
"""What quantisers add to the name of a weight."""
_FORMS: Final = frozenset({2, 3, 21, 22})
"""UINT8, INT8, UINT4, INT4, as ONNX numbers them."""
_STEPS: Final = 6


@dataclass(frozen=True, slots=True)
class Operands:
    """Where an operator has what belongs to its weight's codes.

    Attributes:
        scales: the input with the scales.
        zeros: the input with the zero points.
        bias: the input with a bias that counts in steps of the scales; 0 for none.
    """

    scales: int
    zeros: int
    bias: int = 0


OPERANDS: Final[Mapping[str, Operands]] = {
    DEQUANTISE: Operands(1, 2),
    "QLinearMatMul": Operands(4, 5),
    "QLinearConv": Operands(4, 5, bias=8),
    "com.microsoft.QGemm": Operands(4, 5, bias=6),
    "com.microsoft.DynamicQuantizeMatMul": Operands(2, 3),
    "com.microsoft.MatMulIntegerToFloat": Operands(3, 5),
    MATMUL_NBITS: Operands(2, 3),
    GATHER: Operands(2, 3),
    ATTENTION: Operands(4, 7),
}


@dataclass(frozen=True, slots=True)
class Operand:
    """Where scales or zero points are read that belong to a site's codes.

    Attributes:
        trace: where they are.
        reader: the node that reads them.
        position: which input of it.
        is_own: whether what the node makes of them is for this site alone.
    """

    trace: Trace
    reader: Visit
    position: int
    is_own: bool = True


def find_operands(raw: RawSite) -> Mapping[str, Operand]:
    """Return where scales and zero points of a site's codes are read, by role; nothing for weights stored as they are.

    There are no `scales` where the graph has none that are constant.
    """
    tensor = raw.trace.tensor
    if tensor is None or tensor.data_type not in _FORMS:
        return {}
    _, holder = find_holder(raw)
    operands = OPERANDS.get(holder.op)
    scales = _open_operand(holder, operands.scales) if operands else _find_product_scales(holder)
    zeros = _open_operand(holder, operands.zeros if operands else 3)
    return {role: each for role, each in (("scales", scales), ("zero_points", zeros)) if each is not None}


def find_holder(raw: RawSite) -> tuple[int, Visit]:
    """Return how many nodes on the way to a site dequantise, and the node that scales and zero points belong to."""
    holders = [step for step in raw.trace.steps if step.op == DEQUANTISE]
    return len(holders), holders[0] if holders else _find_after(raw.visit) or raw.visit


def _find_after(visit: Visit) -> Visit | None:
    """Return what dequantises codes after they were looked up, with one scale for all."""
    readers = visit.scope.readers.get(visit.node.output[0], ()) if visit.op == "Gather" else ()
    if len(readers) != 1 or readers[0][0].op != DEQUANTISE:
        return None
    scales = _trace(readers[0][0], 1)
    is_one = scales is not None and scales.tensor is not None and math.prod(scales.tensor.dims) == 1
    return readers[0][0] if is_one else None


def _open_operand(visit: Visit, position: int) -> Operand | None:
    trace = _trace(visit, position)
    return Operand(trace, visit, position) if trace is not None and trace.tensor is not None else None


def _trace(visit: Visit, position: int) -> Trace | None:
    inputs = visit.node.input
    if position >= len(inputs) or not inputs[position]:
        return None
    trace = trace_constant(visit.scope, inputs[position])
    return trace if trace is not None and not trace.blocked and all(s.op == "Identity" for s in trace.steps) else None


def _find_product_scales(visit: Visit) -> Operand | None:
    """Return the scale of a product of codes: on its way to a float it is multiplied by that of X times that of W."""
    current = visit
    for _ in range(_STEPS):
        readers = current.scope.readers.get(next(iter(current.node.output), ""), ())
        if len(readers) != 1:
            return None
        current, position = readers[0]
        if current.op == "Mul":
            return _pick_constant(current, 1 - position)
        if current.op not in {"Cast", "Reshape"}:
            return None
    return None


def _pick_constant(product: Visit, position: int) -> Operand | None:
    made_by = product.scope.producer(product.node.input[position])
    if not isinstance(made_by, Visit):
        trace = trace_constant(product.scope, product.node.input[position])
        return Operand(trace, product, position) if trace is not None and trace.tensor is not None else None
    if made_by.op != "Mul":
        return None
    constant = [each for position in (0, 1) if (each := _open_operand(made_by, position)) is not None]
    is_own = len(made_by.scope.readers.get(made_by.node.output[0], ())) == 1
    return replace(constant[0], is_own=is_own) if len(constant) == 1 else None
