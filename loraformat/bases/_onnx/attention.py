"""Where a graph attends: a Softmax between two products of activations, or one operator that is all of it.

What a product or an operator reads says which value holds the queries, which the keys and which the values. An
operator also says how its rows are cut into heads, and by what it multiplies scores.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Final

from loraformat.bases._onnx.blocks import PASSING
from loraformat.bases._onnx.flow import (
    QUANTISING,
    Flow,
    Slice,
    find_rows,
    multiply_scalars,
    sizes,
)
from loraformat.bases._onnx.numbers import read_last_size
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.uses import read_attribute

if TYPE_CHECKING:
    import onnx

MEMBERS: Final = ("query", "key", "value")
_MASKING: Final = (
    frozenset({"Add", "Mul", "Div", "Where", "Cast", "Identity", "Reshape", "Sub", "Tanh", "Clip"}) | QUANTISING
)
"""What scores go through on their way to the Softmax."""
_AFTER_SOFTMAX: Final = frozenset({"Cast", "Identity", "Reshape", "Dropout", "Where", "IsNaN"}) | QUANTISING
_IN_ORDER: Final = frozenset({"Add", "Mul", "Cast", "Identity", "Reshape"}) | QUANTISING
"""What leaves rows where they are: a bias, a cast, the scales of a quantised product."""
_KEPT: Final = PASSING | {"Mul", "Div", "Expand", "Concat"}
"""What keys and values that a run was given go through: their factor of the scores, repeated heads."""
_PRODUCTS: Final = frozenset({"MatMul", "com.microsoft.FusedMatMul"})
_LAST_AXES: Final = frozenset({-1, 3})
_Run = tuple[int, int]


class UnlikeError(Exception):
    """The graph is not what is looked for; the message says where."""


@dataclass(frozen=True, slots=True)
class Core:
    """Where queries, keys and values come together.

    Attributes:
        where: words for it.
        query: what the queries are made of.
        key: what the keys are made of.
        value: what the values are made of.
        context: the node whose first result the output's layer reads.
        factor: what queries, keys and scores are multiplied by between their layers and the Softmax.
        added: what is added to the scores.
        scale: by what an operator multiplies scores besides; None for 1/√(size of a head), its default.
        head_size: the size of a head, as an operator says; 0 where the graph's own cuts tell.
        rows: of queries, keys and values in one layer, the rows of each, as an operator cuts them.
    """

    where: str
    query: Slice
    key: Slice
    value: Slice
    context: Visit
    factor: float
    added: Slice = field(default_factory=Slice)
    scale: float | None = 1.0
    head_size: int = 0
    rows: Mapping[str, _Run] = field(default_factory=dict)

    def multiply(self, head_size: int) -> float:
        """Return what scores are multiplied by, for heads of a size."""
        return self.factor * (self.scale if self.scale is not None else head_size**-0.5)

    def count_rows(self, flow: Flow, layer: Visit) -> int:
        """Return how many rows of the layer that makes them are those of queries."""
        whole = (0, sizes(flow.sites[layer])[0])
        start, stop = self.rows.get("query") or find_rows(flow, layer, self.query) or whole
        return stop - start

    def find_head_size(self, flow: Flow, layer: Visit) -> int:
        """Return the size of a head, or 0; where the graph does not cut queries into heads, there is one."""
        if self.head_size:
            return self.head_size
        rows = self.count_rows(flow, layer)
        cuts = {read_last_size(visit) for visit in self.query.visits if visit.op == "Reshape"} - {rows}
        return rows if not cuts else cuts.pop() if len(cuts) == 1 else 0


def list_cores(flow: Flow) -> Iterator[Core]:
    """Yield every place where the main graph attends; raise UnlikeError for one that cannot be read."""
    for visit in flow.visits:
        if visit.op == "Softmax":
            yield from _read_softmax(flow, visit)
        elif visit.op in _OPERATORS:
            yield _read_operator(flow, visit)
        elif visit.op.endswith("Attention"):
            raise UnlikeError(f"{_describe(visit)} is an operator whose inputs are not known")


# --- a Softmax between two products ----------------------------------------------------------------------------------


def _read_softmax(flow: Flow, visit: Visit) -> Iterator[Core]:
    scores, between = _find_scores(flow, visit)
    contexts = {
        reader
        for reader, position in flow.list_readers(visit, _AFTER_SOFTMAX)
        if reader.op in _PRODUCTS and reader not in flow.sites and position == 0
    }
    turned = any(read_attribute(context.node, "transA", 0) for context in contexts)
    if len(scores) == 1 and len(contexts) == 1 and not turned:
        (product,), (context,) = scores, contexts
        q, k, v = (
            flow.trace_back(each.scope, each.node.input[position])
            for each, position in ((product, 0), (product, 1), (context, 1))
        )
        scale = multiply_scalars(dict.fromkeys((*q.visits, *k.visits, product, *between)))
        yield Core(
            f"the attention at {product.node.name!r}", q, k, v, context, scale, _find_added(flow, product, between)
        )
    elif scores or contexts:
        raise UnlikeError(f"the Softmax {visit.node.name!r} is not between two products")


def _find_scores(flow: Flow, softmax: Visit) -> tuple[list[Visit], list[Visit]]:
    """Return the products of activations that a Softmax over its last axis is taken of, and the nodes between."""
    pending: list[Visit] = [softmax]
    between: dict[Visit, None] = {}
    scores: dict[Visit, None] = {}
    while pending:
        visit = pending.pop()
        for name in visit.node.input[1:] if visit.op == "Where" else visit.node.input:
            made_by = visit.scope.producer(name) if name else None
            if not isinstance(made_by, Visit) or made_by in between or made_by in scores:
                continue
            if made_by.op in _PRODUCTS and made_by not in flow.sites:
                scores[made_by] = None
            elif made_by.op in _MASKING and made_by not in flow.sites:
                between[made_by] = None
                pending.append(made_by)
    telling = [each for each in scores if _is_of_layers(flow, each)]
    axis = next((a.i for a in softmax.node.attribute if a.name == "axis"), flow.softmax_axis)
    if telling and axis not in _LAST_AXES:
        raise UnlikeError(f"the Softmax {softmax.node.name!r} is over the axis {axis}")
    return telling, _keep_between(telling, between)


def _is_of_layers(flow: Flow, product: Visit) -> bool:
    """Say whether a product is one of queries, which a layer makes, and keys, which a run may be given."""
    left, right = (flow.trace_back(product.scope, name) for name in product.node.input[:2])
    return bool(left.layers) and (bool(right.layers) or is_kept(right))


def is_kept(part: Slice) -> bool:
    """Say whether a value is what a run was given, as the keys of the encoder's states that a cache holds."""
    return not part.layers and len(part.inputs) == 1 and part.ops <= _KEPT


def _keep_between(scores: Sequence[Visit], nodes: Collection[Visit]) -> list[Visit]:
    """Return the nodes that scores go through, without those that make masks."""
    pending, kept = list(scores), dict[Visit, None]()
    while pending:
        visit = pending.pop()
        readers = (reader for name in visit.node.output for reader, _ in visit.scope.readers.get(name, ()))
        fresh = {reader: None for reader in readers if reader in nodes and reader not in kept}
        kept |= fresh
        pending += fresh
    return list(kept)


def _find_added(flow: Flow, product: Visit, between: Sequence[Visit]) -> Slice:
    """Return what is added to scores on their way: masks, and numbers that tell positions."""
    added, way = Slice(), {product, *between}
    for visit in between:
        others = [name for name in visit.node.input if visit.op == "Add" and visit.scope.producer(name) not in way]
        for name in others:
            added.visits |= flow.trace_back(visit.scope, name).visits
    return added


# --- one operator ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Heads:
    """How an operator cuts what it reads into heads.

    Attributes:
        queries: how many heads the queries have; 0 where they come cut.
        keys: how many heads the keys have, and the values.
    """

    queries: int
    keys: int


def _read_operator(flow: Flow, visit: Visit) -> Core:
    where = _describe(visit)
    heads = _OPERATORS[visit.op](visit.node)
    if visit.op in _HOLDING:
        return _read_holding(flow, visit, heads, where)
    given = [name for name in visit.node.input[:3] if name]
    if len(given) == 1 and visit.op == _GROUPED:
        return _read_packed(flow, visit, heads, where)
    if len(given) != len(MEMBERS):
        raise UnlikeError(f"{where} reads queries, keys and values in {len(given)} inputs, head by head")
    q, k, v = (flow.trace_back(visit.scope, name) for name in given)
    size = _divide(flow, (q, k), heads, where) if heads.queries else 0
    factor = multiply_scalars(dict.fromkeys((*q.visits, *k.visits)))
    added = _trace_input(flow, visit, _ADDED.get(visit.op))
    return Core(where, q, k, v, visit, factor, added, _read_scale(visit.node), size)


def _read_holding(flow: Flow, visit: Visit, heads: _Heads, where: str) -> Core:
    """Read an operator that holds the weights of q, k and v itself, side by side."""
    if visit not in flow.sites:
        raise UnlikeError(f"{where} does not hold one stored matrix")
    rows = sizes(flow.sites[visit])[0]
    cuts = next((list(a.ints) for a in visit.node.attribute if a.name == "qkv_hidden_sizes"), [rows // 3] * 3)
    if len(cuts) != len(MEMBERS) or sum(cuts) != rows or min(cuts) <= 0 or not heads.queries or cuts[0] % heads.queries:
        raise UnlikeError(f"{where} cuts {rows} rows into {cuts}, for {heads.queries} heads")
    whole, scale = Slice(layers={visit: None}), _read_scale(visit.node)
    added = _trace_input(flow, visit, _ADDED.get(visit.op))
    return Core(where, whole, whole, whole, visit, 1.0, added, scale, cuts[0] // heads.queries, _name_runs(cuts))


def _trace_input(flow: Flow, visit: Visit, position: int | None) -> Slice:
    name = visit.read_input(position) if position is not None else ""
    return flow.trace_back(visit.scope, name) if name else Slice()


def _read_packed(flow: Flow, visit: Visit, heads: _Heads, where: str) -> Core:
    """Read an operator to which one layer gives queries, then keys, then values."""
    whole = flow.trace_back(visit.scope, visit.node.input[0])
    layer, count = whole.layer, heads.queries + 2 * heads.keys
    rows = sizes(flow.sites[layer])[0] if layer is not None else 0
    if layer is None or not whole.ops <= _IN_ORDER or min(heads.queries, heads.keys) <= 0 or rows % count:
        through = ", ".join(sorted(whole.ops))
        raise UnlikeError(f"{where} reads {rows} rows of one layer in {count} heads, through {through or 'nothing'}")
    size = rows // count
    cuts = [heads.queries * size, heads.keys * size, heads.keys * size]
    factor = multiply_scalars(whole.visits) ** 2  # Queries and keys both.
    return Core(where, whole, whole, whole, visit, factor, Slice(), _read_scale(visit.node), size, _name_runs(cuts))


def _divide(flow: Flow, parts: Sequence[Slice], heads: _Heads, where: str) -> int:
    """Return the size of a head of queries, which keys must have too, as the operator counts heads."""
    counts = (heads.queries, heads.keys)
    found = []
    for part, count in zip(parts, counts, strict=False):
        layer = part.layer
        if layer is None or count <= 0:
            raise UnlikeError(f"{where} does not have one layer each for queries, keys, values and output")
        start, stop = find_rows(flow, layer, part) or (0, sizes(flow.sites[layer])[0])
        found.append((stop - start, count))
    if any(rows % count for rows, count in found) or len({rows // count for rows, count in found}) != 1:
        raise UnlikeError(f"{where} cuts queries and keys of {found[0][0]} and {found[1][0]} rows into {counts} heads")
    return found[0][0] // heads.queries


def _name_runs(cuts: Sequence[int]) -> dict[str, _Run]:
    return dict(zip(MEMBERS, pairwise(accumulate(cuts, initial=0)), strict=True))


def _read_scale(node: "onnx.NodeProto") -> float | None:
    return float(read_attribute(node, "scale", 0.0)) or None


def _describe(visit: Visit) -> str:
    return f"the {visit.op} {visit.node.name!r}"


def _read_one_count(node: "onnx.NodeProto") -> _Heads:
    count = int(read_attribute(node, "num_heads", 0))
    return _Heads(count, count)


def _read_two_counts(node: "onnx.NodeProto") -> _Heads:
    return _Heads(int(read_attribute(node, "num_heads", 0)), int(read_attribute(node, "kv_num_heads", 0)))


def _read_own_counts(node: "onnx.NodeProto") -> _Heads:
    return _Heads(int(read_attribute(node, "q_num_heads", 0)), int(read_attribute(node, "kv_num_heads", 0)))


_GROUPED: Final = "com.microsoft.GroupQueryAttention"
_HOLDING: Final = frozenset({"com.microsoft.Attention", "com.microsoft.QAttention"})
_OPERATORS: Final[Mapping[str, "Callable[[onnx.NodeProto], _Heads]"]] = {
    "Attention": _read_own_counts,
    "com.microsoft.Attention": _read_one_count,
    "com.microsoft.QAttention": _read_one_count,
    "com.microsoft.MultiHeadAttention": _read_one_count,
    _GROUPED: _read_two_counts,
}
"""Operators that attend, and how each counts heads."""
_ADDED: Final = {"Attention": 3, "com.microsoft.Attention": 5, "com.microsoft.MultiHeadAttention": 5}
"""Which input of theirs is added to the scores."""
