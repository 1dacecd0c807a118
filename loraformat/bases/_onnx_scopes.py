"""The values of an ONNX graph: where each comes from and who reads it, through subgraphs and function calls.

Functions are expanded in place, call by call, so that a weight handed to a function, or held by it, has the readers
that it has when the model runs.
"""

import math
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, TypeAlias

from loraformat.containers.onnx_file import GraphStep
from loraformat.errors import refuse
from loraformat.limits import MAX_GRAPH_VISITS, MAX_PROTO_DEPTH

if TYPE_CHECKING:
    import onnx

_STEPS: Final = 32
_PASSING: Final = frozenset({"Identity", "Cast", "Transpose", "DequantizeLinear"})
_RESHAPING: Final = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_UINT8: Final = 2
_INT64: Final = 7
_DIMS: Final = 3
"""Rows of codes, blocks of a row, bytes of a block: how MatMulNBits has its weight."""
_DEFAULT_DOMAINS: Final = frozenset({"", "ai.onnx"})


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
        """Operator type, with the domain where it is not ONNX's own."""
        domain = self.node.domain
        return self.node.op_type if domain in _DEFAULT_DOMAINS else f"{domain}.{self.node.op_type}"

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


@dataclass(frozen=True, slots=True)
class Trace:
    """A value followed back to a stored tensor.

    Attributes:
        tensor: the tensor.
        scope: where its name lives.
        name: the value's name there.
        flipped: whether an odd number of transpositions lies between.
        steps: the nodes between, nearest first.
        blocked: the operator that stands in the way, when the value is constant but cannot be followed.
        view: the shape that nodes give the stored numbers before any transposition; None for the stored one.
    """

    tensor: "onnx.TensorProto | None"
    scope: Scope
    name: str
    flipped: bool
    steps: tuple[Visit, ...]
    blocked: str = ""
    view: tuple[int, ...] | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape in which the stored numbers are read; of none, nothing."""
        return self.view if self.view is not None else tuple(self.tensor.dims if self.tensor is not None else ())


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


def trace_constant(scope: Scope, name: str) -> Trace | None:
    """Follow a value back through Identity, Cast, matrix Transpose and DequantizeLinear; None if it is no constant."""
    steps: list[Visit] = []
    flipped = False
    for _ in range(_STEPS):
        owner, own = scope.find(name)
        made_by = owner.producers.get(own)
        if made_by is None:
            sparse = own in owner.sparse
            return Trace(None, owner, own, flipped, tuple(steps), "a sparse initializer") if sparse else None
        if not isinstance(made_by, Visit):
            return _end_trace(Trace(made_by, owner, own, flipped, tuple(steps)))
        if made_by.op == "Constant":
            return _trace_constant_node(made_by, own, flipped, steps)
        if not hands_on(made_by) or not made_by.node.input or not _passes(made_by):
            return Trace(None, owner, own, flipped, tuple(steps), made_by.op) if _is_constant(made_by) else None
        flipped ^= made_by.op == "Transpose" and not _keeps_order(made_by)
        steps.append(made_by)
        scope, name = made_by.scope, made_by.node.input[0]
    return None


def _trace_constant_node(visit: Visit, name: str, flipped: bool, steps: Sequence[Visit]) -> Trace | None:
    for attribute in visit.node.attribute:
        if attribute.name == "value" and attribute.HasField("t"):
            return _end_trace(Trace(attribute.t, visit.scope, name, flipped, tuple(steps)))
    return None


def _end_trace(trace: Trace) -> Trace:
    """Return the trace, blocked where what was taken for the transposition of a matrix is one of more dimensions."""
    turned = any(step.op == "Transpose" for step in trace.steps)
    if turned and trace.tensor is not None and len(trace.tensor.dims) != 2:
        return replace(trace, blocked="Transpose")
    return trace


def hands_on(visit: Visit) -> bool:
    """Say whether a node's first input is followed by `trace_constant`, a Transpose's of any sizes too."""
    return visit.op in _PASSING or (visit.op == "Reshape" and _flattens_blocks(visit))


def _flattens_blocks(visit: Visit) -> bool:
    """Say whether a Reshape makes rows of stored codes in blocks, `(rows, blocks, bytes)`: as tied tables have them."""
    if len(visit.node.input) != 2:
        return False
    codes, wanted = visit.scope.producer(visit.node.input[0]), read_sizes(visit, 1, "")
    if codes is None or isinstance(codes, Visit) or codes.data_type != _UINT8 or len(codes.dims) != _DIMS:
        return False
    rows, blocks, length = codes.dims
    return wanted in ([rows, blocks * length], [rows, -1])


def read_sizes(visit: Visit, position: int, attribute: str) -> list[int] | None:
    """Return the few whole numbers that stand at an input or in an attribute; None where they are not constant."""
    if position >= len(visit.node.input) or not visit.node.input[position]:
        return next((list(each.ints) for each in visit.node.attribute if each.name == attribute), [])
    made_by = visit.scope.producer(visit.node.input[position])
    if isinstance(made_by, Visit) and made_by.op == "Constant":
        values = {each.name: each for each in made_by.node.attribute}
        if "value_ints" in values:
            return list(values["value_ints"].ints)
        made_by = values["value"].t if "value" in values else None
    if made_by is None or isinstance(made_by, Visit) or made_by.data_type != _INT64:
        return None
    found = [each for (each,) in struct.iter_unpack("<q", made_by.raw_data)] or list(made_by.int64_data)
    return found if len(found) == math.prod(made_by.dims) else None


def reshapes(visit: Visit) -> bool:
    """Say whether a node gives its first input another shape, which is constant."""
    return visit.op in _RESHAPING and read_sizes(visit, 1, "axes") is not None


def _permutation(visit: Visit) -> list[int]:
    return next((list(a.ints) for a in visit.node.attribute if a.name == "perm"), [1, 0])


def _passes(visit: Visit) -> bool:
    """Say whether a Transpose is of a matrix; without a permutation it may be of anything: `_end_trace` looks."""
    return visit.op != "Transpose" or sorted(_permutation(visit)) == [0, 1]


def _keeps_order(visit: Visit) -> bool:
    return _permutation(visit) == [0, 1]


def _is_constant(visit: Visit) -> bool:
    """Say whether a node's result does not depend on the model's inputs, looking a bounded number of nodes back."""
    pending, seen = [visit], {id(visit)}
    while pending:
        current = pending.pop()
        for name in filter(None, current.node.input):
            made_by = current.scope.producer(name)
            if made_by is None or len(seen) > _STEPS:
                return False
            if isinstance(made_by, Visit) and id(made_by) not in seen:
                seen.add(id(made_by))
                pending.append(made_by)
    return bool(visit.node.input)
