"""Where the graph has what belongs to the codes of a quantised weight: scales, zero points, a bias in their steps."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loraformat.bases._onnx.ranges import HANDING_ON, QUANTISED
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.traces import Trace, trace_constant

DEQUANTISE: Final = "DequantizeLinear"
MATMUL_NBITS: Final = "com.microsoft.MatMulNBits"
MATMUL_BNB4: Final = "com.microsoft.MatMulBnb4"
GATHER: Final = "com.microsoft.GatherBlockQuantized"
ATTENTION: Final = "com.microsoft.QAttention"
QMOE: Final = "com.microsoft.QMoE"
INTEGER_PRODUCTS: Final = frozenset({"MatMulInteger", "ConvInteger"})
CODE_ENDING: Final = re.compile(r"(?:(?:_DQ)?_Q\d(?:G\d+)?|_Bnb4|_DQ|_quantized)$")
"""What quantisers add to the name of a weight."""
_FORMS: Final = frozenset({2, 3, 4, 5, 21, 22, 25, 26, 17, 18, 19, 20})
"""Whole numbers of 8, 16, 4 and 2 bits and the floats of 8 bits, as ONNX numbers them."""
_NO_INPUT: Final = 1 << 16
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
    MATMUL_BNB4: Operands(2, _NO_INPUT),
    GATHER: Operands(2, 3),
    ATTENTION: Operands(4, 7),
}
EXPERT_OPERANDS: Final[Mapping[int, Operands]] = {2: Operands(3, 11), 5: Operands(6, 12), 8: Operands(9, 13)}
"""The same for QMoE, by the input with the codes: fc1, fc2, fc3."""


@dataclass(frozen=True, slots=True)
class Operand:
    """Where scales or zero points are read that belong to a site's codes.

    Attributes:
        trace: where they are.
        places: the nodes that read them for this site, each with which input of it.
        is_own: whether what the nodes make of them is for this site alone.
    """

    trace: Trace
    places: tuple[tuple[Visit, int], ...]
    is_own: bool = True

    @property
    def readers(self) -> frozenset[Visit]:
        """The nodes alone."""
        return frozenset(visit for visit, _ in self.places)


def find_operands(raw: RawSite) -> Mapping[str, Operand]:
    """Return where scales and zero points of a site's codes are read, by role; nothing for weights stored as they are.

    There are no `scales` where the graph has none that are constant.
    """
    tensor = raw.trace.tensor
    if tensor is None or tensor.data_type not in _FORMS:
        return {}
    count, holder = find_holder(raw)
    if not count and holder is not raw.visit:
        return find_lookup_operands(raw.visit)
    operands = EXPERT_OPERANDS.get(raw.position) if holder.op == QMOE else OPERANDS.get(holder.op)
    scales = _open_operand(holder, operands.scales) if operands else _find_product_scales(holder)
    zeros = _open_operand(holder, operands.zeros if operands else 3)
    return {role: each for role, each in (("scales", scales), ("zero_points", zeros)) if each is not None}


def find_holder(raw: RawSite) -> tuple[int, Visit]:
    """Return how many nodes on the way to a site dequantise, and the node that scales and zero points belong to.

    Codes that are looked up have their scale where they are read afterwards: the first such node is returned.
    """
    holders = [step for step in raw.trace.steps if step.op == DEQUANTISE]
    if holders:
        return len(holders), holders[0]
    scales = find_lookup_operands(raw.visit).get("scales")
    return 0, scales.places[0][0] if scales is not None else raw.visit


def find_lookup_operands(visit: Visit) -> Mapping[str, Operand]:
    """Return scale and zero point of codes that a Gather looks up; nothing where their readers differ in them."""
    places = list_code_readers(visit) if visit.op == "Gather" else ()
    scales, zeros = (_open_common(places, ahead) for ahead in (1, 2))
    if scales is None or scales.trace.tensor is None or math.prod(scales.trace.tensor.dims) != 1:
        return {}
    if zeros is None:
        is_without = all(_is_left_out(reader, position + 2) for reader, position in places)
        return {"scales": scales} if is_without else {}
    return {"scales": scales, "zero_points": zeros}


def list_code_readers(visit: Visit) -> Sequence[tuple[Visit, int]]:
    """Return what reads the codes that a node hands on, and at which input; nothing if they have no scale somewhere.

    Every operator on codes has scale and zero point of what it reads at the two inputs after it.
    """
    found: list[tuple[Visit, int]] = []
    pending, seen = [visit.node.output[0]], set[str]()
    while pending:
        name = pending.pop()
        if name in visit.scope.outputs or name in seen:
            return ()
        seen.add(name)
        for reader, position in visit.scope.readers.get(name, ()):
            known = QUANTISED.get(reader.op)
            if known is not None and position + 1 in known.list_factors(len(reader.node.input)):
                found.append((reader, position))
            elif reader.op in HANDING_ON and position == 0 and reader.scope is visit.scope:
                pending.append(reader.node.output[0])
            else:
                return ()
    return found


def _open_common(places: Sequence[tuple[Visit, int]], ahead: int) -> Operand | None:
    """Return the constant so many inputs ahead of each place; None where there is none, or not the same."""
    opened = [_open_operand(visit, position + ahead) for visit, position in places]
    whole = [each for each in opened if each is not None]
    if not opened or len(whole) < len(opened) or len({(each.trace.scope, each.trace.name) for each in whole}) > 1:
        return None
    return replace(whole[0], places=tuple(place for each in whole for place in each.places))


def _is_left_out(visit: Visit, position: int) -> bool:
    return position >= len(visit.node.input) or not visit.node.input[position]


def _open_operand(visit: Visit, position: int) -> Operand | None:
    trace = _trace(visit, position)
    return Operand(trace, ((visit, position),)) if trace is not None and trace.tensor is not None else None


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
    if position >= len(product.node.input):
        return None
    made_by = product.scope.producer(product.node.input[position])
    if not isinstance(made_by, Visit):
        trace = trace_constant(product.scope, product.node.input[position])
        return Operand(trace, ((product, position),)) if trace is not None and trace.tensor is not None else None
    if made_by.op != "Mul":
        return None
    constant = [each for position in (0, 1) if (each := _open_operand(made_by, position)) is not None]
    is_own = len(made_by.scope.readers.get(made_by.node.output[0], ())) == 1
    return replace(constant[0], is_own=is_own) if len(constant) == 1 else None
