"""Experts of a mixture in an ONNX graph: matrices of one tensor `(experts, ...)`, of which the graph picks some.

Exporters leave a Gather before a product; onnxruntime has the operator MoE for all of it. How an expert's matrix lies
is what the product or the operator says, never a guess from a shape; where neither tells, the sites say so (LF447).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from loraformat.adapter import SlotKind
from loraformat.bases._onnx.names import NODE_NAME, find_repeated
from loraformat.bases._onnx.operands import QMOE
from loraformat.bases._onnx.packs import DOWN, GATE_UP, KNOWN, MEMBERS, Pack, name_by_shape, name_pack
from loraformat.bases._onnx.picks import (
    Product,
    find_arrangement,
    find_product,
    pick_expert,
    trace_packed,
)
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.traces import Trace, trace_constant
from loraformat.bases._onnx.uses import Use, read_attribute, read_expert_bits
from loraformat.limits import MAX_EXPERTS
from loraformat.spans import Part

Lines = tuple[int, int, int]

_PICKING: Final = frozenset({"Gather", "GatherND", "Slice"})
_OPERATORS: Final = {"com.microsoft.MoE": (2, 4, 6), QMOE: (2, 5, 8)}
"""Operators to the inputs with fc1, fc2 and fc3."""
_FLOAT32: Final = 1
HALVES: Final = "halves"
TURNS: Final = "turns"
_FUSIONS: Final = {1: TURNS, 2: HALVES}
"""How the operator MoE has gate and up in its first weight, by `swiglu_fusion`."""


def find_experts(visits: Iterable[Visit]) -> list[RawSite]:
    """Return a site for every expert of every packed tensor, and for gate and up of those that hold both."""
    packs = name_by_shape([pack for visit in visits for pack in _find_packs(visit)])
    by_tensor: dict[int, list[Pack]] = defaultdict(list)
    for pack in packs:
        by_tensor[id(pack.trace.tensor)].append(pack)
    repeated = find_repeated(pack.module for pack in packs if pack.evidence == NODE_NAME)
    return [
        replace(site, repeated=pack.evidence == NODE_NAME and pack.module in repeated)
        for group in by_tensor.values()
        for pack in group
        for site in _open(pack, group)
    ]


def _find_packs(visit: Visit) -> Iterator[Pack]:
    if visit.op in _OPERATORS:
        yield from _read_operator(visit)
        return
    places = (0,) if visit.op in _PICKING else (1, 0) if visit.op == "MatMul" else ()
    for position in places:
        trace = trace_packed(visit, position)
        if trace is None or trace.tensor is None or not 0 < trace.tensor.dims[0] <= MAX_EXPERTS:
            continue
        expert = pick_expert(visit, trace.tensor.dims[0])
        product = find_product(visit, position)
        if product is None or isinstance(expert, str):
            return
        pack = name_pack(Pack(visit, position, trace, product, expert))
        arrangement = find_arrangement(product.visit) if product.visit is not None else ""
        yield replace(pack, stored=arrangement, own=arrangement)
        return


# --- the operator of onnxruntime -------------------------------------------------------------------------------------


def _read_operator(visit: Visit) -> Iterator[Pack]:
    """Yield the weights of MoE, fc1, fc2 and fc3: `(experts, out, in)`, up to onnxruntime 1.22 `(experts, in, out)`."""
    fusion = int(read_attribute(visit.node, "swiglu_fusion", 0))
    places = _OPERATORS[visit.op]
    first = GATE_UP if fusion in _FUSIONS else MEMBERS[0] if trace_packed(visit, places[2]) is not None else ""
    for position, role in zip(places, (first, DOWN if first else "", MEMBERS[1]), strict=True):
        trace = trace_packed(visit, position)
        if trace is not None and trace.tensor is not None and 0 < trace.tensor.dims[0] <= MAX_EXPERTS:
            yield from _read_layouts(visit, position, trace, fusion, role)


def _read_layouts(visit: Visit, position: int, trace: Trace, fusion: int, role: str) -> Iterator[Pack]:
    """Yield a weight in the layout that the operator has, or in both that it has had."""
    is_coded = visit.op == QMOE
    readings = (False,) if fusion in _FUSIONS or is_coded else (False, True)
    bits = read_expert_bits(visit.node, position) if is_coded else 8
    refusal, doubt = _judge_codes(visit, position, bits) if is_coded else ("", _find_doubt(trace, readings))
    for turned in readings:
        product = Product(None, turned, refusal=refusal, doubt=doubt)
        pack = name_pack(Pack(visit, position, trace, product, None, bits=8 if refusal else bits))
        named = pack.parameter in KNOWN
        yield replace(
            pack,
            module=pack.module if named or not pack.module else f"{pack.module}.experts",
            parameter=pack.parameter if named else role,
            stored=_FUSIONS.get(fusion, ""),
            own=_find_own(visit, fusion),
            folded=_GEGLU
            if _read_text(visit, "activation_type") == "geglu" and position == _OPERATORS[visit.op][1]
            else "",
        )


def _judge_codes(visit: Visit, position: int, bits: int) -> tuple[str, str]:
    """Return why nothing can be merged into the codes of a QMoE, and why it is not known how they lie.

    Codes laid out for CUDA's kernels have the shape of any others and are the default there, but such kernels have no
    scales of float32. Of 4 bits, all codes are compared with the checkpoint's numbers.
    """
    quant = _read_text(visit, "quant_type") or "int"
    if quant != "int" or bits not in (4, 8):
        return f"the operator QMoE with codes of {bits} bits, quant_type {quant!r}", ""
    scales = trace_constant(visit.scope, visit.node.input[position + 1])
    is_float32 = scales is not None and scales.tensor is not None and scales.tensor.data_type == _FLOAT32
    prepacked = int(read_attribute(visit.node, "weights_prepacked", -1))
    if prepacked == 0 or (prepacked < 0 and (bits == 4 or is_float32)):
        return "", ""
    return "", f"codes of a QMoE that may be laid out for CUDA's kernels (weights_prepacked is {prepacked}, not 0)"


def _read_text(visit: Visit, name: str) -> str:
    return next((a.s.decode("utf-8", "replace") for a in visit.node.attribute if a.name == name), "")


_GEGLU: Final = "the builder multiplies it by a scale for each expert (Gemma 4)"


def _find_doubt(trace: Trace, readings: Sequence[bool]) -> str:
    rows, columns = trace.tensor.dims[1:] if trace.tensor is not None else (0, 1)
    if len(readings) == 1 or rows != columns:
        return ""
    return f"square experts, {rows} by {columns}, of an operator that has changed which side is the input"


def _find_own(visit: Visit, fusion: int) -> str:
    """Return how gate and up lie in the checkpoint's parameter.

    Only GPT-OSS has them take turns, and only its activation adds one to up (`activation_beta`); the builder puts the
    halves of others into turns.
    """
    if fusion not in _FUSIONS:
        return ""
    return TURNS if float(read_attribute(visit.node, "activation_beta", 0.0)) == 1 else HALVES


# --- sites -----------------------------------------------------------------------------------------------------------


def _open(pack: Pack, group: Sequence[Pack]) -> Iterator[RawSite]:
    """Yield the sites of one pack; `group` is all that read its tensor."""
    experts = range(pack.dims[0]) if pack.expert is None else [pack.expert]
    named = pack.module and pack.parameter
    for expert in experts:
        apart = frozenset(other.id for other in group if other.expert not in (None, expert))
        for name, lines, section in _list_members(pack):
            yield RawSite(
                pack.visit,
                pack.position,
                pack.trace,
                Use({SlotKind.LINEAR: pack.product.turned}, pack.product.divisor, pack.product.refusal),
                f"{pack.module}.{expert}.{name}" if named else "",
                f"packed experts, {pack.evidence}" if named else "",
                pack.folded,
                section=section,
                part=_place(pack, expert, lines),
                apart=apart,
                doubt=pack.product.doubt,
            )


def _list_members(pack: Pack) -> Iterator[tuple[str, Lines, tuple[int, int] | None]]:
    """Yield what an expert's matrix holds: name, rows of its `(out, in)`, and which rows of the module these are."""
    rows = pack.shape[0]
    half = rows // 2
    arranged = {HALVES: ((0, half, 1), (half, rows, 1)), TURNS: ((0, rows, 2), (1, rows, 2)), "": ()}[pack.stored]
    if pack.parameter != GATE_UP or rows % 2:
        yield pack.parameter, (0, rows, 1), None
        return
    if pack.stored == pack.own:
        yield GATE_UP, (0, rows, 1), None
    else:
        for lines, section in zip(arranged, ((0, half), (half, rows)), strict=True):
            yield GATE_UP, lines, section
    for name, lines in zip(MEMBERS, arranged, strict=False):
        yield name, lines, None


def _place(pack: Pack, expert: int, lines: Lines) -> Part:
    """Return where some rows of an expert's `(out, in)` lie in the stored tensor."""
    experts, rows, columns = pack.dims
    start = expert * rows
    if pack.turned:
        return Part((experts * rows, columns), (start, start + rows, 1), lines)
    own = (start + lines[0], start + lines[1], lines[2])
    return Part((experts * rows, columns), own, (0, columns, 1))
