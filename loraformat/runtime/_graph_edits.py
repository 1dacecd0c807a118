"""Changes of a parsed ONNX model, as those of its file are described: what reads a new tensor, what nodes become."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from loraformat.containers.onnx_file import GraphChange, GraphStep, TensorCopy

if TYPE_CHECKING:
    import onnx


def edit_graph(graph: "onnx.GraphProto", copies: Iterable[TensorCopy], change: GraphChange) -> None:
    """Change a main graph so that it reads new tensors; these themselves are for the caller to add.

    Args:
        graph: as it stands in the file.
        copies: tensors that some nodes read instead of another one.
        change: nodes that become others, and initializers that go.
    """
    before: dict[tuple[GraphStep, ...], dict[int, list[onnx.NodeProto]]] = defaultdict(lambda: defaultdict(list))
    for copy in copies:
        for edit in copy.edits:
            node = _descend(graph, edit.path).node[edit.node]
            node.input[edit.position] = edit.name
            before[edit.path][edit.node] += edit.before
    for path in sorted(before, key=len, reverse=True):  # Those inside first: rewriting a graph copies its nodes.
        _rewrite(_descend(graph, path), before[path], {edit.node: edit.nodes for edit in change.edits if not path})
    if change.edits and () not in before:
        _rewrite(graph, {}, {edit.node: edit.nodes for edit in change.edits})
    for index in reversed(range(len(graph.initializer) if change.dropped else 0)):
        if graph.initializer[index].name in change.dropped:
            del graph.initializer[index]


def _descend(graph: "onnx.GraphProto", path: Sequence[GraphStep]) -> "onnx.GraphProto":
    for step in path:
        attribute = graph.node[step.node].attribute[step.attribute]
        graph = attribute.g if step.is_only else attribute.graphs[step.graph]
    return graph


def _rewrite(
    graph: "onnx.GraphProto",
    before: "Mapping[int, Sequence[onnx.NodeProto]]",
    instead: "Mapping[int, Sequence[onnx.NodeProto]]",
) -> None:
    nodes = [
        each for index, node in enumerate(graph.node) for each in (*before.get(index, ()), *instead.get(index, (node,)))
    ]
    del graph.node[:]
    graph.node.extend(nodes)
