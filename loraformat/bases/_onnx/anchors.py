"""Names that are left beside layers that have none: biases, norms of heads, the norm in front.

The flow of values says which layers make up an attention or a block behind one, and what each does; a name beside them
says whose they are. A norm in front tells that only where nothing else reads its result: not where a layer's last norm
is what the next one begins with, nor where a layer that is not understood may be meant.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loraformat.bases import Anchor, Anchors, Role, Roles
from loraformat.bases._onnx.attention import MEMBERS, Core, UnlikeError, list_cores
from loraformat.bases._onnx.blocks import NORMS, PASSING, list_blocks
from loraformat.bases._onnx.flow import Flow, Slice, find_rows, sizes, turns_neighbours
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.traces import trace_constant
from loraformat.bases._onnx.views import list_readers

_VECTORS: Final[Mapping[str, tuple[int, ...]]] = {
    "LayerNormalization": (1, 2),
    "SimplifiedLayerNormalization": (1,),
    "RMSNormalization": (1,),
    "com.microsoft.SkipLayerNormalization": (2, 3),
    "com.microsoft.SkipSimplifiedLayerNormalization": (2,),
    "Mul": (0, 1),
}
"""Operators to the inputs with a norm's own vectors."""
_CUTTING: Final = PASSING | {"Split", "Slice"}
_SHAPES: Final = frozenset({"Shape", "Size"})
_STEPS: Final = 8
_NUMBERED: Final = re.compile(r"(?:^|\.)\d+\.[^.]+$")
_OF_HEADS: Final = {
    "query": re.compile(r"\.(?:(?:q|query)_?(?:norm|layernorm|layer_norm|ln)|norm_q)$"),
    "key": re.compile(r"\.(?:(?:k|key)_?(?:norm|layernorm|layer_norm|ln)|norm_k)$"),
}
_UNSCALED: Final = "SelfAttention.relative_attention_bias.weight"
"""What T5 has, whose attention does not divide its scores."""
_NEAR: Final = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Layers that work together.

    Attributes:
        layers: their nodes by roles.
        norm: the node whose result the first of them read.
        anchor: the names beside them.
    """

    layers: Mapping[str, Visit]
    norm: Visit | None
    anchor: Anchor


def find_anchors(visits: Sequence[Visit], found: Sequence[RawSite], opset: int) -> Anchors:
    """Return which linear layers work together, what each does, and which names stand beside them.

    Args:
        visits: all nodes.
        found: all sites.
        opset: version of ONNX's own operators.
    """
    flow, reason = Flow(visits, found, opset), ""
    cuts: dict[Visit, Mapping[str, tuple[int, int]]] = {}
    is_ordered = False
    try:
        cores = list(list_cores(flow))
        groups = [_read_attention(flow, core, cuts) for core in cores]
        is_ordered = any(core.rows for core in cores)
    except UnlikeError as unlike:
        groups, reason = [], str(unlike)
    groups += [_read_block(flow, block) for block in list_blocks(flow, cuts)]
    sites = {visit: raw.visit.describe(raw.position) for visit, raw in flow.sites.items()}
    roles = {sites[visit]: Role(at, name) for at, group in enumerate(groups) for name, visit in group.layers.items()}
    parts = {
        Role(at, name): ((sites[visit], rows),)
        for at, group in enumerate(groups)
        for visit in group.layers.values()
        for name, rows in cuts.get(visit, {}).items()
    }
    kept = Roles(roles, {"": len(groups)}, parts=parts, is_ordered=is_ordered)
    return Anchors(kept, tuple(_keep_norms(flow, groups, all_known=not reason)), reason)


# --- groups ----------------------------------------------------------------------------------------------------------


def _read_attention(flow: Flow, core: Core, cuts: dict[Visit, Mapping[str, tuple[int, int]]]) -> _Group:
    """Return the layers around one attention; UnlikeError where not all can be told, or numbers may be folded in."""
    slices = dict(zip(MEMBERS, (core.query, core.key, core.value), strict=True))
    behind = [reader for reader, _ in flow.list_readers(core.context, PASSING) if reader in flow.sites]
    layers = {name: each.layer for name, each in slices.items()} | {"output": behind[0] if len(behind) == 1 else None}
    known = {name: layer for name, layer in layers.items() if layer is not None}
    if len(known) != len(layers):
        raise UnlikeError(f"{core.where} does not have one layer each for queries, keys, values and output")
    if any(turns_neighbours(visit) for visit in (*core.query.visits, *core.key.visits, core.context)):
        raise UnlikeError(f"{core.where} rotates neighbouring numbers: rows may have been moved for it")
    _check_scale(flow, core, known)
    sources = [_find_source(flow, known[name]) for name in MEMBERS]
    if sources[1] != sources[2]:
        raise UnlikeError(f"{core.where} makes keys and values of different things")
    named = _name_members(flow, slices, known)
    if len({known[name] for name in MEMBERS}) == 1:
        found = {name: find_rows(flow, known["query"], each) for name, each in slices.items()}
        rows = core.rows or {name: each for name, each in found.items() if each is not None}
        cuts[known["query"]] = rows if len(set(rows.values())) == len(MEMBERS) else {}
        known = {"qkv": known["query"], "output": known["output"]}
    elif len({known[name] for name in MEMBERS}) != len(MEMBERS):
        raise UnlikeError(f"{core.where} has queries, keys and values in two layers")
    norm = sources[0][1]
    return _Group(known, norm, Anchor(True, named, _name_norm(norm), sources[0] != sources[1]))


def _check_scale(flow: Flow, core: Core, layers: Mapping[str, Visit]) -> None:
    """Refuse scores that are not divided by the root of the heads' size: that may be folded into a weight."""
    size = core.find_head_size(flow, layers["query"])
    rows = (*(sizes(flow.sites[layers[name]])[0] for name in MEMBERS), sizes(flow.sites[layers["output"]])[1])
    if not size or any(count % size for count in rows):
        raise UnlikeError(f"{core.where} has heads of an unknown size")
    scale = core.multiply(size) * flow.sites[layers["query"]].use.divisor * flow.sites[layers["key"]].use.divisor
    is_unscaled = abs(scale - 1) <= _NEAR and any(
        name.endswith(_UNSCALED) for visit in flow.visits for name in visit.node.input
    )
    if abs(scale * size**0.5 - 1) > _NEAR and not is_unscaled:
        found = f"multiplies its scores by {scale:.6g}, with heads of {size}"
        raise UnlikeError(f"{core.where} {found}: what is missing may be folded into a weight")


def _find_source(flow: Flow, layer: Visit) -> tuple[tuple[int, str], Visit | None]:
    """Return the value that a layer is applied to, before its shape was changed, and the node that makes it."""
    scope, name = flow.read(layer)
    made_by = scope.producers.get(name)
    while isinstance(made_by, Visit) and made_by.op in PASSING:
        scope, name = made_by.scope.find(made_by.node.input[0])
        made_by = scope.producers.get(name)
    return (id(scope), name), made_by if isinstance(made_by, Visit) else None


def _read_block(flow: Flow, block: Mapping[str, Visit]) -> _Group:
    """Return the layers of a block, with the norm that its first ones read."""
    sources = {_find_source(flow, layer) for name, layer in block.items() if name not in ("down", "second")}
    norm = sources.pop()[1] if len(sources) == 1 else None
    named = {name: flow.sites[layer].module for name, layer in block.items() if flow.sites[layer].module}
    return _Group(block, norm, Anchor(False, named, _name_norm(norm)))


# --- names -----------------------------------------------------------------------------------------------------------


def _name_members(flow: Flow, slices: Mapping[str, Slice], layers: Mapping[str, Visit]) -> dict[str, str]:
    """Return what names stand at the layers of an attention, at their biases and at the norms of heads."""
    apart = len({layers[name] for name in MEMBERS}) > 1
    named = {name: flow.sites[layer].module for name, layer in layers.items() if name == "output" or apart}
    if not apart:
        named["qkv"] = flow.sites[layers["query"]].module
    for name, each in slices.items():
        biases = set(_list_biases(flow, each, layers[name]))
        if not named.get(name) and len(biases) == 1:
            named[name] = biases.pop()
        norms = {_name_norm(visit) for visit in each.visits} if name in _OF_HEADS else set()
        norms = {norm for norm in norms if _OF_HEADS[name].search(norm)}
        if len(norms) == 1:
            named[f"{name}_norm"] = norms.pop()
    return {name: path for name, path in named.items() if path}


def _list_biases(flow: Flow, part: Slice, layer: Visit) -> Iterator[str]:
    """Yield the modules of the biases that are added to what a layer puts out, or to a part of it."""
    for visit in part.visits:
        if visit.op != "Add" or len(visit.node.input) != 2:
            continue
        for name, other in (visit.node.input, reversed(visit.node.input)):
            trace = trace_constant(visit.scope, name)
            tensor = trace.tensor if trace is not None and not trace.blocked else None
            if tensor is None or len(tensor.dims) != 1 or _skip_back(flow, visit, other) is not layer:
                continue
            yield from {each.removesuffix(".bias") for each in (name, tensor.name) if each.endswith(".bias")}


def _skip_back(flow: Flow, visit: Visit, name: str) -> Visit | None:
    """Return the node that makes a value, before it was cut and its shape was changed."""
    made_by = visit.scope.producer(name)
    for _ in range(_STEPS):
        if isinstance(made_by, Visit) and made_by.op in _CUTTING and made_by not in flow.sites:
            made_by = made_by.scope.producer(made_by.node.input[0])
    return made_by if isinstance(made_by, Visit) else None


def _name_norm(visit: Visit | None) -> str:
    """Return the path of the norm whose vectors a node applies; nothing where no name tells, or others read them."""
    if visit is not None and visit.op == "Add":
        return _name_shifted(visit)
    owners = set(_list_owners(visit, _VECTORS.get(visit.op, ()))) if visit is not None else set()
    return owners.pop() if len(owners) == 1 else ""


def _name_shifted(visit: Visit) -> str:
    """Return the path of a norm whose vectors are applied by a Mul, and the Add that this is."""
    before = [visit.scope.producer(name) for name in visit.node.input]
    scaled = {_name_norm(each) for each in before if isinstance(each, Visit) and each.op == "Mul"} - {""}
    return scaled.pop() if len(scaled) == 1 and scaled == set(_list_owners(visit, (0, 1))) else ""


def _list_owners(visit: Visit, positions: Iterable[int]) -> Iterator[str]:
    """Yield the modules of the vectors that a node reads; an empty path for one that is not its alone."""
    for position in positions:
        name = visit.read_input(position)
        trace = trace_constant(visit.scope, name) if name else None
        if trace is None or trace.tensor is None or len(trace.tensor.dims) != 1:
            continue
        read = {name, trace.tensor.name, *(step.node.input[0] for step in trace.steps)}
        owners = {each.rpartition(".")[0] for each in read if each.endswith((".weight", ".bias"))}
        yield owners.pop() if len(owners) == 1 and len(set(list_readers(trace))) == 1 else ""


# --- which norms tell ------------------------------------------------------------------------------------------------


def _keep_norms(flow: Flow, groups: Sequence[_Group], *, all_known: bool) -> list[Anchor]:
    """Return the anchors, without the norms that may be those of other layers."""
    members = {visit for group in groups for visit in group.layers.values()}
    unknown = {layer for layer, raw in flow.sites.items() if layer not in members and not raw.module}
    doubtful = {_parent(norm) for layer in unknown for norm in _list_norms(flow, layer)}
    kept = [
        group
        if all_known
        and _NUMBERED.search(group.anchor.norm)
        and _parent(group.anchor.norm) not in doubtful
        and _is_theirs(flow, group, unknown)
        else replace(group, anchor=replace(group.anchor, norm=""))
        for group in groups
    ]
    for attends in (True, False):
        if any(g.anchor.attends == attends and not g.anchor.norm and not g.anchor.named for g in kept):
            kept = [replace(g, anchor=replace(g.anchor, norm="")) if g.anchor.attends == attends else g for g in kept]
    shifted = set(_list_shifted(flow, kept))
    return [replace(g.anchor, norm="") if _parent(g.anchor.norm) in shifted else g.anchor for g in kept]


def _is_theirs(flow: Flow, group: _Group, unknown: set[Visit]) -> bool:
    """Say whether only linear layers read what a norm puts out, all of them understood: no sum with what follows."""
    if group.norm is None or (group.norm.op not in NORMS and group.norm.op not in ("Mul", "Add")):
        return False
    readers = {reader for reader, _ in flow.list_readers(group.norm, PASSING)}
    return all(reader in flow.sites and reader not in unknown for reader in readers)


def _list_norms(flow: Flow, layer: Visit) -> Iterator[str]:
    """Yield the paths of the norms nearest before a layer."""
    pending, seen = [flow.read(layer)], set[tuple[int, str]]()
    while pending:
        scope, name = pending.pop()
        made_by = scope.producers.get(name)
        if (id(scope), name) in seen or not isinstance(made_by, Visit) or made_by in flow.sites:
            continue
        seen.add((id(scope), name))
        path = _name_norm(made_by)
        if path:
            yield path
        elif made_by.op not in NORMS | _SHAPES:
            pending += [made_by.scope.find(each) for each in made_by.node.input if each]


def _list_shifted(flow: Flow, groups: Sequence[_Group]) -> Iterator[str]:
    """Yield the modules in which a block that should be behind an attention is before it.

    Some libraries have a layer's last norm in front of what the next layer begins with.
    """
    attentions = [group for group in groups if group.anchor.attends and group.anchor.norm]
    blocks = [group for group in groups if not group.anchor.attends and group.anchor.norm]
    for attention in attentions:
        parent = _parent(attention.anchor.norm)
        own = [each for each in blocks if _parent(each.anchor.norm) == parent and each.norm is not attention.norm]
        after = flow.list_after(attention.layers["output"]) if own else set()
        if any(layer not in after for block in own for layer in block.layers.values()):
            yield parent


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
