"""The flow of values through a graph between its linear layers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import prod
from typing import Final

from loraformat.adapter import SlotKind
from loraformat.bases._onnx.numbers import compute_scalar, read_integers, read_scalar
from loraformat.bases._onnx.scopes import Scope, Visit
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.traces import trace_constant
from loraformat.bases._onnx.uses import UNREAD
from loraformat.containers.onnx_file import GraphStep

_DATA_FIRST: Final = frozenset(
    {"Reshape", "Expand", "Slice", "Unsqueeze", "Squeeze", "Tile", "Split", "Pad", "ReduceMean", "Clip", "Gather"}
    | {"CastLike", "SplitToSequence", "SequenceAt"}
)
"""Operators of whose inputs only the first is data; the others say how."""
_SHAPES: Final = frozenset({"Shape", "Size", "ConstantOfShape", "Constant"})
"""What these put out says nothing of values."""
_UNCHANGED: Final = frozenset({"Cast", "Identity"})
_LAST_BY_DEFAULT: Final = 13
"""The version from which a Softmax is over the last axis unless it says otherwise."""
_QUANTISING: Final = "DynamicQuantizeLinear"
QUANTISING: Final = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""What rounds a value on its way."""
_ROTATIONS: Final = frozenset({"RotaryEmbedding", "com.microsoft.RotaryEmbedding"})
_LOOKUPS: Final = frozenset({"Gather", "com.microsoft.RelativePositionBias"})
_FACTORS: Final = {"com.microsoft.FusedMatMul": "alpha", "com.microsoft.RotaryEmbedding": "scale"}
"""Operators that multiply by an attribute."""
Value = tuple[int, str]
"""A scope, by identity, and a name in it."""


@dataclass(slots=True)
class Slice:
    """What a value is made of, back to the nearest linear layers.

    Attributes:
        layers: nodes of the layers, in the order in which they were met.
        visits: the nodes between.
        values: the values between.
        inputs: those that no node and no stored tensor makes: a run is given them.
    """

    layers: dict[Visit, None] = field(default_factory=dict)
    visits: dict[Visit, None] = field(default_factory=dict)
    values: set[Value] = field(default_factory=set)
    inputs: set[Value] = field(default_factory=set)

    @property
    def ops(self) -> set[str]:
        """Operators between."""
        return {visit.op for visit in self.visits}

    @property
    def layer(self) -> Visit | None:
        """The one layer that it comes from, None for none or several."""
        return next(iter(self.layers)) if len(self.layers) == 1 else None


class Flow:
    """A graph, and which of its nodes are linear layers.

    Args:
        visits: all nodes.
        found: the sites.
        opset: version of ONNX's own operators.
        path: the way from the main graph to the graph; empty for the main graph.

    Attributes:
        visits: the nodes of the graph.
        sites: its linear layers, by their nodes.
        softmax_axis: the axis of a Softmax that does not say.
    """

    def __init__(
        self, visits: Iterable[Visit], found: Iterable[RawSite], opset: int, path: tuple[GraphStep, ...] = ()
    ) -> None:
        self.softmax_axis = -1 if opset >= _LAST_BY_DEFAULT else 1
        self.visits = [visit for visit in visits if visit.scope.path == path]
        self.sites: dict[Visit, RawSite] = {}
        for raw in found:
            if raw.visit.scope.path == path and _is_linear(raw):
                self.sites.setdefault(raw.visit, raw)

    def read(self, layer: Visit) -> tuple[Scope, str]:
        """Return the value that a linear layer is applied to, before it is quantised."""
        position = 1 if self.sites[layer].position == 0 else 0
        scope, name = layer.scope.find(layer.node.input[position])
        made_by = scope.producers.get(name)
        if isinstance(made_by, Visit) and made_by.op == _QUANTISING:
            return made_by.scope.find(made_by.node.input[0])
        return scope, name

    def trace_back(self, scope: Scope, name: str) -> Slice:
        """Follow a value back to the nearest linear layers, and to inputs of the model."""
        found, pending = Slice(), [scope.find(name)]
        while pending:
            where, own = pending.pop()
            if (id(where), own) in found.values:
                continue
            found.values.add((id(where), own))
            made_by = where.producers.get(own)
            if made_by is None and own not in where.sparse:
                found.inputs.add((id(where), own))
            if not isinstance(made_by, Visit) or made_by.op in _SHAPES or made_by.op == _QUANTISING:
                continue
            if made_by in self.sites:
                found.layers[made_by] = None
                continue
            found.visits[made_by] = None
            pending += [where.find(each) for each in _list_data(made_by)]
        return found

    def read_back(self, layer: Visit) -> Slice:
        """Follow what a layer is applied to back to the layers before it."""
        return self.trace_back(*self.read(layer))

    def list_readers(self, visit: Visit, passing: Set[str]) -> Iterator[tuple[Visit, int]]:
        """Yield the nodes that read a node's first result, and where, through operators that only pass it on."""
        pending, seen = list(visit.node.output[:1]), set(visit.node.output[:1])
        while pending:
            for reader, position in visit.scope.readers.get(pending.pop(), ()):
                if reader.op in passing or (reader.op == _QUANTISING and position == 0) or _rescales(reader):
                    outputs = [name for name in list(reader.node.output)[:1] if name not in seen]
                    pending += outputs
                    seen.update(outputs)
                elif reader.op not in _SHAPES:
                    yield reader, position

    def list_after(self, visit: Visit) -> set[Visit]:
        """Return every node of the graph that hangs on a node's results."""
        pending, seen = [visit], {visit}
        while pending:
            for name in pending.pop().node.output:
                fresh = {reader for reader, _ in visit.scope.readers.get(name, ())} - seen
                seen |= fresh
                pending += fresh
        return seen - {visit}


def _is_linear(raw: RawSite) -> bool:
    tensor = raw.trace.tensor
    whole = raw.visit.op not in UNREAD and raw.parameter == "weight" and raw.rows is None and raw.section is None
    return whole and SlotKind.LINEAR in raw.use.orientations and tensor is not None and len(raw.trace.sizes) > 1


def _list_data(visit: Visit) -> Sequence[str]:
    inputs = list(visit.node.input)
    if visit.op == "Where":
        return inputs[1:]
    return [name for name in (inputs[:1] if visit.op in _DATA_FIRST else inputs) if name]


def multiply_scalars(visits: Iterable[Visit]) -> float:
    """Return the product of all single numbers that nodes multiply by, but for the scales of quantised products."""
    total = 1.0
    for visit in visits:
        if visit.node.output and compute_scalar(visit.scope, visit.node.output[0]) is not None:
            continue  # It makes the number itself.
        if visit.op == "Mul" and not _reads_steps(visit):
            factors = [number for position in (0, 1) if (number := read_scalar(visit, position)) is not None]
            total *= prod(factors)
        elif visit.op == "Div":
            total /= read_scalar(visit, 1) or 1.0
        elif visit.op in _FACTORS:
            name = _FACTORS[visit.op]
            total *= next((a.f for a in visit.node.attribute if a.name == name), 0.0) or 1.0
    return total


def _reads_steps(visit: Visit) -> bool:
    """Say whether a node reads the step that an activation was just quantised by."""
    made_by = (visit.scope.producer(name) for name in visit.node.input if name)
    return any(isinstance(each, Visit) and each.op == _QUANTISING for each in made_by)


def _rescales(visit: Visit) -> bool:
    """Say whether a node multiplies a product of codes by the steps of its factors."""
    made_by = (visit.scope.producer(name) for name in visit.node.input if visit.op == "Mul" and name)
    return any(isinstance(each, Visit) and each.op == "Mul" and _reads_steps(each) for each in made_by)


def turns_neighbours(visit: Visit) -> bool:
    """Say whether an operator rotates each number with its neighbour, not with the one half a head away."""
    name = "interleaved" if visit.op in _ROTATIONS else "rotary_interleaved"
    return any(each.name == name and each.i for each in visit.node.attribute)


def find_rows(flow: Flow, layer: Visit, part: Slice) -> tuple[int, int] | None:
    """Return start and stop of the rows of a layer that a value is made of, where one Split cuts what it puts out."""
    readers = list(flow.list_readers(layer, _UNCHANGED))
    split = readers[0][0] if len(readers) == 1 else None
    if split is None or split.op != "Split" or not any(a.name == "axis" and a.i == -1 for a in split.node.attribute):
        return None
    lengths = read_integers(split.scope, split.node.input[1]) if len(split.node.input) > 1 else []
    used = [index for index, name in enumerate(split.node.output) if (id(split.scope), name) in part.values]
    if len(used) != 1 or len(lengths) != len(split.node.output) or sum(lengths) != sizes(flow.sites[layer])[0]:
        return None
    return sum(lengths[: used[0]]), sum(lengths[: used[0] + 1])


def reads_vector(visit: Visit) -> bool:
    """Say whether a node reads a constant vector."""
    traces = (trace_constant(visit.scope, name) for name in visit.node.input if name)
    return any(
        t is not None and t.tensor is not None and len(t.tensor.dims) == 1 and t.tensor.dims[0] > 1 for t in traces
    )


def looks_up(visit: Visit, columns: int) -> bool:
    """Say whether a node takes rows from a constant table with so many columns."""
    trace = trace_constant(visit.scope, visit.node.input[0]) if visit.op in _LOOKUPS else None
    tensor = trace.tensor if trace is not None and not trace.blocked else None
    return tensor is not None and len(tensor.dims) == 2 and tensor.dims[1] == columns


def sizes(raw: RawSite) -> tuple[int, int]:
    """Return rows and columns `(out, in)` of a linear layer."""
    if raw.visit.op in ("com.microsoft.MatMulNBits", "com.microsoft.MatMulBnb4"):
        numbers: Mapping[str, int] = {each.name: each.i for each in raw.visit.node.attribute}
        return numbers.get("N", 0), numbers.get("K", 0)
    assert raw.trace.tensor is not None, "chosen so"
    rows, columns = raw.trace.sizes[:2]
    turned = raw.use.orientations[SlotKind.LINEAR] ^ raw.trace.flipped
    return (columns, rows) if turned else (rows, columns)
