"""Tensors of floats in the place of codes: nodes of the main graph become others, initializers come and go."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraformat.containers._onnx_copies import NewTensor, describe_initializer
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
    """

    floats: tuple[TensorFloats, ...] = ()
    edits: tuple[NodeEdit, ...] = ()
    dropped: frozenset[str] = frozenset()


def find_dropped(file: InputFile, graph: Frame, change: GraphChange) -> list[Field]:
    """Return the fields of the initializers that go."""
    if not change.dropped:
        return []
    reader = Reader(file)
    fields = (each for each in reader.fields(graph.field.begin, graph.field.end) if each.number == _INITIALIZER)
    return [each for each in fields if _read_name(reader, each) in change.dropped]


def _read_name(reader: Reader, tensor: Field) -> str:
    fields = reader.fields(tensor.begin, tensor.end)
    return next((reader.read(each).decode() for each in fields if each.number == _NAME and each.wire == LENGTH), "")


def change_graph(
    file: InputFile, graph: Frame, change: GraphChange, dropped: Iterable[Field], places: Mapping[str, tuple[str, int]]
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
    for each in dropped:
        yield Leaf(Edit(each.start, each.end - each.start, ()), graph)
    tensors: Sequence[NewTensor] = change.floats
    for tensor in tensors:
        pieces = tuple(describe_initializer(tensor, places.get(tensor.name)))
        yield Leaf(Edit(graph.field.end, 0, pieces), graph)
