"""Experts in codes as what they stand for, in a parsed graph: QMoE becomes MoE, which reads floats made of the codes.

Codes of 8 bits are bytes, those of 4 bits lie two to a byte, the lower half first. A scale is that of a row of an
expert, or of a block of it.
"""

from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loraformat.bases._onnx.operands import EXPERT_OPERANDS, QMOE, Operands
from loraformat.bases._onnx.uses import read_attribute, read_expert_bits

if TYPE_CHECKING:
    import onnx

_INPUTS: Final = {0: 0, 1: 1, 2: 2, 4: 3, 5: 4, 7: 5, 8: 6, 10: 7}
"""Inputs of QMoE to those of MoE that are the same; codes become floats."""
_ROUTER_WEIGHTS: Final = 14
"""An input that MoE does not have: how much each expert counts, where it is not what chooses them."""
_OF_CODES: Final = frozenset({"block_size", "quant_type", "weights_prepacked", "accuracy_level"})
_BITS: Final = "expert_weight_bits"
_SUFFIX: Final = "#experts"


def open_experts(graph: "onnx.GraphProto", tensors: Set[str]) -> dict[str, str]:
    """Have a main graph compute in floats what reads these codes of experts; return the floats' names by the codes'."""
    held = {each.name: each for each in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    made: dict[str, str] = {}
    for node in graph.node:
        codes = [node.input[position] for position in _list_operands(node)]
        known = all(name in held for name in _list_numbers(node))
        if tensors.isdisjoint(codes) or not known or has_router_weights(node):
            nodes.append(node)
            continue
        for position in _list_operands(node):
            if node.input[position] not in made:
                nodes += _decode(graph, held, node, position)
                made[node.input[position]] = f"{node.input[position]}{_SUFFIX}"
        nodes.append(make_mixture(node, made))
    if made:
        del graph.node[:], graph.value_info[:]
        graph.node.extend(nodes)
    return made


def _list_operands(node: "onnx.NodeProto") -> dict[int, Operands]:
    """Return the inputs of a node that are codes of experts, and where their scales and zero points are."""
    if f"{node.domain}.{node.op_type}" != QMOE:
        return {}
    return {place: each for place, each in EXPERT_OPERANDS.items() if place < len(node.input) and node.input[place]}


def _list_numbers(node: "onnx.NodeProto") -> Iterator[str]:
    """Yield the codes, scales and zero points that a QMoE reads."""
    for position, operands in _list_operands(node).items():
        yield node.input[position]
        yield node.input[operands.scales]
        if operands.zeros < len(node.input) and node.input[operands.zeros]:
            yield node.input[operands.zeros]


def has_router_weights(node: "onnx.NodeProto") -> bool:
    """Say whether a QMoE has inputs that MoE does not have."""
    return any(node.input[_ROUTER_WEIGHTS:])


def make_mixture(node: "onnx.NodeProto", floats: Mapping[str, str]) -> "onnx.NodeProto":
    """Return the MoE that computes what a QMoE does, with floats by the names of codes."""
    from onnx import helper

    inputs = ["" for _ in range(max(_INPUTS.values()) + 1)]
    for position, other in _INPUTS.items():
        if position < len(node.input):
            inputs[other] = floats.get(node.input[position], node.input[position])
    while not inputs[-1]:
        inputs.pop()
    made = helper.make_node("MoE", inputs, list(node.output), node.name, domain=node.domain)
    made.attribute.extend(each for each in node.attribute if each.name not in _OF_CODES and _BITS not in each.name)
    return made


def _decode(
    graph: "onnx.GraphProto", held: "Mapping[str, onnx.TensorProto]", node: "onnx.NodeProto", position: int
) -> "list[onnx.NodeProto]":
    """Return what makes floats of codes `(experts, out, in)`; numbers that it needs are put into the graph."""
    operands, bits = _list_operands(node)[position], read_expert_bits(node, position)
    codes, scales = held[node.input[position]], held[node.input[operands.scales]]
    zeros = node.input[operands.zeros] if operands.zeros < len(node.input) else ""
    experts, rows, columns = codes.dims[0], codes.dims[1], codes.dims[2] * 8 // bits
    blocks = scales.dims[2] if len(scales.dims) > 2 else 1
    block = read_attribute(node, "block_size", columns) if blocks > 1 else columns
    chain = _Chain(graph, f"{codes.name}{_SUFFIX}")
    value = chain.unpack(codes.name, bits)
    if blocks * block > columns:
        value = chain.add("Pad", value, chain.hold([0, 0, 0, 0, 0, blocks * block - columns]))
    value = chain.add("Reshape", value, chain.hold([-1, block]))
    flat, count = chain.hold([-1]), experts * rows * blocks
    middle = _flatten_zeros(chain, held[zeros], bits, blocks) if zeros else ""
    middle = middle or chain.hold(np.full(count, 1 << (bits - 1), np.uint8))
    value = chain.add("DequantizeLinear", value, chain.add("Reshape", scales.name, flat), middle, axis=0)
    chain.add("Reshape", value, chain.hold([experts, rows, blocks * block]))
    if blocks * block > columns:
        chain.cut(chain.nodes[-1].output[0], columns)
    chain.nodes[-1].output[0] = chain.name
    return chain.nodes


def _flatten_zeros(chain: "_Chain", zeros: "onnx.TensorProto", bits: int, blocks: int) -> str:
    """Return the name of zero points, one for a scale; the last byte of a row may be half empty."""
    apart = chain.unpack(zeros.name, bits)
    if bits == 4 and blocks % 2:
        apart = chain.cut(apart, blocks)
    return chain.add("Reshape", apart, chain.hold([-1]))


class _Chain:
    """Nodes that each read what another made, and the numbers that they need."""

    def __init__(self, graph: "onnx.GraphProto", name: str) -> None:
        self.graph, self.name = graph, name
        self.nodes: list[onnx.NodeProto] = []
        self._count = 0

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        from onnx import helper

        output = self._name()
        self.nodes.append(helper.make_node(op, list(inputs), [output], output, **attributes))
        return output

    def hold(self, numbers: Any) -> str:
        """Put numbers into the graph, int64 where they have no form, and return their name."""
        from onnx import numpy_helper

        array = numbers if isinstance(numbers, np.ndarray) else np.array(numbers, np.int64)
        self.graph.initializer.append(numpy_helper.from_array(array, name := self._name()))
        return name

    def cut(self, value: str, count: int) -> str:
        """Return the name of the first numbers along the last of three axes."""
        return self.add("Slice", value, *(self.hold([each]) for each in (0, count, 2)))

    def unpack(self, codes: str, bits: int) -> str:
        """Return the name of codes that have a byte each."""
        if bits == 8:
            return codes
        four, last = self.hold(np.array(4, np.uint8)), self.hold([-1])
        upper = self.add("BitShift", codes, four, direction="RIGHT")
        lower = self.add("BitShift", self.add("BitShift", codes, four, direction="LEFT"), four, direction="RIGHT")
        pairs = [self.add("Unsqueeze", each, last) for each in (lower, upper)]
        return self.add("Reshape", self.add("Concat", *pairs, axis=-1), self.hold([0, 0, -1]))

    def _name(self) -> str:
        self._count += 1
        return f"{self.name}{self._count}"
