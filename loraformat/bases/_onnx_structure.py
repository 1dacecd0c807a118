"""Which linear layer of a graph without names does what: the roles in a single stack of transformer layers.

Everything is told by what the values do, nothing by a shape. The product of two activations before a Softmax over its
last axis has the queries at its left and the keys at its right; what the result is multiplied by are the values, and
the layer behind puts out. In a gated block the factor behind the activation is the gate. A residual tells a block from
a classifier. Where one layer of the stack does not look like the others, nothing is told at all.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from loraformat.bases import Role, Roles
from loraformat.bases._onnx_attention import MEMBERS, Core, UnlikeError, list_cores
from loraformat.bases._onnx_flow import (
    QUANTISING,
    Flow,
    Slice,
    Value,
    find_rows,
    reads_vector,
    sizes,
    turns_neighbours,
)
from loraformat.bases._onnx_scopes import Visit
from loraformat.bases._onnx_sites import RawSite

PASSING: Final = (
    frozenset({"Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Dropout", "Flatten"}) | QUANTISING
)
_ACTIVATIONS: Final = frozenset(
    {"Sigmoid", "Tanh", "Erf", "Relu", "Gelu", "Swish", "Elu", "Softplus", "HardSwish", "Mish"}
    | {f"com.microsoft.{name}" for name in ("Gelu", "BiasGelu", "FastGelu", "QuickGelu", "BiasSplitGelu")}
)
_IN_ACTIVATIONS: Final = (
    _ACTIVATIONS
    | frozenset(
        {"Add", "Sub", "Mul", "Div", "Pow", "Cast", "Identity", "Reshape", "Max", "Min", "Clip", "Dropout", "Split"}
        | {"SplitToSequence", "SequenceAt"}
    )
    | frozenset({"Slice", "Transpose", "Unsqueeze", "Squeeze", "Flatten"})
    | QUANTISING
)
NORMS: Final = frozenset({"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"}) | frozenset(
    f"com.microsoft.{name}"
    for name in (
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "EmbedLayerNormalization",
        "QEmbedLayerNormalization",
    )
)
_SKIPS: Final = frozenset({"com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization"})
_BIASED: Final = frozenset({"Cast", "Identity", "Reshape", "Dropout"}) | QUANTISING
_SUM: Final = 3
"""Which output of theirs is the sum that they take the norm of."""
_NEAR: Final = 1e-3
_Cuts = dict[Visit, Mapping[str, tuple[int, int]]]
"""Of layers that put out queries, keys and values in one, or gates and what they gate, the rows of each."""
_Block = Mapping[str, Visit]
"""Roles of the layers of one attention or one block behind it."""


def find_roles(visits: Sequence[Visit], found: Sequence[RawSite], opset: int) -> Roles:
    """Return the roles of linear layers by their sites' ids, or why none are told.

    Args:
        visits: all nodes.
        found: all sites.
        opset: version of ONNX's own operators.
    """
    flow, cuts = Flow(visits, found, opset), _Cuts()
    try:
        cores = list(list_cores(flow))
        attentions = _order(flow, [_read_attention(flow, core, cuts) for core in cores])
        blocks = list_blocks(flow, cuts)
        layers = [
            attention | _pick_block(flow, blocks, attentions, number) for number, attention in enumerate(attentions)
        ]
        _check_layers(flow, layers)
    except UnlikeError as unlike:
        return Roles({}, 0, str(unlike))
    sites = {visit: raw.visit.describe(raw.position) for visit, raw in flow.sites.items()}
    roles = {sites[visit]: Role(at, name) for at, layer in enumerate(layers) for name, visit in layer.items()}
    parts = {
        Role(at, name): (sites[visit], rows)
        for at, layer in enumerate(layers)
        for visit in layer.values()
        for name, rows in cuts.get(visit, {}).items()
    }
    return Roles(roles, len(layers), parts=parts, is_ordered=any(core.rows for core in cores))


# --- attention -------------------------------------------------------------------------------------------------------


def _read_attention(flow: Flow, core: Core, cuts: _Cuts) -> dict[str, Visit]:
    """Return the layers that make queries, keys and values, or all of them in one, and the one behind.

    Of one for all, the rows of each are noted in `cuts`.
    """
    slices = dict(zip(MEMBERS, (core.query, core.key, core.value), strict=True))
    behind = {reader for reader, _ in flow.list_readers(core.context, PASSING) if reader in flow.sites}
    query, key, value = core.query.layer, core.key.layer, core.value.layer
    if query is None or key is None or value is None or len(behind) != 1:
        raise UnlikeError(f"{core.where} does not have one layer each for queries, keys, values and output")
    (output,) = behind
    if any(turns_neighbours(visit) for visit in (*core.query.visits, *core.key.visits, core.context)):
        raise UnlikeError(f"{core.where} rotates neighbouring numbers: rows may have been moved for it")
    size = core.find_head_size(flow, query)
    scale = core.multiply(size) if size else 0.0
    scale *= flow.sites[query].use.divisor * flow.sites[key].use.divisor
    _check_scale(flow, scale, size, (query, key, value, output), core.where)
    if len({check_norm(flow, layer, core.where) for layer in (query, key, value)}) != 1:
        raise UnlikeError(f"{core.where} makes queries, keys and values of different things")
    if query is key is value:
        found = {name: find_rows(flow, query, each) for name, each in slices.items()}
        rows = core.rows or {name: each for name, each in found.items() if each is not None}
        cuts[query] = rows if len(set(rows.values())) == len(MEMBERS) else {}
        return {"qkv": query, "output": output}
    if len({query, key, value}) != 3:
        raise UnlikeError(f"{core.where} has queries, keys and values in two layers")
    return {"query": query, "key": key, "value": value, "output": output}


def _check_scale(flow: Flow, scale: float, size: int, layers: Sequence[Visit], where: str) -> None:
    """Refuse scores that are not divided by the root of the heads' size: that may be folded into a weight."""
    query, key, value, output = (sizes(flow.sites[layer]) for layer in layers)
    fits = size > 0 and not any(rows % size for rows in (query[0], key[0], value[0], output[1]))
    if not fits or abs(scale * size**0.5 - 1) > _NEAR:
        found = f"multiplies its scores by {scale:.6g}, with heads of {size}"
        raise UnlikeError(f"{where} {found}: what is missing may be folded into a weight")


def check_norm(flow: Flow, layer: Visit, where: str) -> Value:
    """Refuse a layer whose input was not just scaled by a norm's vector: that may be folded into its weight.

    Returns what the norm puts out.
    """
    scope, name = flow.read(layer)
    made_by = scope.producers.get(name)
    while isinstance(made_by, Visit) and made_by.op in PASSING:
        scope, name = made_by.scope.find(made_by.node.input[0])
        made_by = scope.producers.get(name)
    scaled = isinstance(made_by, Visit) and (
        made_by.op in NORMS or (made_by.op in ("Mul", "Add") and reads_vector(made_by))
    )
    if not scaled:
        raise UnlikeError(f"{where}: the layer {layer.node.name!r} does not read what a norm puts out")
    return id(scope), name


def _order(flow: Flow, attentions: Sequence[dict[str, Visit]]) -> list[dict[str, Visit]]:
    """Return the attentions from first to last; each must hang on all before it."""
    if not attentions:
        raise UnlikeError("no attention was found")
    after = [flow.list_after(attention["output"]) for attention in attentions]
    counted = [
        sum(all(layer in others for layer in attention.values()) for others in after) for attention in attentions
    ]
    if sorted(counted) != list(range(len(attentions))):
        raise UnlikeError("the attentions do not follow one another")
    return [attention for _, attention in sorted(zip(counted, attentions, strict=True), key=lambda pair: pair[0])]


# --- what stands behind attention ------------------------------------------------------------------------------------


def list_blocks(flow: Flow, cuts: _Cuts) -> list[_Block]:
    """Return blocks of two or three layers around an activation, each added to what it was computed from."""
    found = [(layer, _read_block(flow, layer, cuts)) for layer in flow.sites]
    return [block for layer, block in found if block and _is_residual(flow, block, layer)]


def _read_block(flow: Flow, down: Visit, cuts: _Cuts) -> dict[str, Visit]:
    """Return the layers of a block by its last one; nothing where there is no such block.

    Where one layer makes both the gates and what they gate, the rows of each are noted in `cuts`.
    """
    whole = flow.read_back(down)
    if not whole.ops & _ACTIVATIONS or not whole.ops <= _IN_ACTIVATIONS or len(whole.layers) > 2:
        return {}
    halves = _split_gate(flow, down)
    if halves is None:
        return {"first": whole.layer, "second": down} if whole.layer is not None else {}
    gate, up = (each.layer for each in halves)
    assert gate is not None, "split so"
    assert up is not None, "split so"
    if gate is not up:
        return {"gate": gate, "up": up, "down": down}
    found = {name: find_rows(flow, gate, each) for name, each in zip(("gate", "up"), halves, strict=True)}
    rows = {name: each for name, each in found.items() if each is not None}
    cuts[gate] = rows if len(set(rows.values())) == len(found) else {}
    return {"gate_up": gate, "down": down}


def _split_gate(flow: Flow, down: Visit) -> tuple[Slice, Slice] | None:
    """Return the two factors that the last layer of a gated block reads: with the activation, without."""
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
    return gate, up


def _is_active(factor: Slice) -> bool:
    return bool(factor.ops & _ACTIVATIONS)


def _is_cut(factor: Slice) -> bool:
    """Say whether a factor is a part of what a layer puts out: x · sigmoid(x) is of the whole, and an activation."""
    return bool(factor.ops & {"Split", "Slice", "SequenceAt"})


def _is_residual(flow: Flow, block: _Block, down: Visit) -> bool:
    """Say whether what a block puts out is added to a value that its input was made of."""
    first = next(iter(block.values()))
    scope, name = flow.read(first)
    made_of = flow.trace_back(scope, name)
    sums = ((id(each.scope), each.node.output[_SUM]) for each in made_of.visits if each.op in _SKIPS and _sums(each))
    before = made_of.values | {(id(scope), name), *sums}
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


def _sums(skip: Visit) -> bool:
    """Say whether a norm of a sum puts out the sum too."""
    return len(skip.node.output) > _SUM and bool(skip.node.output[_SUM])


def _pick_block(
    flow: Flow, blocks: Sequence[_Block], attentions: Sequence[Mapping[str, Visit]], number: int
) -> dict[str, Visit]:
    """Return the block between one attention and the next."""
    after = flow.list_after(attentions[number]["output"])
    later = flow.list_after(attentions[number + 1]["output"]) if number + 1 < len(attentions) else set()
    own = [block for block in blocks if all(layer in after for layer in block.values())]
    own = [block for block in own if not any(layer in later for layer in block.values())]
    if len(own) != 1:
        raise UnlikeError(f"{len(own)} blocks with an activation follow attention {number}, where one is expected")
    (block,) = own
    down = block["down"] if "down" in block else block["second"]
    following = attentions[number + 1].values() if number + 1 < len(attentions) else ()
    if not set(following) <= flow.list_after(down):
        raise UnlikeError(f"attention {number + 1} does not follow the block behind attention {number}")
    for layer in block.values():
        if layer is not down:
            check_norm(flow, layer, f"the block behind attention {number}")
    return dict(block)


def _check_layers(flow: Flow, layers: Sequence[Mapping[str, Visit]]) -> None:
    """Refuse layers of which one is not like the first, and tensors in two roles."""
    first = {name: sizes(flow.sites[visit]) for name, visit in layers[0].items()}
    for number, layer in enumerate(layers):
        if {name: sizes(flow.sites[visit]) for name, visit in layer.items()} != first:
            raise UnlikeError(f"layer {number} is not like layer 0")
    visits = [visit for layer in layers for visit in layer.values()]
    if len({id(flow.sites[visit].trace.tensor) for visit in visits}) != len(visits):
        raise UnlikeError("a tensor that two layers read")
