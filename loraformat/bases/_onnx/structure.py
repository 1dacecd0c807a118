"""Which linear layer of a graph without names does what: the roles in stacks of transformer layers.

Everything is told by what the values do, nothing by a shape. The product of two activations before a Softmax over its
last axis has the queries at its left and the keys at its right; what the result is multiplied by are the values, and
the layer behind puts out. In a gated block the factor behind the activation is the gate. A residual tells a block from
a classifier, and keys of something else than the queries a decoder from its encoder. Where one layer of a stack does
not look like the others, nothing is told at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loraformat.bases import Role, Roles
from loraformat.bases._onnx.attention import MEMBERS, Core, UnlikeError, is_kept, list_cores
from loraformat.bases._onnx.blocks import NORMS, PASSING, Cuts, list_blocks
from loraformat.bases._onnx.flow import Flow, Value, find_rows, looks_up, reads_vector, sizes, turns_neighbours
from loraformat.bases._onnx.scopes import Scope, Visit
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.stacks import Attention, check_layers, order_stacks, pick_block
from loraformat.bases._roles import Place
from loraformat.containers.onnx_file import GraphStep

_NEAR: Final = 1e-3


@dataclass(frozen=True, slots=True)
class _Told:
    """What one graph of a model tells: its main graph, or a branch.

    Attributes:
        flow: its flow of values.
        layers: nodes by their roles.
        stacks: how many layers each stack has.
        cuts: of layers with several roles, the rows of each.
        is_ordered: as in `Roles`.
        is_unscaled: as in `Roles`.
    """

    flow: Flow
    layers: Mapping[Role, Visit]
    stacks: Mapping[str, int]
    cuts: Cuts
    is_ordered: bool
    is_unscaled: bool


def find_roles(visits: Sequence[Visit], found: Sequence[RawSite], opset: int) -> Roles:
    """Return the roles of linear layers by their sites' ids, or why none are told.

    Args:
        visits: all nodes.
        found: all sites.
        opset: version of ONNX's own operators.
    """
    told: dict[tuple[GraphStep, ...], _Told] = {}
    try:
        for path in dict.fromkeys(visit.scope.path for visit in visits):
            flow = Flow(visits, found, opset, path) if path is not None else None
            cores = list(list_cores(flow)) if flow is not None else []
            if path is not None and flow is not None and cores:
                told[path] = _read_graph(flow, cores)
        _check_branches(told)
    except UnlikeError as unlike:
        return Roles({}, {}, str(unlike))
    by_site: dict[str, Role] = {}
    parts: dict[Role, tuple[Place, ...]] = {}
    for graph in told.values():
        for role, visit in graph.layers.items():
            site = visit.describe(graph.flow.sites[visit].position)
            by_site[site] = role
            for name, rows in graph.cuts.get(visit, {}).items():
                part = Role(role.layer, name, role.stack)
                parts[part] = (*parts.get(part, ()), (site, rows))
    one = next(iter(told.values()))
    is_ordered = any(graph.is_ordered for graph in told.values())
    return Roles(by_site, one.stacks, parts=parts, is_ordered=is_ordered, is_unscaled=one.is_unscaled)


def _check_branches(told: Mapping[tuple[GraphStep, ...], _Told]) -> None:
    """Refuse several graphs that attend, unless they are branches of one node that read the same tensors."""
    if not told:
        raise UnlikeError("no attention was found")
    if len({(path[:-1], path[-1].node) if path else None for path in told}) > 1:
        raise UnlikeError("attention in several graphs that are not branches of one If")
    first, *others = told.values()
    tensors = {role: _identify(first, visit) for role, visit in first.layers.items()}
    for other in others:
        own = {role: _identify(other, visit) for role, visit in other.layers.items()}
        shared = own.keys() & tensors.keys()
        apart = {tensor for role, tensor in own.items() if role not in shared} & set(tensors.values())
        unlike = apart or any(own[role] != tensors[role] for role in shared)
        if unlike or (first.stacks, first.is_unscaled) != (other.stacks, other.is_unscaled):
            raise UnlikeError("the branches of an If do not have the same layers of the same tensors")


def _identify(graph: _Told, visit: Visit) -> int:
    return id(graph.flow.sites[visit].trace.tensor)


def _read_graph(flow: Flow, cores: Sequence[Core]) -> _Told:
    cuts = Cuts()
    stacks = order_stacks(flow, [_read_attention(flow, core, cuts) for core in cores])
    for stack in stacks.values():
        _check_manner([attention for layer in stack for attention in layer])
    blocks = list_blocks(flow, cuts)
    layers: dict[Role, Visit] = {}
    for name, stack in stacks.items():
        own = [
            {(f"cross {role}" if a.crosses else role): visit for a in layer for role, visit in a.layers.items()}
            | dict(pick_block(flow, blocks, stacks, name, number))
            for number, layer in enumerate(stack)
        ]
        for number, layer in enumerate(own):
            for role in ("first", "gate", "up", "gate_up"):
                if role in layer:
                    check_norm(flow, layer[role], f"the block behind attention {number}")
            layers |= {Role(number, role, name): visit for role, visit in layer.items()}
        check_layers(flow, own)
    if len({id(flow.sites[visit].trace.tensor) for visit in layers.values()}) != len(layers):
        raise UnlikeError("a tensor that two layers read")
    is_unscaled = any(a.is_unscaled for stack in stacks.values() for layer in stack for a in layer)
    counts = {name: len(stack) for name, stack in stacks.items()}
    return _Told(flow, layers, counts, cuts, any(core.rows for core in cores), is_unscaled)


def _check_manner(attentions: Sequence[Attention]) -> None:
    """Refuse scores that are not scaled, but where all of a stack are not, and a table of positions is added to each.

    The encoder's keys, to which a decoder attends, have no positions.
    """
    bare = [each for each in attentions if each.is_unscaled]
    if bare and not (len(bare) == len(attentions) and all(each.adds_table for each in attentions if not each.crosses)):
        found = f"multiplies its scores by 1, with heads of {bare[0].head_size}"
        raise UnlikeError(f"{bare[0].where} {found}: what is missing may be folded into a weight")


# --- attention -------------------------------------------------------------------------------------------------------


def _read_attention(flow: Flow, core: Core, cuts: Cuts) -> Attention:
    """Return the layers that make queries, keys and values, or all of them in one, and the one behind.

    Of one for all, the rows of each are noted in `cuts`.
    """
    slices = dict(zip(MEMBERS, (core.query, core.key, core.value), strict=True))
    behind = {reader for reader, _ in flow.list_readers(core.context, PASSING) if reader in flow.sites}
    layers = {name: each.layer for name, each in slices.items()} | {
        "output": behind.pop() if len(behind) == 1 else None
    }
    known = {name: layer for name, layer in layers.items() if layer is not None}
    are_kept = layers["key"] is None and layers["value"] is None and is_kept(core.key) and is_kept(core.value)
    if len(known) != len(layers) - 2 * are_kept:
        raise UnlikeError(f"{core.where} does not have one layer each for queries, keys, values and output")
    if any(turns_neighbours(visit) for visit in (*core.query.visits, *core.key.visits, core.context)):
        raise UnlikeError(f"{core.where} rotates neighbouring numbers: rows may have been moved for it")
    size = core.find_head_size(flow, known["query"])
    is_unscaled = _check_scale(flow, core, size, known)
    heads = core.count_rows(flow, known["query"]) // size
    adds_table = any(looks_up(visit, heads) for visit in core.added.visits)
    source, crosses = _find_source(flow, known, core.where)
    if known["query"] is known.get("key") is known.get("value"):
        found = {name: find_rows(flow, known["query"], each) for name, each in slices.items()}
        cut = core.rows or {name: each for name, each in found.items() if each is not None}
        cuts[known["query"]] = cut if len(set(cut.values())) == len(MEMBERS) else {}
        known = {"qkv": known["query"], "output": known["output"]}
    elif len(set(known.values())) != len(known):
        raise UnlikeError(f"{core.where} has queries, keys and values in two layers")
    return Attention(core.where, known, crosses, source, size, is_unscaled, adds_table)


def _check_scale(flow: Flow, core: Core, size: int, layers: Mapping[str, Visit]) -> bool:
    """Refuse scores that are not divided by the root of the heads' size: that may be folded into a weight.

    Returns whether they are not scaled at all, which only the rest of the stack explains.
    """
    scale = core.multiply(size) if size else 0.0
    scale *= flow.sites[layers["query"]].use.divisor
    scale *= flow.sites[layers["key"]].use.divisor if "key" in layers else 1.0
    counts = [sizes(flow.sites[layer])[name == "output"] for name, layer in layers.items()]
    fits = size > 0 and not any(count % size for count in counts)
    is_scaled, is_unscaled = abs(scale * size**0.5 - 1) <= _NEAR, abs(scale - 1) <= _NEAR
    if not fits or not (is_scaled or is_unscaled):
        found = f"multiplies its scores by {scale:.6g}, with heads of {size}"
        raise UnlikeError(f"{core.where} {found}: what is missing may be folded into a weight")
    return is_unscaled and not is_scaled


def _find_source(flow: Flow, layers: Mapping[str, Visit], where: str) -> tuple[Value | None, bool]:
    """Return what keys and values are made of, None for what a run was given, and whether queries are not.

    Queries are made of what a norm puts out. So are keys and values, or of what a run was given: an encoder's states.
    """
    query = check_norm(flow, layers["query"], where)
    if "key" not in layers:
        return None, True
    scope, name = _skip_back(*flow.read(layers["key"]))
    source = (id(scope), name)
    other_scope, other = _skip_back(*flow.read(layers["value"]))
    if source != (id(other_scope), other):
        raise UnlikeError(f"{where} makes queries, keys and values of different things")
    if source != query and scope.producers.get(name) is not None:
        check_norm(flow, layers["key"], where)
    return source, source != query


def check_norm(flow: Flow, layer: Visit, where: str) -> Value:
    """Refuse a layer whose input was not just scaled by a norm's vector: that may be folded into its weight.

    Returns what the norm puts out.
    """
    scope, name = _skip_back(*flow.read(layer))
    made_by = scope.producers.get(name)
    scaled = isinstance(made_by, Visit) and (
        made_by.op in NORMS or (made_by.op in ("Mul", "Add") and reads_vector(made_by))
    )
    if not scaled:
        raise UnlikeError(f"{where}: the layer {layer.node.name!r} does not read what a norm puts out")
    return id(scope), name


def _skip_back(scope: Scope, name: str) -> tuple[Scope, str]:
    """Return a value before its shape or form was changed."""
    made_by = scope.producers.get(name)
    while isinstance(made_by, Visit) and made_by.op in PASSING:
        scope, name = made_by.scope.find(made_by.node.input[0])
        made_by = scope.producers.get(name)
    return scope, name
