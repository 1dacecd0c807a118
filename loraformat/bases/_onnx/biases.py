"""Biases that an ONNX graph lacks: where there is a place for one, and what the graph gets more.

An operator with an input for it gets that input. Behind any other product stands an Add, directly: it takes the name
of the product, which gets another one, so that nothing behind it changes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraformat.adapter import SlotKind
from loraformat.bases import AddedBias, FreeBias, Site
from loraformat.bases._onnx.names import find_addend
from loraformat.bases._onnx.openings import Product, find_form, find_opening
from loraformat.bases._onnx.places import NodePlaces
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.uses import read_attribute
from loraformat.bases._onnx.views import trace_weight
from loraformat.containers.onnx_file import GraphChange, Leaf, OnnxFile, TensorFloats
from loraformat.dtypes import Dtype
from loraformat.problems import Problem

if TYPE_CHECKING:
    import onnx

_WITH_INPUT: Final[Mapping[str, int]] = {
    "Conv": 2,
    "Gemm": 2,
    "LayerNormalization": 2,
    "com.microsoft.FusedConv": 2,
    "com.microsoft.FusedGemm": 2,
}
"""Operators that are given a bias as an input, and which."""
_OWN_BIASES: Final[Mapping[str, int]] = {
    **_WITH_INPUT,
    "com.microsoft.DynamicQuantizeMatMul": 4,
    "com.microsoft.MatMulIntegerToFloat": 6,
    "com.microsoft.MatMulNBits": 5,
}
"""Operators that may have one: kernels of codes do not all have it, and are given an Add."""
_HANDING_ON: Final = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Split", "Squeeze", "Transpose", "Unsqueeze"})
_ENDING: Final = ".bias"
"""How names of biases end: later merges know them by it."""
_BARE: Final = "_without_bias"
"""How the names of values end to which a bias is not yet added."""
_EXPECTED: Final = "a product that a bias can be added to"
_INLINE: Final = (
    "A function's nodes are those of all its callers: inline functions first (onnx.inliner.inline_local_functions)."
)
_RAISE_VERSION: Final = "Raise ir_version to 4 or later, and take initializers out of the graph's inputs."
_EXPORT_AGAIN: Final = (
    "If that is the module's bias, --map says so or an export keeps its name: torch.onnx.export(..., optimize=False)."
)


@dataclass(frozen=True, slots=True)
class BiasPlace:
    """Where a bias is read.

    Attributes:
        visit: the node that applies the module's weight.
        maker: the node to whose first output it is added.
        position: which input of it is the bias; 0 where an Add behind it is to read it.
        dtype: its number form.
    """

    visit: Visit
    maker: Visit
    position: int
    dtype: Dtype

    def describe(self) -> str:
        """Return words for what reads it, unique in the model."""
        if self.position:
            return self.maker.describe(self.position)
        return f"Add after {self.maker.op} {self.maker.node.name!r} ({self.maker.scope.label} node {self.maker.index})"


@dataclass(frozen=True, slots=True)
class PlacedBias:
    """A bias that a graph gets.

    Attributes:
        bias: the bias.
        places: where it is read, each with the name that the value without it has from now on.
    """

    bias: AddedBias
    places: tuple[tuple[BiasPlace, str], ...]


def offer_biases(found: Sequence[RawSite], sites: Sequence[Site], names: set[str], *, is_old: bool) -> list[Site]:
    """Return the sites, those of modules without a bias with the place of one.

    Args:
        found: the sites as the graph has them.
        sites: the same, with their weights.
        names: all names of values in the model.
        is_old: whether every initializer must be an input of the model.
    """
    biased = {raw.module for raw in found if raw.parameter == "bias"}
    taken = names | {site.own_name for site in sites}
    chosen: dict[str, str] = {}
    offered: list[Site] = []
    for raw, site in zip(found, sites, strict=True):
        if not _may_have_bias(raw, site) or (raw.module and raw.module in biased):
            offered.append(site)
            continue
        owner = raw.module or site.id
        if owner not in chosen:
            chosen[owner] = _take_name(raw.module or raw.trace.name, _ENDING, taken)
        offered.append(replace(site, free_bias=_describe(raw, site, chosen[owner], is_old=is_old)))
    return offered


def _may_have_bias(raw: RawSite, site: Site) -> bool:
    """Say whether a site is that of a weight which a module has a bias beside: no table, and no expert."""
    is_table = SlotKind.EMBEDDING in site.transposed
    return raw.parameter == "weight" and site.weight is not None and not is_table


def _take_name(begin: str, end: str, taken: set[str]) -> str:
    """Return a name that is free, with a number before its end where need be, and note it as taken."""
    names = chain([f"{begin}{end}"], (f"{begin}.{number}{end}" for number in count(1)))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return name


def _describe(raw: RawSite, site: Site, name: str, *, is_old: bool) -> FreeBias:
    place = _find_place(raw, site)
    assert site.weight is not None, "asked before"
    if isinstance(place, Problem):
        return FreeBias(name, site.weight.tensor.dtype, obstacle=place)
    obstacle = _refuse(raw.visit, "an initializer would be an input of the model", _RAISE_VERSION) if is_old else None
    return FreeBias(name, place.dtype, place.describe(), obstacle)


def find_place(raw: RawSite) -> BiasPlace | Problem:
    """Return where a module whose weight is at a site would have its bias, or why it can have none (LF630)."""
    visit, op = raw.visit, raw.visit.op
    if not any(visit.node.output[:1]):
        return _refuse(visit, "a node that makes nothing")
    if visit.scope.path is None:
        return _refuse(visit, "a node of a function, which its callers share", _INLINE)
    if raw.rows is not None or raw.part is not None or raw.section is not None:
        return _refuse(visit, "a weight that holds several modules, or a part of one")
    if op in _OWN_BIASES and (held := visit.read_input(_OWN_BIASES[op])):
        return _refuse(visit, f"{held!r} is added to it already", _EXPORT_AGAIN)
    if op in _WITH_INPUT and read_attribute(visit.node, "beta", 1.0) == 1 and raw.position == 1:
        dtype = find_form(raw)
        if dtype is None:
            return _refuse(visit, "numbers computed as nobody knows what")
        return BiasPlace(visit, visit, _WITH_INPUT[op], dtype)
    opening = find_opening(raw)
    if isinstance(opening, Problem):
        return _refuse(visit, opening.found, opening.mend)
    if opening.product is not Product.RIGHT or opening.is_inside:
        return _refuse(visit, "a node that puts out no X·W")
    return BiasPlace(visit, opening.maker, 0, opening.dtype)


def _find_place(raw: RawSite, site: Site) -> BiasPlace | Problem:
    """Return the place, unless something is added there that may be the module's bias."""
    place = find_place(raw)
    if isinstance(place, Problem):
        return place
    assert site.weight is not None, "asked before"
    shape = site.stored_shape()
    rows = shape[-1] if site.transposed.get(SlotKind.LINEAR, False) else shape[0]
    held = next(_list_addends(place.visit, rows), "") or next(_list_addends(place.maker, rows), "")
    return _refuse(raw.visit, f"{held!r} is added to it already", _EXPORT_AGAIN) if held else place


def _refuse(visit: Visit, found: str, mend: str = "") -> Problem:
    return Problem("LF630", f"{visit.op} {visit.node.name!r}", found, _EXPECTED, mend)


def _list_addends(visit: Visit, rows: int) -> Iterator[str]:
    """Yield the constants of as many numbers, or of nobody knows how many, that are added to what a node makes."""
    pending, seen = [(visit.scope, str(visit.node.output[0]))], set[str]()
    while pending:
        scope, name = pending.pop()
        for reader, position in scope.readers.get(name, ()) if name not in seen else ():
            added = find_addend(reader, position)
            trace = trace_weight(reader.scope, added) if added else None
            if trace is not None and (trace.tensor is None or math.prod(trace.sizes) == rows):
                yield added
            elif reader.op in _HANDING_ON and position == 0 and reader.scope is scope:
                pending += [(scope, str(output)) for output in reader.node.output]
        seen.add(name)


def place_biases(biases: Sequence[AddedBias], by_id: Mapping[str, RawSite], names: set[str]) -> list[PlacedBias]:
    """Return where biases go.

    Args:
        biases: what the graph is to get.
        by_id: its sites.
        names: all names of values in the model and its copies.
    """
    taken = names | {bias.name for bias in biases}
    placed = []
    for bias in biases:
        places: list[tuple[BiasPlace, str]] = []
        for site in bias.beside:
            place = find_place(by_id[site])
            assert isinstance(place, BiasPlace), "planned so"
            places.append((place, _take_name(str(place.maker.node.output[0]), _BARE, taken)))
        placed.append(PlacedBias(bias, tuple(places)))
    return placed


def add_biases(opened: OnnxFile, placed: Sequence[PlacedBias], change: GraphChange) -> GraphChange:
    """Return a change of a graph with biases more; their numbers are in the model's own file."""
    places = NodePlaces(opened.file, opened.model)
    added = tuple(_describe_tensor(each.bias, opened.path) for each in placed)
    leaves = tuple(leaf for each in placed for leaf in _list_leaves(each, places))
    return replace(change, floats=(*change.floats, *added), leaves=(*change.leaves, *leaves))


def _describe_tensor(bias: AddedBias, file: Path) -> TensorFloats:
    assert bias.dtype.onnx is not None, "a number form of the graph's"
    return TensorFloats(bias.name, bias.dtype.onnx, (bias.rows,), bias.dtype.count_bytes(bias.rows), file)


def _list_leaves(placed: PlacedBias, places: NodePlaces) -> Iterator[Leaf]:
    for place, bare in placed.places:
        node = places.find(place.maker.scope.label, place.maker.index)
        if place.position:
            yield node.add_input(place.position, placed.bias.name)
        else:
            yield node.rename_output(0, bare)
            yield node.add_after(_make_sum(place, bare, placed.bias.name))


def _make_sum(place: BiasPlace, bare: str, name: str) -> "onnx.NodeProto":
    """Return the Add, with the notes of the product by which its module is known."""
    from onnx import helper

    own, value = place.visit.node, place.maker.node.output[0]
    node = helper.make_node("Add", [bare, name], [value], f"{own.name or value}_bias", own.doc_string)
    node.metadata_props.extend(own.metadata_props)
    return node


def insert_biases(graph: "onnx.GraphProto", placed: Sequence[PlacedBias]) -> None:
    """Have the nodes of a main graph read biases of zeros, Constants; those inside it stay."""
    from onnx import helper

    nodes = list(graph.node)
    for each in placed:
        own = [pair for pair in each.places if pair[0].maker.scope.path == ()]
        for place, bare in own:
            index = next(at for at, node in enumerate(nodes) if place.maker.node.output[0] in node.output)
            node = nodes[index]
            if place.position:
                node.input.extend([""] * (place.position + 1 - len(node.input)))
                node.input[place.position] = each.bias.name
            else:
                node.output[0] = bare
                nodes.insert(index + 1, _make_sum(place, bare, each.bias.name))
        if own:
            bias = _describe_tensor(each.bias, Path())
            zeros = helper.make_tensor(bias.name, bias.data_type, bias.shape, bytes(bias.nbytes), raw=True)
            nodes.insert(0, helper.make_node("Constant", [], [bias.name], bias.name, value=zeros))
    del graph.node[:]
    graph.node.extend(nodes)
