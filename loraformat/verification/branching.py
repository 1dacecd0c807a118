"""The change of a weight computed beside it, in a parsed ONNX graph.

Every node that reads a changed weight gets a second node beside it, the same with the change in the place of the
weight, and the two results are added. An operator that is not linear in its weights reads the sum of both.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

_PASSING: Final = frozenset(
    {"Identity", "Cast", "Transpose", "DequantizeLinear", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}
)
_NBITS: Final = "MatMulNBits"
_INTEGER: Final = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
"""Operators on codes that give whole numbers, and those that do the same with floats."""
_TABLE: Final = "GatherBlockQuantized"
_LINEAR: Final = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "Conv": (1,),
    "Gather": (0,),
    "FusedMatMul": (0, 1),
    _TABLE: (0,),
    _NBITS: (1,),
    **dict.fromkeys(_INTEGER, (1,)),
}
"""Operators whose result is linear in a weight, and the inputs where it can be; their other inputs but X are added."""
_MIXTURE: Final = {"MoE": (2, 4, 6)}
"""Operators that are not linear in their weights, and the inputs where these are."""
FLOAT: Final = 1
"""float32, as onnx numbers it."""
_NONE: Final[Mapping[str, str]] = MappingProxyType({})
MARK: Final = "#change"
"""What the names of new inputs end with, and a number."""


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one stored tensor.

    Attributes:
        tensor: the tensor's name in the graph.
        shape: its dimensions as the operator reads them.
        form: number form in which the operator reads it, as onnx numbers them.
        delta: the change, as a matrix of float32, in the stored orientation.
    """

    tensor: str
    shape: tuple[int, ...]
    form: int
    delta: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Reader:
    """A node that applies a weight, and how to compute the change beside it.

    Attributes:
        total: the node to whose output the change is added: itself, or what makes a float of its whole numbers.
        beside: the same operation on the change, which it reads as `MARK`; without an output yet. None where the
            change is added to what the node reads.
        flipped: whether the change is to be transposed.
        form: number form in which it is read.
        place: the input with the weight, where there is nothing beside the node.
    """

    total: "onnx.NodeProto"
    beside: "onnx.NodeProto | None"
    flipped: bool
    form: int
    place: int = 0


def add_branches(
    model: "onnx.ModelProto", changes: Sequence[Change], floats: Mapping[str, str] = _NONE
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Add to a model what computes changes apart; yield the new inputs and their values.

    Args:
        model: the model.
        changes: what changes.
        floats: values that stand for tensors, by the tensors' names; others stand for themselves.
    """
    from onnx import helper

    graph = model.graph
    nodes, known = list(graph.node), {change.tensor for change in changes}
    forms = _list_forms(graph)
    for change in changes:
        readers = list(_find_readers(nodes, change, known, floats))
        if not readers and forms.get(change.tensor) == change.form:
            name = f"{change.tensor}{MARK}0"
            if _add_at_source(nodes, change, name, known):
                graph.input.append(helper.make_tensor_value_info(name, FLOAT, change.shape))
                yield name, change.delta.reshape(change.shape)
        for count, reader in enumerate(readers):
            name = f"{change.tensor}{MARK}{count}"
            values = change.delta.reshape(change.shape)
            values = np.ascontiguousarray(values.T if reader.flipped else values)
            index = next(index for index, each in enumerate(nodes) if each is reader.total)
            nodes[index : index + 1] = _branch(reader, name)
            graph.input.append(helper.make_tensor_value_info(name, FLOAT, values.shape))
            yield name, values
    del graph.node[:]
    graph.node.extend(nodes)


def _list_forms(graph: "onnx.GraphProto") -> dict[str, int]:
    """Return the number forms of the main graph's tensors, of its Constants and of copies."""
    forms = {each.name: each.data_type for each in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            forms[node.output[0]] = next((each.t.data_type for each in node.attribute), 0)
        elif node.op_type == "Identity" and node.input[0] in forms:
            forms[node.output[0]] = forms[node.input[0]]
    return forms


def _add_at_source(nodes: "list[onnx.NodeProto]", change: Change, name: str, known: Set[str]) -> bool:
    """Have all nodes that read a tensor, but for its copies, read its sum with the change; say if there are any."""
    from onnx import helper

    total, wide = f"{name}#sum", change.tensor
    readers = [node for node in nodes if known.isdisjoint(node.output)]
    places = [(node, at) for node in readers for at, read in enumerate(node.input) if read == change.tensor]
    for node, at in places:
        node.input[at] = total
    made = [helper.make_node("Add", [wide, name], [total], total)]
    if change.form != FLOAT:
        wide = f"{name}#wide"
        made = [
            helper.make_node("Cast", [change.tensor], [wide], wide, to=FLOAT),
            helper.make_node("Add", [wide, name], [f"{name}#exact"], f"{name}#exact"),
            helper.make_node("Cast", [f"{name}#exact"], [total], total, to=change.form),
        ]
    start = next((index + 1 for index, node in enumerate(nodes) if change.tensor in node.output), 0)
    nodes[start:start] = made
    return bool(places)


def _find_readers(
    nodes: "Sequence[onnx.NodeProto]", change: Change, known: Set[str], floats: Mapping[str, str]
) -> Iterator[_Reader]:
    """Yield the nodes that apply a tensor, directly or through what only hands it on; copies change by themselves."""
    values = {floats.get(change.tensor, change.tensor): (False, change.form)}
    for node in nodes:
        if node.op_type in _PASSING and node.input and node.input[0] in values and known.isdisjoint(node.output):
            flipped, form = values[node.input[0]]
            form = next((each.i for each in node.attribute if each.name == "to"), form)
            values[node.output[0]] = (flipped ^ (node.op_type == "Transpose"), form)
            continue
        for position in _LINEAR.get(node.op_type, ()):
            if position < len(node.input) and node.input[position] in values and MARK not in node.name:
                reader = _read(nodes, node, position, *values[node.input[position]])
                if reader is not None:
                    yield reader
        for position in _MIXTURE.get(node.op_type, ()):
            if position < len(node.input) and node.input[position] in values:
                yield _Reader(node, None, *values[node.input[position]], position)


def _read(
    nodes: "Sequence[onnx.NodeProto]", node: "onnx.NodeProto", position: int, flipped: bool, form: int
) -> _Reader | None:
    from onnx import NodeProto, helper

    if node.op_type == _NBITS:
        return _Reader(node, helper.make_node("MatMul", [node.input[0], MARK], []), True, form)
    if node.op_type == _TABLE:
        return _Reader(node, helper.make_node("Gather", [MARK, node.input[1]], []), flipped, form)
    if node.op_type in _INTEGER:
        made_by = next((each for each in nodes if node.input[0] in each.output), None)
        total = _follow(nodes, node, ("Cast", "Mul"))
        if made_by is None or made_by.op_type != "DynamicQuantizeLinear" or total is None:
            return None
        plain = helper.make_node(_INTEGER[node.op_type], [made_by.input[0], MARK], [])
        plain.attribute.extend(node.attribute)
        return _Reader(total, plain, flipped, form)
    beside = NodeProto()
    beside.CopyFrom(node)
    del beside.input[2:], beside.output[:]
    beside.input[position] = MARK
    after = _follow(nodes, node, ("DequantizeLinear",)) if node.op_type == "Gather" else None
    return _Reader(after or node, beside, flipped, form)  # A table of codes is dequantised after the lookup.


def _follow(
    nodes: "Sequence[onnx.NodeProto]", node: "onnx.NodeProto", operators: Sequence[str]
) -> "onnx.NodeProto | None":
    """Return the last of a chain of operators that each read the one before."""
    for operator in operators:
        readers = [each for each in nodes if node.output[0] in each.input]
        if len(readers) != 1 or readers[0].op_type != operator:
            return None
        node = readers[0]
    return node


def _branch(reader: _Reader, name: str) -> "list[onnx.NodeProto]":
    """Return the node, what it makes of the change, and the sum of both under the name of the node's output."""
    from onnx import NodeProto, helper

    own = NodeProto()
    own.CopyFrom(reader.total)
    read = name if reader.form == FLOAT else f"{name}#{reader.form}"
    cast = [] if read == name else [helper.make_node("Cast", [name], [read], read, to=reader.form)]
    if reader.beside is None:
        return [*cast, *_add_before(own, reader.place, read)]
    beside = NodeProto()
    beside.CopyFrom(reader.beside)
    output = own.output[0]
    own.output[0] = f"{output}{name}#base"
    beside.input[list(beside.input).index(MARK)] = read
    beside.name = f"{own.name}{name}"
    beside.output.append(f"{output}{name}")
    total = helper.make_node("Add", [own.output[0], beside.output[0]], [output], f"{beside.name}#sum")
    return [own, *cast, beside, total]


def _add_before(own: "onnx.NodeProto", place: int, change: str) -> "list[onnx.NodeProto]":
    """Return what adds a change to the weight at an input of a node, and the node, which then reads the sum."""
    from onnx import helper

    weight, shape, shaped, total = own.input[place], f"{change}#shape", f"{change}#shaped", f"{change}#sum"
    own.input[place] = total
    return [
        helper.make_node("Shape", [weight], [shape], shape),
        helper.make_node("Reshape", [change, shape], [shaped], shaped),
        helper.make_node("Add", [weight, shaped], [total], total),
        own,
    ]
