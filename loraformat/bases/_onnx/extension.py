"""What is put into an ONNX model besides what it has: nodes, inputs with defaults, annotations.

The file's own bytes stay as they are, but for the names of values that a new node takes over, and the lengths around.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from loraformat.bases._onnx.openings import Opening
from loraformat.bases._onnx.places import NodePlaces
from loraformat.containers._protobuf import Leaf, encode_bytes
from loraformat.images import Edit, Literal
from loraformat.spans import InputFile

if TYPE_CHECKING:
    import onnx

_INITIALIZER: Final = 5
_INPUT: Final = 11
_METADATA_PROPS: Final = 14
_KEY: Final = 1
_VALUE: Final = 2


@dataclass(frozen=True, slots=True)
class Addition:
    """What is added at one opening.

    Attributes:
        opening: where.
        before: the name that the value has from now on to which something is added.
        nodes: new nodes in order; the last makes a value of the old name. They take the place of a node that holds
            its product inside.
    """

    opening: Opening
    before: str
    nodes: "Sequence[onnx.NodeProto]"


@dataclass(frozen=True, slots=True)
class Extension:
    """What is put into a model.

    Attributes:
        additions: new nodes in its graphs.
        shared: new nodes that read new inputs only, at the start of the main graph.
        inputs: new inputs of the main graph.
        defaults: a tensor of the same name for each.
        metadata: new annotations of the model.
    """

    additions: Sequence[Addition]
    shared: "Sequence[onnx.NodeProto]"
    inputs: "Sequence[onnx.ValueInfoProto]"
    defaults: "Sequence[onnx.TensorProto]"
    metadata: Mapping[str, str] = field(default_factory=dict)


def edit_model(file: InputFile, model: "onnx.ModelProto", extension: Extension) -> list[Leaf]:
    """Return the edits of a model's file after which it has what an extension adds.

    Args:
        file: the model's file.
        model: its skeleton.
        extension: what is new.
    """
    places = NodePlaces(file, model)
    leaves: list[Leaf] = []
    for addition in extension.additions:
        place = places.find(*addition.opening.place)
        leaves.append(place.remove() if addition.opening.is_inside else place.rename_output(0, addition.before))
        leaves += [place.add_after(node) for node in addition.nodes]
    leaves += [places.add_first(node) for node in extension.shared]
    protos: list[tuple[int, Any]] = [
        *((_INITIALIZER, tensor) for tensor in extension.defaults),
        *((_INPUT, value) for value in extension.inputs),
    ]
    ends = b"".join(encode_bytes(number, proto.SerializeToString(deterministic=True)) for number, proto in protos)
    leaves.append(Leaf(Edit(places.graph.field.end, 0, (Literal(ends),)), places.graph))
    entries = b"".join(_encode_entry(*item) for item in extension.metadata.items())
    leaves.append(Leaf(Edit(file.size_bytes, 0, (Literal(entries),)), None))
    return leaves


def _encode_entry(key: str, value: str) -> bytes:
    return encode_bytes(_METADATA_PROPS, encode_bytes(_KEY, key.encode()) + encode_bytes(_VALUE, value.encode()))


def list_names(model: "onnx.ModelProto") -> set[str]:
    """Return the names of all values and nodes in a model's graphs and functions."""
    names = {name for function in model.functions for name in (*function.input, *_list_node_names(function.node))}
    pending = [model.graph]
    pending += [graph for function in model.functions for graph in _list_inner(function.node)]
    while pending:
        graph = pending.pop()
        entries = chain(graph.input, graph.output, graph.value_info, graph.initializer)
        names.update(entry.name for entry in entries)
        names.update(sparse.values.name for sparse in graph.sparse_initializer)
        names.update(_list_node_names(graph.node))
        pending += _list_inner(graph.node)
    return names


def _list_node_names(nodes: "Sequence[onnx.NodeProto]") -> list[str]:
    return [name for node in nodes for name in (node.name, *node.output)]


def _list_inner(nodes: "Sequence[onnx.NodeProto]") -> "list[onnx.GraphProto]":
    attributes = (attribute for node in nodes for attribute in node.attribute)
    return [graph for each in attributes for graph in ([each.g] if each.HasField("g") else each.graphs)]
