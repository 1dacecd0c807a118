"""Operators on codes as what they stand for, in a parsed graph: floats are made of codes, and codes of the result.

What an adapter adds can be put beside the floats.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Final

from loraformat.bases._onnx.float_graph import compute_in_floats
from loraformat.bases._onnx.ranges import HANDING_ON, QUANTISED
from loraformat.bases._onnx.scopes import name_operator

if TYPE_CHECKING:
    import onnx

_CODES: Final = "#codes"
_DEQUANTISE: Final = "DequantizeLinear"


def open_codes(graph: "onnx.GraphProto", tensors: Set[str]) -> None:
    """Have a main graph compute in floats what reads the codes of these tensors, or rows of them, where it can.

    Scales and zero points stay, and so do the codes between other operators. Rows that are looked up become floats
    before anything else reads them.
    """
    weights, rows = set(tensors), set[str]()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        known = weights if weights.intersection(node.input[:1]) else rows if rows.intersection(node.input[:1]) else None
        if known is not None and node.op_type in HANDING_ON:
            (rows if node.op_type == "Gather" else known).update(node.output)
        factors = _list_codes(node)
        opened = open_operator(node, set(node.input)) if not (weights | rows).isdisjoint(factors) else None
        nodes += [node] if opened is None else opened
    nodes = list(_lift(nodes, weights, rows))
    if nodes != list(graph.node):
        del graph.node[:], graph.value_info[:]
        graph.node.extend(nodes)


def _list_codes(node: "onnx.NodeProto") -> list[str]:
    """Return the codes that an operator on codes reads: what it multiplies by lies at its fourth input."""
    entry = QUANTISED.get(name_operator(node))
    if entry is None or entry.result < 0 or node.op_type == "QuantizeLinear":
        return []
    own = [node.input[scale - 1] for scale in entry.list_factors(len(node.input))]
    return [*own, *node.input[3:4]]


def open_operator(node: "onnx.NodeProto", codes: Set[str]) -> "list[onnx.NodeProto] | None":
    """Return what computes in floats what an operator on codes does; None for one that is not known.

    Args:
        node: the operator.
        codes: which of its factors are codes; others are floats already.
    """
    from onnx import helper

    entry, output = QUANTISED[name_operator(node)], node.output[0]
    numbers = [name for name in node.input[entry.result : entry.result + 2] if name]
    raw = f"{output}#float" if numbers else output
    made = compute_in_floats(node, raw, codes)
    if made is None or not numbers:
        return made
    return [*made, helper.make_node("QuantizeLinear", [raw, *numbers], [output], f"{node.name}#round")]


def _lift(nodes: "Sequence[onnx.NodeProto]", weights: Set[str], rows: Set[str]) -> "Iterator[onnx.NodeProto]":
    """Yield the nodes, with what dequantises rows right behind the lookup instead of further down."""
    from onnx import helper

    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    lifted: set[str] = set()
    for node in nodes:
        found = _find_dequantising(node, readers) if node.op_type == "Gather" and node.input[0] in weights else None
        if found is not None:
            output = node.output[0]
            lifted |= _list_handed(output, readers)
            node.output[0] = f"{output}{_CODES}"
            yield node
            inputs, domain = [node.output[0], *found.input[1:]], found.domain
            yield helper.make_node(_DEQUANTISE, inputs, [output], f"{output}{_CODES}", domain=domain)
        elif node.op_type == _DEQUANTISE and node.input[0] in lifted:
            yield helper.make_node("Identity", [node.input[0]], [node.output[0]], node.name)
        else:
            yield node


def _find_dequantising(
    lookup: "onnx.NodeProto", readers: "Mapping[str, Sequence[onnx.NodeProto]]"
) -> "onnx.NodeProto | None":
    """Return one of the nodes that make floats of looked-up codes, all with the same scale; None for other readers."""
    values = _list_handed(lookup.output[0], readers)
    ends = [node for value in values for node in readers.get(value, ()) if not _hands_on(node, value)]
    numbers = {(node.op_type, *node.input[1:]) for node in ends}
    return ends[0] if len(numbers) == 1 and ends[0].op_type == _DEQUANTISE else None


def _list_handed(value: str, readers: "Mapping[str, Sequence[onnx.NodeProto]]") -> set[str]:
    """Return a value and what it is handed on as."""
    found, pending = {value}, [value]
    while pending:
        current = pending.pop()
        made = {name for node in readers.get(current, ()) if _hands_on(node, current) for name in node.output} - found
        found |= made
        pending += made
    return found


def _hands_on(node: "onnx.NodeProto", value: str) -> bool:
    return node.op_type in HANDING_ON and node.input[0] == value
