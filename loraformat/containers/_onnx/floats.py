"""Tensors of floats in the place of codes: nodes of the main graph become others, initializers come and go."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraformat.containers._onnx.copies import NewTensor, describe_initializer
from loraformat.containers._protobuf import LENGTH, Field, Frame, Leaf, Reader, encode_bytes
from loraformat.images import Edit, Literal
from loraformat.spans import InputFile

if TYPE_CHECKING:
    import onnx

_NODE: Final = 1
_INITIALIZER: Final = 5
_NAME: Final = 8


@dataclass(frozen=True, slots=True)
class NodeEdit:
    """A node of the main graph that becomes others.

    Attributes:
        node: its position.
        nodes: what it becomes; nothing where it goes.
    """

    node: int
    nodes: "tuple[onnx.NodeProto, ...]"


@dataclass(frozen=True, slots=True)
class TensorFloats:
    """A new initializer, whose numbers are computed.

    Attributes:
        name: its name.
        data_type: number form, as ONNX numbers them.
        shape: dimensions.
        nbytes: bytes.
        beside: the file that has the codes; its numbers go there too.
    """

    name: str
    data_type: int
    shape: tuple[int, ...]
    nbytes: int
    beside: Path


@dataclass(frozen=True, slots=True)
class GraphChange:
    """What changes in a main graph.

    Attributes:
        floats: new initializers.
        edits: nodes that become others.
        dropped: names of initializers that go.
        replaced: initializers with other numbers under the name that they had.
        leaves: edits of single fields: inputs and nodes that read new initializers.
    """

    floats: tuple[TensorFloats, ...] = ()
    edits: tuple[NodeEdit, ...] = ()
    dropped: frozenset[str] = frozenset()
    replaced: "tuple[onnx.TensorProto, ...]" = ()
    leaves: tuple[Leaf, ...] = ()


def find_dropped(file: InputFile, graph: Frame, change: GraphChange) -> Mapping[Field, "onnx.TensorProto | None"]:
    """Return the fields of the initializers that go, and what stands there instead."""
    wanted: dict[str, onnx.TensorProto | None] = dict.fromkeys(change.dropped)
    wanted |= {each.name: each for each in change.replaced if each.name not in change.dropped}
    if not wanted:
        return {}
    reader = Reader(file)
    fields = (each for each in reader.fields(graph.field.begin, graph.field.end) if each.number == _INITIALIZER)
    named = ((each, _read_name(reader, each)) for each in fields)
    return {each: wanted[name] for each, name in named if name in wanted}


def _read_name(reader: Reader, tensor: Field) -> str:
    fields = reader.fields(tensor.begin, tensor.end)
    return next((reader.read(each).decode() for each in fields if each.number == _NAME and each.wire == LENGTH), "")


def change_graph(
    file: InputFile,
    graph: Frame,
    change: GraphChange,
    dropped: Mapping[Field, "onnx.TensorProto | None"],
    places: Mapping[str, tuple[str, int]],
) -> Iterator[Leaf]:
    """Yield the edits of a model's file that make a change.

    Args:
        file: the model's file.
        graph: the main graph in it.
        change: what is to change.
        dropped: of `find_dropped`.
        places: location and offset of new tensors whose numbers are in a data file; the others have theirs here.
    """
    wanted = {edit.node: edit.nodes for edit in change.edits}
    fields = (each for each in Reader(file).fields(graph.field.begin, graph.field.end) if each.number == _NODE)
    for position, each in enumerate(fields if wanted else ()):
        if position in wanted:
            made = tuple(Literal(encode_bytes(_NODE, node.SerializeToString())) for node in wanted[position])
            yield Leaf(Edit(each.start, each.end - each.start, made), graph)
    yield from change.leaves
    for each, other in dropped.items():
        new = (Literal(encode_bytes(_INITIALIZER, other.SerializeToString())),) if other is not None else ()
        yield Leaf(Edit(each.start, each.end - each.start, new), graph)
    tensors: Sequence[NewTensor] = change.floats
    for tensor in tensors:
        pieces = tuple(describe_initializer(tensor, places.get(tensor.name)))
        yield Leaf(Edit(graph.field.end, 0, pieces), graph)
