"""Operators on codes, and what they become where the weight stands in floats: those on floats, with the same names."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from loraformat.bases._onnx.opened_codes import open_operator
from loraformat.bases._onnx.operands import DEQUANTISE, GATHER, MATMUL_BNB4, MATMUL_NBITS
from loraformat.bases._onnx.scopes import Visit
from loraformat.containers.onnx_file import NodeEdit

if TYPE_CHECKING:
    import onnx

Replacement: TypeAlias = "tuple[list[NodeEdit], list[Visit]] | None"
"""Edits, and nodes that go if nothing else reads what they make; None where it cannot be done."""

_SCALED: Final = ("Cast", "Mul")
_SECOND_CODES: Final = 3
"""The input of an operator on codes that has those of its weight."""
_INTEGERS: Final = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
"""Operators on codes that give whole numbers, and those that do the same with floats."""


def _drop_dequantising(visit: Visit, name: str) -> Replacement:
    if visit.node.output[0] == name:
        return [NodeEdit(visit.index, ())], []
    return [NodeEdit(visit.index, (_make(visit, "Identity", [name], visit.node.output[0]),))], []


def _replace_nbits(visit: Visit, name: str) -> Replacement:
    return _multiply(visit, visit, visit.node.input[0], name, 5), []


def _replace_lookup(visit: Visit, name: str) -> Replacement:
    return [NodeEdit(visit.index, (_make(visit, "Gather", [name, visit.node.input[1]], visit.node.output[0]),))], []


def _replace_codes_lookup(visit: Visit, name: str) -> Replacement:
    """Y = DequantizeLinear(Gather(W)): the lookup is one of floats, and what dequantises goes."""
    readers = visit.scope.readers.get(visit.node.output[0], ())
    if len(readers) != 1 or readers[0][0].op != DEQUANTISE:
        return None
    after, made = readers[0][0], _make(visit, "Gather", [name, visit.node.input[1]], "")
    made.output[0] = after.node.output[0]
    made.attribute.extend(visit.node.attribute)
    return [NodeEdit(visit.index, (made,)), NodeEdit(after.index, ())], []


def _replace_dynamic(visit: Visit, name: str) -> Replacement:
    return _multiply(visit, visit, visit.node.input[0], name, 4), []


def _replace_to_float(visit: Visit, name: str) -> Replacement:
    source = _find_quantising(visit)
    return (_multiply(visit, visit, source.node.input[0], name, 6), [source]) if source else None


def _replace_integer(visit: Visit, name: str) -> Replacement:
    """Y = Mul(Cast(op(xq, W)), sx·sw): the last node becomes the same operator on floats, the others go."""
    source, chain = _find_quantising(visit), [visit]
    for op in _SCALED:
        readers = chain[-1].scope.readers.get(chain[-1].node.output[0], ())
        if source is None or len(readers) != 1 or readers[0][0].op != op or chain[-1].node.output[0] in _outputs(visit):
            return None
        chain.append(readers[0][0])
    last, codes = chain[-1], chain[-2].node.output[0]
    other = next((each for each in last.node.input if each != codes), "")
    made_by = last.scope.producer(other)
    if source is None or not isinstance(made_by, Visit) or made_by.op != "Mul":
        return None
    made = _make(visit, _INTEGERS[visit.op], [source.node.input[0], name], last.node.output[0])
    made.attribute.extend(visit.node.attribute)
    edits = [*(NodeEdit(each.index, ()) for each in chain[:-1]), NodeEdit(last.index, (made,))]
    return edits, [made_by, source]


def _replace_static(visit: Visit, name: str) -> Replacement:
    """An operator on codes that rounds its result: X is dequantised, and the result of floats quantised as before."""
    from onnx import NodeProto

    node = NodeProto()
    node.CopyFrom(visit.node)
    node.input[_SECOND_CODES] = name
    made = open_operator(node, {node.input[0]})
    return ([NodeEdit(visit.index, tuple(made))], []) if made is not None else None


def _replace_attention(visit: Visit, name: str) -> Replacement:
    """Y = QAttention(xq, W): the same of floats, whose other inputs are the bias, the mask and the past."""
    source, inputs = _find_quantising(visit), [visit.read_input(position) for position in (2, 5, 8)]
    if source is None:
        return None
    while not inputs[-1]:
        inputs.pop()
    made = _make(visit, "Attention", [source.node.input[0], name, *inputs], visit.node.output[0])
    made.domain, made.output[:] = visit.node.domain, visit.node.output[:]
    made.attribute.extend(visit.node.attribute)
    return [NodeEdit(visit.index, (made,))], [source]


def _find_quantising(visit: Visit) -> Visit | None:
    """Return the DynamicQuantizeLinear that makes codes of the other factor."""
    made_by = visit.scope.producer(visit.node.input[0])
    return made_by if isinstance(made_by, Visit) and made_by.op == "DynamicQuantizeLinear" else None


def _outputs(visit: Visit) -> set[str]:
    return visit.scope.outputs


def _multiply(last: Visit, named: Visit, x: str, name: str, bias: int) -> list[NodeEdit]:
    """Return the edit after which a node is X·W, and plus the bias at its input `bias` where it has one."""
    output, inputs = last.node.output[0], last.node.input
    added = inputs[bias] if 0 < bias < len(inputs) else ""
    product = _make(named, "MatMul", [x, name], f"{output}_product" if added else output)
    nodes = [product]
    if added:
        total = _make(named, "Add", [product.output[0], added], output)
        total.name = f"{total.name}_bias"
        nodes.append(total)
    return [NodeEdit(last.index, tuple(nodes))]


def _make(like: Visit, op: str, inputs: Sequence[str], output: str) -> "onnx.NodeProto":
    """Return a node with the name and the notes of another."""
    from onnx import helper

    node = helper.make_node(op, list(inputs), [output], name=like.node.name, doc_string=like.node.doc_string)
    node.metadata_props.extend(like.node.metadata_props)
    return node


REPLACED: Final[Mapping[str, Callable[[Visit, str], Replacement]]] = {
    DEQUANTISE: _drop_dequantising,
    MATMUL_NBITS: _replace_nbits,
    MATMUL_BNB4: _replace_nbits,
    GATHER: _replace_lookup,
    "Gather": _replace_codes_lookup,
    "com.microsoft.DynamicQuantizeMatMul": _replace_dynamic,
    "com.microsoft.MatMulIntegerToFloat": _replace_to_float,
    **dict.fromkeys(_INTEGERS, _replace_integer),
    **dict.fromkeys(("QLinearMatMul", "QLinearConv", "com.microsoft.QGemm"), _replace_static),
    "com.microsoft.QAttention": _replace_attention,
}
"""Operators on codes, and what they become where the weight stands in floats."""
