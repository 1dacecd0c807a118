"""Weights of several modules in one: what graph optimisers and builders put side by side.

Where the rows lie is what the operator defines, or what the attention behind it says; never a guess from a shape.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from loraformat.bases._onnx_names import OUTPUT_NAME, read_node_path
from loraformat.bases._onnx_scopes import Visit
from loraformat.bases._onnx_sites import RawSite
from loraformat.bases._onnx_uses import read_attribute

_BUILDER: Final = "onnxruntime-genai"
_ATTENTION: Final = "com.microsoft.Attention"
_GROUPED: Final = "com.microsoft.GroupQueryAttention"
_NBITS: Final = "com.microsoft.MatMulNBits"
_MEMBERS: Final = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
"""What the modules of q, k and v are called in families of models; an adapter has one of these sets."""
_BUILT: Final = re.compile(r"(?<=\.)attn(?=\.)")
_STEPS: Final = 4


def expand_packed(sites: Sequence[RawSite], producer: str) -> list[RawSite]:
    """Return the sites, and one for each module whose weight is a part of a packed one, or is split.

    Args:
        sites: of the whole graph.
        producer: what the model says has made it.
    """
    found = [each for site in sites if site.visit.op == _ATTENTION for each in _open_attention(site)]
    if producer == _BUILDER:
        found += _open_built(sites)
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


def _open_built(sites: Sequence[RawSite]) -> Iterator[RawSite]:
    """Yield what onnxruntime-genai's builder has: other names, q, k and v in one, gate and up apart."""
    named = [replace(site, module=_BUILT.sub("self_attn", site.module)) for site in sites if site.module]
    yield from (site for site in named if _BUILT.search(site.module) is None and "self_attn" in site.module)
    for site in named:
        module, _, last = site.module.rpartition(".")
        sizes = _read_heads(site) if last == "qkv_proj" and site.parameter == "weight" else []
        if sizes:
            yield from _cut(site, [f"{module}.{name}" for name in _MEMBERS[1]], sizes)
    yield from _join(named, "gate_up_proj", ("gate_proj", "up_proj"))


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
    if site.visit.op == _NBITS:
        return int(read_attribute(site.visit.node, "N", 0))
    dims = site.trace.tensor.dims if site.trace.tensor is not None else ()
    return dims[0 if site.trace.flipped else 1] if len(dims) == 2 else 0


def _read_heads(site: RawSite) -> list[int]:
    """Return the rows of q, k and v, as the attention that reads their product says; nothing where none does."""
    visit: Visit | None = site.visit
    for _ in range(_STEPS):
        readers = visit.scope.readers.get(next(iter(visit.node.output), ""), []) if visit is not None else []
        visit = readers[0][0] if len(readers) == 1 else None
        if visit is not None and visit.op == _GROUPED:
            return _divide(_count_columns(site), _read_counts(visit))
    return []


def _read_counts(visit: Visit) -> Mapping[str, int]:
    return {name: int(read_attribute(visit.node, name, 0)) for name in ("num_heads", "kv_num_heads")}


def _divide(columns: int, counts: Mapping[str, int]) -> list[int]:
    heads, groups = counts["num_heads"], counts["kv_num_heads"]
    if heads <= 0 or groups <= 0 or columns % (heads + 2 * groups):
        return []
    size = columns // (heads + 2 * groups)
    return [heads * size, groups * size, groups * size]
