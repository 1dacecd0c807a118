"""Weights of several modules in one: what graph optimisers and builders put side by side.

Where the rows lie is what the operator defines, or what the attention behind it says; never a guess from a shape.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from loraformat.bases._onnx.built_names import rename_built
from loraformat.bases._onnx.names import OUTPUT_NAME, read_node_path
from loraformat.bases._onnx.picks import read_numbers
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.uses import read_attribute

_BUILDER: Final = "onnxruntime-genai"
_ATTENTION: Final = frozenset({"com.microsoft.Attention", "com.microsoft.QAttention"})
_MATMUL_NBITS: Final = "com.microsoft.MatMulNBits"
_GROUPED: Final = "com.microsoft.GroupQueryAttention"
_MEMBERS: Final = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
"""What the modules of q, k and v are called in families of models; an adapter has one of these sets."""
_FUSED: Final = {"qkv_proj": _MEMBERS[1], "gate_up_proj": ("gate_proj", "up_proj")}
"""What models, or the builder, have in one matrix, in this order: either may have it apart."""
_STEPS: Final = 4


def expand_packed(sites: Sequence[RawSite], producer: str, inputs: Collection[str]) -> list[RawSite]:
    """Return the sites, and one for each module whose weight is a part of a packed one, or is split.

    Args:
        sites: of the whole graph.
        producer: what the model says has made it.
        inputs: names of the graph's inputs.
    """
    found = [each for site in sites if site.visit.op in _ATTENTION for each in _open_attention(site)]
    if producer == _BUILDER:
        found += _open_built([*sites, *found], inputs)
    return [*sites, *found]


def _open_attention(site: RawSite) -> Iterator[RawSite]:
    """Yield q, k and v of onnxruntime's fused Attention; its output keeps the name that the module's had."""
    path = next(filter(None, (read_node_path(name) for name in site.visit.node.output)), "")
    columns = _count_columns(site)
    sizes = next((list(a.ints) for a in site.visit.node.attribute if a.name == "qkv_hidden_sizes"), [columns // 3] * 3)
    if not path or len(sizes) != 3 or sum(sizes) != columns or min(sizes) <= 0:
        return
    for names in _MEMBERS:
        modules = [f"{path}.{name}" for name in names]
        yield from (replace(each, evidence=OUTPUT_NAME) for each in _cut(site, modules, sizes))


def _open_built(sites: Sequence[RawSite], inputs: Collection[str]) -> Iterator[RawSite]:
    """Yield what onnxruntime-genai's builder has: other names, and in one what models have apart, or the reverse."""
    renamed = [
        replace(site, module=name) for site in sites if site.module for name in rename_built(site.module, inputs)
    ]
    yield from renamed
    named = [site for site in (*sites, *renamed) if site.part is None]
    for site in named:
        module, _, last = site.module.rpartition(".")
        members = _FUSED.get(last, ()) if site.parameter == "weight" else ()
        sizes = _read_parts(site, len(members)) if members else []
        if len(sizes) == len(members):
            yield from _cut(site, [f"{module}.{name}" for name in members], sizes)
    whole = [site for site in named if site.rows is None]
    for name, members in _FUSED.items():
        yield from _join(whole, name, members)


def _join(sites: Iterable[RawSite], whole: str, members: Sequence[str]) -> Iterator[RawSite]:
    """Yield the sections of a module that is stored as several."""
    groups: dict[str, dict[str, RawSite]] = defaultdict(dict)
    for site in sites:
        module, _, last = site.module.rpartition(".")
        if last in members and site.parameter == "weight":
            groups[module][last] = site
    for module, found in groups.items():
        yield from _join_one(f"{module}.{whole}", [found[name] for name in members if name in found], len(members))


def _join_one(module: str, found: Sequence[RawSite], count: int) -> Iterator[RawSite]:
    start = 0
    for site in found if len(found) == count else ():
        stop = start + _count_columns(site)
        yield replace(site, module=module, section=(start, stop))
        start = stop


def _cut(site: RawSite, modules: Sequence[str], sizes: Sequence[int]) -> Iterator[RawSite]:
    start = 0
    for module, size in zip(modules, sizes, strict=True):
        yield replace(site, module=module, rows=(start, start + size))
        start += size


def _count_columns(site: RawSite) -> int:
    """Return the size of what the operator puts out: the columns of its `(in, out)` matrix."""
    if site.visit.op == _MATMUL_NBITS:
        return int(read_attribute(site.visit.node, "N", 0))
    dims = site.trace.sizes
    return dims[0 if site.trace.flipped else 1] if len(dims) == 2 else 0


def _read_parts(site: RawSite, count: int) -> list[int]:
    """Return the rows of a packed weight's members, as what divides their product says; nothing where none does."""
    visit: Visit | None = site.visit
    for _ in range(_STEPS):
        readers = visit.scope.readers.get(next(iter(visit.node.output), ""), []) if visit is not None else []
        visit = readers[0][0] if len(readers) == 1 else None
        if visit is not None and visit.op == _GROUPED:
            return _divide(_count_columns(site), _read_counts(visit)) if count == len(_MEMBERS[1]) else []
        if visit is not None and visit.op == "Split":
            return _read_split(visit, _count_columns(site), count)
    return []


def _read_split(visit: Visit, columns: int, count: int) -> list[int]:
    """Return the sizes that a Split along the last axis says; nothing where it does not make `count` of all columns."""
    if len(visit.node.output) != count or read_attribute(visit.node, "axis", 0) not in (-1, 2):
        return []
    sizes = read_numbers(visit, 1) if len(visit.node.input) > 1 else [columns // count] * count
    return sizes if len(sizes) == count and sum(sizes) == columns and min(sizes) > 0 else []


def _read_counts(visit: Visit) -> Mapping[str, int]:
    return {name: int(read_attribute(visit.node, name, 0)) for name in ("num_heads", "kv_num_heads")}


def _divide(columns: int, counts: Mapping[str, int]) -> list[int]:
    heads, groups = counts["num_heads"], counts["kv_num_heads"]
    if heads <= 0 or groups <= 0 or columns % (heads + 2 * groups):
        return []
    size = columns // (heads + 2 * groups)
    return [heads * size, groups * size, groups * size]
