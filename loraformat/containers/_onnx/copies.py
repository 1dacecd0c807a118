"""A tensor of a model once more, under a name of its own, for some of the nodes that read it.

The graph gets one initializer, and the names of some inputs change. Where a value between tensor and node has other
readers too, such as a shared Transpose, the nodes between are written once more before the node that reads them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from loraformat.containers._protobuf import LENGTH, Field, Frame, Leaf, Reader, encode_bytes, encode_tag, encode_varint
from loraformat.images import Edit, Fresh, Literal, Piece
from loraformat.spans import InputFile, Span

if TYPE_CHECKING:
    import onnx

_NODE: Final = 1
_INITIALIZER: Final = 5
_NODE_INPUT: Final = 1
_NODE_ATTRIBUTE: Final = 5
_ATTRIBUTE_TENSOR: Final = 5
_ATTRIBUTE_GRAPH: Final = {True: 6, False: 11}
_RAW_DATA: Final = 9
_ALIGNMENT: Final = 64


@dataclass(frozen=True, slots=True)
class GraphStep:
    """The way from a graph to one inside it.

    Attributes:
        node: position of the node that holds it.
        attribute: position of its attribute.
        graph: position among the attribute's graphs.
        is_only: whether the attribute is of one graph rather than a list.
    """

    node: int
    attribute: int
    graph: int
    is_only: bool


@dataclass(frozen=True, slots=True)
class InputEdit:
    """One input of a node that reads something else.

    Attributes:
        path: the way from the main graph to the node's.
        node: position of the node there.
        position: position of the input.
        name: the value that it reads.
        before: nodes to insert before it.
    """

    path: tuple[GraphStep, ...]
    node: int
    position: int
    name: str
    before: "tuple[onnx.NodeProto, ...]" = ()


class NewTensor(Protocol):
    """An initializer that a copy of a model has more.

    Attributes:
        name: its name.
        data_type: number form, as ONNX numbers them.
        shape: dimensions.
        nbytes: bytes.
        beside: the file of the model in whose copy its numbers go.
    """

    @property
    def name(self) -> str: ...
    @property
    def data_type(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def beside(self) -> Path: ...


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """A tensor once more.

    Attributes:
        name: its name.
        data_type: number form, as ONNX numbers them.
        shape: dimensions.
        source: where the numbers are of the tensor that it is a copy of.
        edits: what reads it.
        is_node: whether it is a Constant at the front of the graph, and no initializer.
    """

    name: str
    data_type: int
    shape: tuple[int, ...]
    source: Span
    edits: tuple[InputEdit, ...]
    is_node: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.source.length

    @property
    def beside(self) -> Path:
        """The file of the tensor that it is a copy of."""
        return self.source.path


def leave_room(copies: Iterable[NewTensor], start: int) -> tuple[list[Piece], dict[str, int]]:
    """Return room for the numbers of copies after `start` bytes of a data file, and the offset of each."""
    pieces: list[Piece] = []
    offsets: dict[str, int] = {}
    end = start
    for copy in copies:
        padding = -end % _ALIGNMENT
        pieces += [Literal(bytes(padding)), Fresh(copy.name, copy.nbytes)]
        offsets[copy.name] = end + padding
        end += padding + copy.nbytes
    return pieces, offsets


def add_copies(
    file: InputFile, graph: Frame, copies: Sequence[TensorCopy], places: Mapping[str, tuple[str, int]]
) -> Iterator[Leaf]:
    """Yield the edits of a model's file after which it has the copies.

    Args:
        file: the model's file.
        graph: the main graph in it.
        copies: what to add.
        places: location and offset of those whose numbers are in a data file; the others have theirs in the model.
    """
    reader = Reader(file)
    for copy in copies:
        for edit in copy.edits:
            yield from _rename_input(reader, graph, edit)
    end = graph.field.end
    for copy in copies:
        if copy.is_node:
            front = _find(reader, graph, _NODE, 0).field.start
            yield Leaf(Edit(front, 0, tuple(_describe_constant(copy))), graph)
        else:
            yield Leaf(Edit(end, 0, tuple(describe_initializer(copy, places.get(copy.name)))), graph)


def _rename_input(reader: Reader, graph: Frame, edit: InputEdit) -> Iterator[Leaf]:
    for step in edit.path:
        node = _find(reader, graph, _NODE, step.node)
        attribute = _find(reader, node, _NODE_ATTRIBUTE, step.attribute)
        graph = _find(reader, attribute, _ATTRIBUTE_GRAPH[step.is_only], step.graph)
    node = _find(reader, graph, _NODE, edit.node)
    for added in edit.before:
        yield Leaf(Edit(node.field.start, 0, (Literal(encode_bytes(_NODE, added.SerializeToString())),)), graph)
    read = _find(reader, node, _NODE_INPUT, edit.position)
    pieces = (Literal(edit.name.encode()),)
    yield Leaf(Edit(read.field.begin, read.field.end - read.field.begin, pieces), read)


def _find(reader: Reader, frame: Frame, number: int, position: int) -> Frame:
    """Return one of the fields of a message that have the same number."""
    fields = reader.fields(frame.field.begin, frame.field.end)
    same: Iterator[Field] = (field for field in fields if field.number == number)
    return frame.enter(next(islice(same, position, None)))


def describe_initializer(copy: NewTensor, place: tuple[str, int] | None) -> Iterator[Piece]:
    """Yield the field of the graph that is the copy, with its numbers or with the place where they are."""
    import onnx

    tensor = onnx.TensorProto(name=copy.name, data_type=copy.data_type, dims=copy.shape)
    if place is not None:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", place[0]), ("offset", str(place[1])), ("length", str(copy.nbytes))):
            tensor.external_data.add(key=key, value=text)
        yield Literal(encode_bytes(_INITIALIZER, tensor.SerializeToString()))
        return
    yield Literal(_head(_INITIALIZER, _begin_tensor(tensor, copy.nbytes), copy.nbytes))
    yield Fresh(copy.name, copy.nbytes)


def _describe_constant(copy: TensorCopy) -> Iterator[Piece]:
    """Yield the field of the graph that is a Constant node, with its numbers."""
    import onnx

    tensor = onnx.TensorProto(data_type=copy.data_type, dims=copy.shape)
    value = _head(_ATTRIBUTE_TENSOR, _begin_tensor(tensor, copy.nbytes), copy.nbytes)
    attribute = onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR).SerializeToString() + value
    node = onnx.NodeProto(name=copy.name, op_type="Constant", output=[copy.name]).SerializeToString()
    yield Literal(_head(_NODE, node + _head(_NODE_ATTRIBUTE, attribute, copy.nbytes), copy.nbytes))
    yield Fresh(copy.name, copy.nbytes)


def _begin_tensor(tensor: "onnx.TensorProto", nbytes: int) -> bytes:
    """Return a tensor up to its numbers, which are to follow."""
    described: bytes = tensor.SerializeToString()
    return described + encode_tag(_RAW_DATA, LENGTH) + encode_varint(nbytes)


def _head(number: int, content: bytes, nbytes: int) -> bytes:
    """Return the start of a field: its tag, and content that more bytes follow."""
    return encode_tag(number, LENGTH) + encode_varint(len(content) + nbytes) + content
