"""Which linear layer of a graph without names does what: the roles in a single stack of transformer layers.

Everything is told by what the values do, nothing by a shape. The product of two activations before a Softmax over its
last axis has the queries at its left and the keys at its right; what the result is multiplied by are the values, and
the layer behind puts out. In a gated block the factor behind the activation is the gate. A residual tells a block from
a classifier. Where one layer of the stack does not look like the others, nothing is told at all.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from loraformat.bases import Role, Roles
from loraformat.bases._onnx_flow import Flow, Slice, find_rows, multiply_scalars, read_last_size, reads_vector, sizes
from loraformat.bases._onnx_scopes import Visit
from loraformat.bases._onnx_sites import RawSite

_PASSING: Final = frozenset({"Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Dropout", "Flatten"})
_MASKING: Final = frozenset({"Add", "Mul", "Div", "Where", "Cast", "Identity", "Reshape", "Sub", "Tanh", "Clip"})
"""What scores go through on their way to the Softmax."""
_AFTER_SOFTMAX: Final = frozenset({"Cast", "Identity", "Reshape", "Dropout", "Where", "IsNaN"})
_PRODUCTS: Final = frozenset({"MatMul", "com.microsoft.FusedMatMul"})
_ACTIVATIONS: Final = frozenset(
    {"Sigmoid", "Tanh", "Erf", "Relu", "Gelu", "Swish", "Elu", "Softplus", "HardSwish", "Mish"}
    | {f"com.microsoft.{name}" for name in ("Gelu", "BiasGelu", "FastGelu", "QuickGelu", "BiasSplitGelu")}
)
_IN_ACTIVATIONS: Final = (
    _ACTIVATIONS
    | frozenset(
        {"Add", "Sub", "Mul", "Div", "Pow", "Cast", "Identity", "Reshape", "Max", "Min", "Clip", "Dropout", "Split"}
    )
    | frozenset({"Slice", "Transpose", "Unsqueeze", "Squeeze", "Flatten"})
)
_NORMS: Final = frozenset({"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"}) | frozenset(
    f"com.microsoft.{name}"
    for name in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization")
)
_SKIPS: Final = frozenset({"com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization"})
_BIASED: Final = frozenset({"Cast", "Identity", "Reshape", "Dropout"})
_LAST_AXES: Final = frozenset({-1, 3})
_NEAR: Final = 1e-3
_Cuts = dict[Visit, Mapping[str, tuple[int, int]]]
"""Of layers that put out queries, keys and values in one, the rows of each."""
_Block = Mapping[str, Visit]
"""Roles of the layers of one attention or one block behind it."""


class _UnlikeError(Exception):
    """The graph is not what is looked for; the message says where."""


def find_roles(visits: Sequence[Visit], found: Sequence[RawSite], opset: int) -> Roles:
    """Return the roles of linear layers by their sites' ids, or why none are told.

    Args:
        visits: all nodes.
        found: all sites.
        opset: version of ONNX's own operators.
    """
    flow, cuts = Flow(visits, found, opset), _Cuts()
    try:
        attentions = [_read_attention(flow, visit, cuts) for visit in _list_cores(flow)]
        attentions = _order(flow, attentions)
        blocks = _list_blocks(flow)
        layers = [
            attention | _pick_block(flow, blocks, attentions, number) for number, attention in enumerate(attentions)
        ]
        _check_layers(flow, layers)
    except _UnlikeError as unlike:
        return Roles({}, 0, str(unlike))
    sites = {visit: raw.visit.describe(raw.position) for visit, raw in flow.sites.items()}
    roles = {sites[visit]: Role(at, name) for at, layer in enumerate(layers) for name, visit in layer.items()}
    packed = ((at, layer["qkv"]) for at, layer in enumerate(layers) if "qkv" in layer)
    parts = {Role(at, name): (sites[visit], rows) for at, visit in packed for name, rows in cuts.get(visit, {}).items()}
    return Roles(roles, len(layers), parts=parts)


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Core:
    """A Softmax between two products of activations.

    Attributes:
        scores: the product before it.
        context: the product behind it.
        between: the nodes between scores and Softmax.
    """

    scores: Visit
    context: Visit
    between: Sequence[Visit] = field(default=())


def _list_cores(flow: Flow) -> Iterator[_Core]:
    for visit in flow.visits:
        if visit.op != "Softmax":
            continue
        scores, between = _find_scores(flow, visit)
        contexts = [
            reader
            for reader, position in flow.list_readers(visit, _AFTER_SOFTMAX)
            if reader.op in _PRODUCTS and reader not in flow.sites and position == 0
        ]
        if len(scores) == 1 and len(set(contexts)) == 1:
            yield _Core(scores[0], contexts[0], between)
        elif scores or contexts:
            raise _UnlikeError(f"the Softmax {visit.node.name!r} is not between two products")


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
    telling = [each for each in scores if all(flow.trace_back(each.scope, name).layers for name in each.node.input[:2])]
    axis = next((a.i for a in softmax.node.attribute if a.name == "axis"), flow.softmax_axis)
    if telling and axis not in _LAST_AXES:
        raise _UnlikeError(f"the Softmax {softmax.node.name!r} is over the axis {axis}")
    return telling, _keep_between(telling, between)


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


def _read_attention(flow: Flow, core: _Core, cuts: _Cuts) -> dict[str, Visit]:
    """Return the layers that make queries, keys and values, or all of them in one, and the one behind.

    Of one for all, the rows of each are noted in `cuts`.
    """
    q, k, v = (
        flow.trace_back(visit.scope, visit.node.input[position])
        for visit, position in ((core.scores, 0), (core.scores, 1), (core.context, 1))
    )
    behind = {reader for reader, _ in flow.list_readers(core.context, _PASSING) if reader in flow.sites}
    where = f"the attention at {core.scores.node.name!r}"
    query, key, value = q.layer, k.layer, v.layer
    if query is None or key is None or value is None or len(behind) != 1:
        raise _UnlikeError(f"{where} does not have one layer each for queries, keys, values and output")
    (output,) = behind
    scale = multiply_scalars(dict.fromkeys((*q.visits, *k.visits, core.scores, *core.between)))
    scale *= flow.sites[query].use.divisor * flow.sites[key].use.divisor
    _check_scale(flow, scale, _find_head_size(flow, q, query), (query, key, value, output), where)
    for layer in {query, key, value}:
        _check_norm(flow, layer, where)
    if query is key is value:
        found = {name: find_rows(flow, query, each) for name, each in (("query", q), ("key", k), ("value", v))}
        rows = {name: each for name, each in found.items() if each is not None}
        cuts[query] = rows if len(set(rows.values())) == len(found) else {}
        return {"qkv": query, "output": output}
    if len({query, key, value}) != 3:
        raise _UnlikeError(f"{where} has queries, keys and values in two layers")
    return {"query": query, "key": key, "value": value, "output": output}


def _find_head_size(flow: Flow, q: Slice, query: Visit) -> int:
    """Return the size of a head, as the graph cuts queries into heads, or 0; where it does not, there is one head."""
    start, stop = find_rows(flow, query, q) or (0, sizes(flow.sites[query])[0])
    rows = stop - start
    cuts = {read_last_size(visit) for visit in q.visits if visit.op == "Reshape"} - {rows}
    return rows if not cuts else cuts.pop() if len(cuts) == 1 else 0


def _check_scale(flow: Flow, scale: float, size: int, layers: Sequence[Visit], where: str) -> None:
    """Refuse scores that are not divided by the root of the heads' size: that may be folded into a weight."""
    query, key, value, output = (sizes(flow.sites[layer]) for layer in layers)
    fits = size > 0 and not any(rows % size for rows in (query[0], key[0], value[0], output[1]))
    if not fits or abs(scale * size**0.5 - 1) > _NEAR:
        found = f"multiplies its scores by {scale:.6g}, with heads of {size}"
        raise _UnlikeError(f"{where} {found}: what is missing may be folded into a weight")


def _check_norm(flow: Flow, layer: Visit, where: str) -> None:
    """Refuse a layer whose input was not just scaled by a norm's vector: that may be folded into its weight."""
    scope, name = flow.read(layer)
    made_by = scope.producers.get(name)
    while isinstance(made_by, Visit) and made_by.op in _PASSING:
        scope, name = made_by.scope.find(made_by.node.input[0])
        made_by = scope.producers.get(name)
    scaled = isinstance(made_by, Visit) and (
        made_by.op in _NORMS or (made_by.op in ("Mul", "Add") and reads_vector(made_by))
    )
    if not scaled:
        raise _UnlikeError(f"{where}: the layer {layer.node.name!r} does not read what a norm puts out")


def _order(flow: Flow, attentions: Sequence[dict[str, Visit]]) -> list[dict[str, Visit]]:
    """Return the attentions from first to last; each must hang on all before it."""
    if not attentions:
        raise _UnlikeError("no attention was found")
    after = [flow.list_after(attention["output"]) for attention in attentions]
    counted = [
        sum(all(layer in others for layer in attention.values()) for others in after) for attention in attentions
    ]
    if sorted(counted) != list(range(len(attentions))):
        raise _UnlikeError("the attentions do not follow one another")
    return [attention for _, attention in sorted(zip(counted, attentions, strict=True), key=lambda pair: pair[0])]


# --- what stands behind attention ------------------------------------------------------------------------------------


def _list_blocks(flow: Flow) -> list[_Block]:
    """Return blocks of two or three layers around an activation, each added to what it was computed from."""
    return [block for layer in flow.sites if (block := _read_block(flow, layer)) and _is_residual(flow, block, layer)]


def _read_block(flow: Flow, down: Visit) -> dict[str, Visit]:
    """Return the layers of a block by its last one; nothing where there is no such block."""
    whole = flow.read_back(down)
    if not whole.ops & _ACTIVATIONS or not whole.ops <= _IN_ACTIVATIONS or len(whole.layers) > 2:
        return {}
    halves = _split_gate(flow, down)
    if halves is not None:
        gate, up = halves
        return {"gate_up": gate, "down": down} if gate is up else {"gate": gate, "up": up, "down": down}
    return {"first": whole.layer, "second": down} if whole.layer is not None else {}


def _split_gate(flow: Flow, down: Visit) -> tuple[Visit, Visit] | None:
    """Return the layers of the two factors that the last layer of a gated block reads: with the activation, without."""
    scope, name = flow.read(down)
    made_by = scope.producers.get(name)
    while isinstance(made_by, Visit) and made_by.op in _BIASED:
        scope, name = made_by.scope.find(made_by.node.input[0])
        made_by = scope.producers.get(name)
    if not isinstance(made_by, Visit) or made_by.op != "Mul":
        return None
    one, other = (flow.trace_back(made_by.scope, factor) for factor in made_by.node.input)
    if _is_active(one) == _is_active(other):
        return None
    gate, up = (one, other) if _is_active(one) else (other, one)
    if gate.layer is None or up.layer is None or (gate.layer is up.layer and not _is_cut(up)):
        return None
    return gate.layer, up.layer


def _is_active(factor: Slice) -> bool:
    return bool(factor.ops & _ACTIVATIONS)


def _is_cut(factor: Slice) -> bool:
    """Say whether a factor is a part of what a layer puts out: x · sigmoid(x) is of the whole, and an activation."""
    return bool(factor.ops & {"Split", "Slice"})


def _is_residual(flow: Flow, block: _Block, down: Visit) -> bool:
    """Say whether what a block puts out is added to a value that its input was made of."""
    first = next(iter(block.values()))
    scope, name = flow.read(first)
    before = flow.trace_back(scope, name).values | {(id(scope), name)}
    current: Visit | None = down
    while current is not None:
        readers = list(flow.list_readers(current, _BIASED))
        if len(readers) != 1:
            return False
        reader, position = readers[0]
        if reader.op != "Add" and reader.op not in _SKIPS:
            return False
        other_scope, other = reader.scope.find(reader.node.input[1 - position]) if position < 2 else (scope, "")
        if (id(other_scope), other) in before:
            return True
        current = reader if reader.op == "Add" and reads_vector(reader) else None
    return False


def _pick_block(
    flow: Flow, blocks: Sequence[_Block], attentions: Sequence[Mapping[str, Visit]], number: int
) -> dict[str, Visit]:
    """Return the block between one attention and the next."""
    after = flow.list_after(attentions[number]["output"])
    later = flow.list_after(attentions[number + 1]["output"]) if number + 1 < len(attentions) else set()
    own = [block for block in blocks if all(layer in after for layer in block.values())]
    own = [block for block in own if not any(layer in later for layer in block.values())]
    if len(own) != 1:
        raise _UnlikeError(f"{len(own)} blocks with an activation follow attention {number}, where one is expected")
    (block,) = own
    down = block["down"] if "down" in block else block["second"]
    following = attentions[number + 1].values() if number + 1 < len(attentions) else ()
    if not set(following) <= flow.list_after(down):
        raise _UnlikeError(f"attention {number + 1} does not follow the block behind attention {number}")
    for layer in block.values():
        if layer is not down:
            _check_norm(flow, layer, f"the block behind attention {number}")
    return dict(block)


def _check_layers(flow: Flow, layers: Sequence[Mapping[str, Visit]]) -> None:
    """Refuse layers of which one is not like the first, and tensors in two roles."""
    first = {name: sizes(flow.sites[visit]) for name, visit in layers[0].items()}
    for number, layer in enumerate(layers):
        if {name: sizes(flow.sites[visit]) for name, visit in layer.items()} != first:
            raise _UnlikeError(f"layer {number} is not like layer 0")
    visits = [visit for layer in layers for visit in layer.values()]
    if len({id(flow.sites[visit].trace.tensor) for visit in visits}) != len(visits):
        raise _UnlikeError("a tensor that two layers read")
