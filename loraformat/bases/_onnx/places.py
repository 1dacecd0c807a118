"""Where the nodes of an ONNX graph stand in the model's file, so that others can be put after them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraformat.containers._protobuf import LENGTH, Frame, Leaf, Reader, encode_bytes
from loraformat.images import Edit, Literal
from loraformat.spans import InputFile

if TYPE_CHECKING:
    import onnx

_GRAPH: Final = 7
_NODE: Final = 1
_INPUT: Final = 1
_OUTPUT: Final = 2
_ATTRIBUTE: Final = 5
_SUBGRAPHS: Final = frozenset({6, 11})
"""Fields of ModelProto, GraphProto, NodeProto and AttributeProto; the numbers are those of onnx.proto."""


@dataclass(frozen=True, slots=True)
class NodePlace:
    """Where a node stands.

    Attributes:
        graph: the graph around it.
        node: the node itself.
        inputs: the names of what it reads, in order.
        outputs: the names of what it makes, in order.
    """

    graph: Frame
    node: Frame
    inputs: tuple[Frame, ...]
    outputs: tuple[Frame, ...]

    def rename_output(self, position: int, name: str) -> Leaf:
        """Return the edit that gives one of its outputs another name."""
        frame = self.outputs[position]
        field = frame.field
        return Leaf(Edit(field.begin, field.end - field.begin, (Literal(name.encode()),)), frame)

    def add_input(self, position: int, name: str) -> Leaf:
        """Return the edit that gives it one input more, which it lacks or has left empty."""
        if position < len(self.inputs):
            frame = self.inputs[position]
            return Leaf(Edit(frame.field.begin, 0, (Literal(name.encode()),)), frame)
        data = encode_bytes(_INPUT, b"") * (position - len(self.inputs)) + encode_bytes(_INPUT, name.encode())
        return Leaf(Edit(self.inputs[-1].field.end, 0, (Literal(data),)), self.node)

    def remove(self) -> Leaf:
        """Return the edit that takes the node out."""
        field = self.node.field
        return Leaf(Edit(field.start, field.end - field.start, ()), self.graph)

    def add_after(self, node: "onnx.NodeProto") -> Leaf:
        """Return the edit that puts another node after it, and after those that were put there before."""
        data = encode_bytes(_NODE, node.SerializeToString(deterministic=True))
        return Leaf(Edit(self.node.field.end, 0, (Literal(data),)), self.graph)


class NodePlaces:
    """Finds nodes by the label of their graph, as `_onnx_scopes` has it, and their position in it.

    Args:
        file: the model's file, which `walk_model` has found sound.
        model: the skeleton: its nodes are those of the file, in order.
    """

    def __init__(self, file: InputFile, model: "onnx.ModelProto") -> None:
        self._reader = Reader(file)
        top = self._reader.fields(0, file.size_bytes)
        self.graph = next(Frame(field) for field in top if field.number == _GRAPH and field.wire == LENGTH)
        self._places: dict[tuple[str, int], NodePlace] = {}
        pending = [("graph", self.graph, model.graph)]
        while pending:
            pending += list(self._walk(*pending.pop()))

    def find(self, label: str, index: int) -> NodePlace:
        """Return where the node at `index` of the graph so labelled stands."""
        return self._places[label, index]

    def add_first(self, node: "onnx.NodeProto") -> Leaf:
        """Return the edit that puts another node before all of the main graph."""
        data = encode_bytes(_NODE, node.SerializeToString(deterministic=True))
        return Leaf(Edit(self.graph.field.begin, 0, (Literal(data),)), self.graph)

    def _walk(
        self, label: str, graph: Frame, proto: "onnx.GraphProto"
    ) -> "Iterator[tuple[str, Frame, onnx.GraphProto]]":
        """Note the nodes of one graph, and yield the graphs inside them."""
        for index, (frame, node) in enumerate(zip(self._inside(graph, _NODE), proto.node, strict=True)):
            inputs, outputs = (tuple(self._inside(frame, number)) for number in (_INPUT, _OUTPUT))
            self._places[label, index] = NodePlace(graph, frame, inputs, outputs)
            if not any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
                continue
            for attribute, read in zip(self._inside(frame, _ATTRIBUTE), node.attribute, strict=True):
                inner = f"{label}/{index}:{node.name or node.op_type}.{read.name}"
                protos = [read.g] if read.HasField("g") else list(read.graphs)
                frames = [each for number in _SUBGRAPHS for each in self._inside(attribute, number)]
                yield from ((inner, *pair) for pair in zip(frames, protos, strict=True))

    def _inside(self, frame: Frame, number: int) -> Iterator[Frame]:
        fields = self._reader.fields(frame.field.begin, frame.field.end)
        return (frame.enter(field) for field in fields if field.number == number and field.wire == LENGTH)
