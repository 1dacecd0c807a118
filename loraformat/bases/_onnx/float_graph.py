"""A graph with its activations in floats, so that their ranges can be measured: what quantises them does nothing.

Weights stay as they are, in codes that are dequantised. Operators on codes become those on floats. Quantisers leave out
a Relu where the first code stands for zero, which cuts off as much: there it is put back, and so is a Clip at 6.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from loraformat.bases import MeasuredValue
from loraformat.bases._onnx.ranges import FORMS, HANDING_ON, QUANTISED
from loraformat.bases._onnx.scopes import name_operator
from loraformat.bases._onnx.uses import read_attribute

if TYPE_CHECKING:
    import onnx

_Made: TypeAlias = "list[onnx.NodeProto]"
_Maker: TypeAlias = "Callable[[onnx.NodeProto, str, Set[str]], _Made]"
_BETWEEN: Final = frozenset({"QuantizeLinear", "DequantizeLinear"})
_DROPPED: Final = frozenset({"channels_last", "opset"})
_RAW: Final = "#float"
_CUT: Final = "#cut"
_CUTTING: Final = frozenset({"Relu", "Clip"})
_SIX: Final = 6.0
_NEAR: Final = 1e-3


def make_float_graph(graph: "onnx.GraphProto") -> list[MeasuredValue]:
    """Change a main graph in place; return whose ranges are measured. Each of these values is read by an Identity."""
    from onnx import helper

    held = {each.name: each for each in graph.initializer}
    codes = {name for name, each in held.items() if each.data_type in FORMS}
    nodes: list[onnx.NodeProto] = []
    measured: dict[str, str] = {}
    for node in graph.node:
        made = _convert(node, held, codes, measured)
        nodes += [node] if made is None else made
        if made is None and node.op_type in HANDING_ON and node.input and node.input[0] in codes:
            codes.update(node.output)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    _drop_unread(graph)
    known = {each.name for each in (*graph.input, *graph.output)}
    for value, scale in measured.items():
        if value not in known:
            graph.value_info.append(helper.make_tensor_value_info(value, held[scale].data_type, None))
    return list(_settle(nodes, measured))


def compute_in_floats(node: "onnx.NodeProto", result: str, codes: Set[str]) -> "_Made | None":
    """Return what makes the floats that an operator on codes rounds; None for one that is not known.

    Args:
        node: the operator.
        result: name of the floats.
        codes: which of its inputs are to be dequantised; others are floats.
    """
    maker = _FLOATS.get(name_operator(node))
    return maker(node, result, codes) if maker is not None else None


def _drop_unread(graph: "onnx.GraphProto") -> None:
    """Remove initializers that no node reads any more."""
    read: set[str] = set()
    pending = [graph]
    while pending:
        current = pending.pop()
        read.update(name for node in current.node for name in node.input)
        read.update(output.name for output in current.output)
        attributes = (attribute for node in current.node for attribute in node.attribute)
        pending += [inner for attribute in attributes for inner in (attribute.g, *attribute.graphs) if inner.node]
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _settle(nodes: "Sequence[onnx.NodeProto]", measured: Mapping[str, str]) -> Iterator[MeasuredValue]:
    """Yield the values, as onnxruntime's quantiser has them: before a Relu what is behind it."""
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    for value, scale in measured.items():
        end = value
        while len(readers[end]) == 1 and readers[end][0].op_type == "Identity":
            end = readers[end][0].output[0]
        behind = readers[end][0].output[0] if len(readers[end]) == 1 and readers[end][0].op_type in _CUTTING else ""
        yield MeasuredValue(behind if behind in measured else value, scale)


def _convert(
    node: "onnx.NodeProto", held: "Mapping[str, onnx.TensorProto]", codes: Set[str], measured: dict[str, str]
) -> "_Made | None":
    """Return what a node becomes; None for one that stays.

    Args:
        node: the node.
        held: the initializers.
        codes: values that are codes, since they come from constants.
        measured: takes the value whose range is measured, and its scale.
    """
    from onnx import helper

    op = name_operator(node)
    entry = QUANTISED.get(op)
    if entry is None or (entry.result >= 0 and node.input[entry.result] not in held):
        return None
    if op in _BETWEEN and node.input[0] in (*held, *codes):  # A constant stays one.
        return None
    if entry.result < 0:
        return [helper.make_node("Identity", [node.input[0]], [node.output[0]])]
    raw = node.input[0] if op == "QuantizeLinear" else f"{node.output[0]}{_RAW}"
    made = [] if op == "QuantizeLinear" else _FLOATS[op](node, raw, codes)
    scale, zero = (held.get(name) for name in node.input[entry.result : entry.result + 2])
    cut, value = _cut(raw, f"{node.output[0]}{_CUT}", scale, zero)
    measured[value] = node.input[entry.result]
    return [*made, *cut, helper.make_node("Identity", [value], [node.output[0]])]


def _cut(
    value: str, name: str, scale: "onnx.TensorProto | None", zero: "onnx.TensorProto | None"
) -> tuple["_Made", str]:
    """Return what cuts a value off where its first code stands for zero, and the name of what remains."""
    from onnx import helper, numpy_helper

    if scale is None or zero is None or zero.data_type not in FORMS:
        return [], value
    limits, found = np.iinfo(FORMS[zero.data_type]), numpy_helper.to_array(zero)
    if (found != limits.min).any():
        return [], value
    end = float(numpy_helper.to_array(scale).max()) * (int(limits.max) - int(limits.min))
    if abs(end - _SIX) > _NEAR:
        return [helper.make_node("Relu", [value], [name])], name
    ends = [np.array(each, numpy_helper.to_array(scale).dtype) for each in (0, _SIX)]
    names = [f"{name}{each:g}" for each in (0, _SIX)]
    held = [
        helper.make_node("Constant", [], [each], value=numpy_helper.from_array(end))
        for each, end in zip(names, ends, strict=True)
    ]
    return [*held, helper.make_node("Clip", [value, *names], [name])], name


def _plainly(op: str, *factors: int) -> _Maker:
    """Return what makes a node that does the same with floats, its factors being at these inputs."""

    def make(node: "onnx.NodeProto", raw: str, codes: Set[str]) -> _Made:
        before, names = _open_factors(node, factors, codes)
        made = _make(op, node, names, raw)
        made.attribute.extend(each for each in node.attribute if each.name not in _DROPPED)
        return [*before, made]

    return make


def _concatenate(node: "onnx.NodeProto", raw: str, codes: Set[str]) -> _Made:
    return _plainly("Concat", *range(2, len(node.input), 3))(node, raw, codes)


def _multiply_by_rows(node: "onnx.NodeProto", raw: str, codes: Set[str]) -> _Made:
    axis = 0 if read_attribute(node, "transB", 0) else 1
    before, names = _open_factors(node, (0, 3), codes, axis)
    bias, added = _dequantise_bias(node, 6)
    made = _make("Gemm", node, [*names, *added], raw)
    made.attribute.extend(node.attribute)
    return [*before, *bias, made]


def _convolve(node: "onnx.NodeProto", raw: str, codes: Set[str]) -> _Made:
    before, names = _open_factors(node, (0, 3), codes, 0)
    bias, added = _dequantise_bias(node, 8)
    made = _make("Conv", node, [*names, *added], raw)
    made.attribute.extend(node.attribute)
    return [*before, *bias, made]


def _open_factors(
    node: "onnx.NodeProto", positions: Iterable[int], codes: Set[str], axis: int = 1
) -> tuple[_Made, list[str]]:
    """Return the factors at these inputs in floats: activations as they are, and what makes floats of constants."""
    made: list[onnx.NodeProto] = []
    names = []
    for position in positions:
        name = node.input[position]
        if name in codes:
            before, name = _dequantise(node, position, axis)
            made += before
        names.append(name)
    return made, names


def _dequantise(node: "onnx.NodeProto", position: int, axis: int) -> tuple["_Made", str]:
    """Return what makes floats of the codes at an input, which scale and zero point follow."""
    from onnx import helper

    name = f"{node.output[0]}#{position}"
    codes = node.input[position : position + 3]
    return [helper.make_node("DequantizeLinear", list(codes), [name], axis=axis)], name


def _dequantise_bias(node: "onnx.NodeProto", position: int) -> tuple["_Made", list[str]]:
    """Return what makes floats of a bias in steps of the factors' scales."""
    from onnx import helper

    if position >= len(node.input) or not node.input[position]:
        return [], []
    step, name = f"{node.output[0]}#step", f"{node.output[0]}#bias"
    product = helper.make_node("Mul", [node.input[1], node.input[4]], [step])
    wide = helper.make_node("Cast", [node.input[position]], [f"{name}_counts"], to=1)
    return [product, wide, helper.make_node("Mul", [f"{name}_counts", step], [name])], [name]


def _make(op: str, node: "onnx.NodeProto", inputs: Iterable[str], output: str) -> "onnx.NodeProto":
    from onnx import helper

    return helper.make_node(op, list(inputs), [output], node.name)


_FLOATS: Final[Mapping[str, _Maker]] = {
    "QLinearMatMul": _plainly("MatMul", 0, 3),
    "QLinearConv": _convolve,
    "com.microsoft.QGemm": _multiply_by_rows,
    "com.microsoft.QLinearAdd": _plainly("Add", 0, 3),
    "com.microsoft.QLinearMul": _plainly("Mul", 0, 3),
    "com.microsoft.QLinearSigmoid": _plainly("Sigmoid", 0),
    "com.microsoft.QLinearLeakyRelu": _plainly("LeakyRelu", 0),
    "com.microsoft.QLinearSoftmax": _plainly("Softmax", 0),
    "com.microsoft.QLinearAveragePool": _plainly("AveragePool", 0),
    "com.microsoft.QLinearConcat": _concatenate,
    "com.microsoft.QLinearGlobalAveragePool": _plainly("GlobalAveragePool", 0),
}
