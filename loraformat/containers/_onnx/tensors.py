"""Every tensor of a parsed ONNX model, wherever it hides, and which of them share bytes."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias

from loraformat.spans import StoredTensor

if TYPE_CHECKING:
    import onnx

Scoped: TypeAlias = "tuple[str, onnx.TensorProto]"
_Pending: TypeAlias = "list[tuple[str, onnx.GraphProto]]"


def iterate_tensors(model: "onnx.ModelProto") -> Iterator[Scoped]:
    """Yield every tensor, of initializers and attributes, in graphs and functions, with a text that says where."""
    pending: _Pending = [("graph", model.graph)]
    for index, training in enumerate(model.training_info):
        pending += [(f"training {index}", training.initialization), (f"training {index}", training.algorithm)]
    for function in model.functions:
        scope = f"function {function.domain}::{function.name}"
        yield from _from_attributes(scope, function.attribute_proto, pending)
        yield from _from_nodes(scope, function.node, pending)
    while pending:
        scope, graph = pending.pop()
        for tensor in graph.initializer:
            yield scope, tensor
        for sparse in graph.sparse_initializer:
            yield scope, sparse.values
            yield scope, sparse.indices
        yield from _from_nodes(scope, graph.node, pending)


def _from_nodes(scope: str, nodes: "Iterable[onnx.NodeProto]", pending: _Pending) -> Iterator[Scoped]:
    for node in nodes:
        if node.attribute:
            yield from _from_attributes(f"{scope}/{node.name or node.op_type}", node.attribute, pending)


def _from_attributes(scope: str, attributes: "Iterable[onnx.AttributeProto]", pending: _Pending) -> Iterator[Scoped]:
    for attribute in attributes:
        place = f"{scope}.{attribute.name}"
        if attribute.HasField("t"):
            yield place, attribute.t
        if attribute.HasField("g"):
            pending.append((place, attribute.g))
        if attribute.HasField("sparse_tensor"):
            yield place, attribute.sparse_tensor.values
            yield place, attribute.sparse_tensor.indices
        for tensor in attribute.tensors:
            yield place, tensor
        pending.extend((place, graph) for graph in attribute.graphs)
        for sparse in attribute.sparse_tensors:
            yield place, sparse.values
            yield place, sparse.indices


class SharedBytes:
    """Finds the tensors whose bytes overlap those of another.

    Args:
        tensors: all tensors of a model, each with the name for messages.
    """

    def __init__(self, tensors: Iterable[tuple[str, StoredTensor]]) -> None:
        by_file: dict[tuple[int, int], list[tuple[int, int, str, str]]] = defaultdict(list)
        for label, tensor in tensors:
            if tensor.span.length:
                entry = (tensor.span.offset, tensor.span.end, label, tensor.name)
                by_file[tensor.file.identity].append(entry)
        self._sorted = {identity: sorted(entries) for identity, entries in by_file.items()}
        # The furthest end so far tells where looking back can stop.
        self._ends = {
            identity: list(accumulate((entry[1] for entry in entries), max))
            for identity, entries in self._sorted.items()
        }

    def find(self, tensor: StoredTensor) -> list[str]:
        """Return the labels of the others that share a byte with `tensor`, in the order of the file."""
        entries = self._sorted.get(tensor.file.identity, [])
        ends = self._ends.get(tensor.file.identity, [])
        begin, end = tensor.span.offset, tensor.span.end
        found: list[str] = []
        itself = (begin, end, tensor.name)
        for index in range(bisect_left(entries, (end,)) - 1, -1, -1):
            if ends[index] <= begin:
                break
            first, last, label, name = entries[index]
            if (first, last, name) == itself:
                itself = (-1, -1, "")
            elif last > begin:
                found.append(label)
        return found[::-1]
