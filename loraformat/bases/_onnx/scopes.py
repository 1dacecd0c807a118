"""The values of an ONNX graph: where each comes from and who reads it, through subgraphs and function calls.

Functions are expanded in place, call by call, so that a weight handed to a function, or held by it, has the readers
that it has when the model runs.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from loraformat.containers.onnx_file import GraphStep
from loraformat.errors import refuse
from loraformat.limits import MAX_GRAPH_VISITS, MAX_PROTO_DEPTH

if TYPE_CHECKING:
    import onnx

_DEFAULT_DOMAINS: Final = frozenset({"", "ai.onnx"})
_SAME: Final = frozenset({"com.microsoft.DequantizeLinear", "com.microsoft.QuantizeLinear"})
"""Operators of onnxruntime that do what ONNX's do, with codes of 4 and 16 bits before ONNX's had them."""


def name_operator(node: "onnx.NodeProto") -> str:
    """Return an operator's type, with the domain where it is not ONNX's own or the same as ONNX's."""
    name = f"{node.domain}.{node.op_type}"
    return str(node.op_type) if node.domain in _DEFAULT_DOMAINS or name in _SAME else name


@dataclass(frozen=True, slots=True, eq=False)
class Visit:
    """One node as it runs: a node of a function is visited once for each call.

    Attributes:
        scope: where its names live.
        node: the node.
        index: its position in its graph.
        call: the call that led here, None in a graph.
    """

    scope: "Scope"
    node: "onnx.NodeProto"
    index: int
    call: "Visit | None"

    @property
    def op(self) -> str:
        """Operator type, as `name_operator` has it."""
        return name_operator(self.node)

    def read_input(self, position: int) -> str:
        """Return the name of what it reads at `position`; empty where it reads nothing there."""
        return str(self.node.input[position]) if position < len(self.node.input) else ""

    def describe(self, position: int) -> str:
        """Return words for its input at `position`, unique in the model."""
        return f"{self.op} {self.node.name!r} ({self.scope.label} node {self.index}, input {position})"


Producer: TypeAlias = "Visit | onnx.TensorProto"


@dataclass(slots=True, eq=False)
class Scope:
    """The names of one graph, or of one call of a function.

    Attributes:
        label: for messages; no two scopes share one.
        parent: the scope around a subgraph.
        aliases: inputs of a function, and what the caller passes.
        producers: what makes each value; graph inputs have none.
        readers: who reads each value of this scope.
        outputs: values that leave the graph.
        sparse: names of sparse initializers.
        path: the way from the main graph to this one; None for one inside a function, or for its call.
    """

    label: str
    parent: "Scope | None" = None
    aliases: "dict[str, tuple[Scope, str]]" = field(default_factory=dict)
    producers: dict[str, Producer] = field(default_factory=dict)
    readers: dict[str, list[tuple[Visit, int]]] = field(default_factory=lambda: defaultdict(list))
    outputs: set[str] = field(default_factory=set)
    sparse: set[str] = field(default_factory=set)
    path: tuple[GraphStep, ...] | None = None

    def find(self, name: str) -> "tuple[Scope, str]":
        """Return the scope that owns the value called `name` here, and its name there."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.producers:
                return scope, name
            if name in scope.aliases:
                scope, name = scope.aliases[name]
            elif scope.parent is None:
                return scope, name
            else:
                scope = scope.parent
        raise AssertionError("unreachable")

    def producer(self, name: str) -> "Producer | None":
        """Return what makes the value called `name` here, None for an input of the model."""
        scope, own = self.find(name)
        return scope.producers.get(own)


class GraphIndex:
    """All nodes of a model as they run.

    Args:
        model: the model; weights may be left out of it.
        where: for messages.

    Attributes:
        visits: the nodes.
        names: all names of values.
    """

    def __init__(self, model: "onnx.ModelProto", where: object) -> None:
        self._where = where
        self._functions = {(f.domain, f.name, f.overload): f for f in model.functions}
        self.visits: list[Visit] = []
        self.names: set[str] = set()
        self._pending: list[tuple[Scope, Sequence[onnx.NodeProto], Visit | None, int]] = []
        self._open_graph(model.graph, Scope("graph", path=()), None, 0)
        while self._pending:
            self._walk(*self._pending.pop())

    def _open_graph(self, graph: "onnx.GraphProto", scope: Scope, call: Visit | None, depth: int) -> None:
        scope.producers.update((tensor.name, tensor) for tensor in graph.initializer)
        if len(scope.producers) != len(graph.initializer):
            raise refuse("LF118", self._where, f"two initializers of one name in the {scope.label}", "each name once")
        scope.outputs.update(output.name for output in graph.output)
        scope.sparse.update(each.values.name for each in graph.sparse_initializer)
        self.names.update(scope.producers, scope.outputs, (each.name for each in (*graph.input, *graph.value_info)))
        self._pending.append((scope, graph.node, call, depth))

    def _walk(self, scope: Scope, nodes: "Sequence[onnx.NodeProto]", call: Visit | None, depth: int) -> None:
        if depth > MAX_PROTO_DEPTH:
            raise refuse("LF110", self._where, f"graphs and calls nested {depth} deep", f"at most {MAX_PROTO_DEPTH}")
        visits = [Visit(scope, node, index, call) for index, node in enumerate(nodes)]
        if len(self.visits) + len(visits) > MAX_GRAPH_VISITS:
            raise refuse("LF110", self._where, "a graph that unfolds too far", f"at most {MAX_GRAPH_VISITS} nodes")
        self.visits += visits
        for visit in visits:
            scope.producers.update((name, visit) for name in visit.node.output if name)
            self.names.update(visit.node.output, visit.node.input)
        for name in scope.outputs:
            owner, own = scope.find(name)
            owner.outputs.add(own)
        for visit in visits:
            self._enter(visit, depth)

    def _enter(self, visit: Visit, depth: int) -> None:
        node, scope = visit.node, visit.scope
        function = self._functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            aliases = {formal: (scope, actual) for formal, actual in zip(function.input, node.input, strict=False)}
            inner = Scope(f"{scope.label}/{visit.index}:{node.name or node.op_type}", None, aliases)
            inner.outputs.update(function.output)
            self._pending.append((inner, function.node, visit, depth + 1))
            return
        for position, name in enumerate(node.input):
            if name:
                owner, own = scope.find(name)
                owner.readers[own].append((visit, position))
        for number, attribute in enumerate(node.attribute):
            is_only = attribute.HasField("g")
            label = f"{scope.label}/{visit.index}:{node.name or node.op_type}.{attribute.name}"
            for index, graph in enumerate([attribute.g] if is_only else attribute.graphs):
                step = GraphStep(visit.index, number, index, is_only)
                path = (*scope.path, step) if scope.path is not None else None
                self._open_graph(graph, Scope(label, scope, path=path), visit.call, depth + 1)
