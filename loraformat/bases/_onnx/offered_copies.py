"""Which sites of an ONNX graph can have a tensor that others read too for themselves, and what it is then."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from loraformat.bases._abilities import WeightCopy, name_companion
from loraformat.bases._model import Site, Weight
from loraformat.bases._onnx.copies import list_edits, name_copies
from loraformat.bases._onnx.operands import find_operands
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.traces import Trace
from loraformat.containers.onnx_file import TensorCopy
from loraformat.spans import StoredTensor

_INLINE: Final = (
    "A function's nodes are those of all its callers: inline functions first (onnx.inliner.inline_local_functions), or "
    "export with the weight untied."
)
_RAISE_VERSION: Final = (
    "A copy in the data file would have to be an input of the model, which those who run it would see. Where nobody "
    "feeds initializers, raise ir_version to 4 or later and take them out of the graph's inputs."
)


def offer_copies(
    found: Sequence[RawSite], sites: Sequence[Site], names: set[str], *, is_old: bool
) -> tuple[list[Site], dict[str, RawSite]]:
    """Return the sites, those that share a weight with the name that a copy of it would have, and which these are.

    Args:
        found: the sites as they were found.
        sites: the same, with their weights.
        names: all names of values in the model.
        is_old: whether every initializer must be an input of the model.
    """
    pairs = [(raw, site) for raw, site in zip(found, sites, strict=True) if _is_shared(site)]
    chosen = name_copies((raw for raw, _ in pairs if _may_add(raw, is_old=is_old)), names)
    mend = {site.id: _INLINE if _may_add(raw, is_old=is_old) else _RAISE_VERSION for raw, site in pairs}
    offered = [
        replace(site, own_name=chosen.get(site.id, ""), part_mend="" if site.id in chosen else mend[site.id])
        if site.id in mend
        else site
        for site in sites
    ]
    return offered, {site.id: raw for raw, site in pairs if site.id in chosen}


def _is_shared(site: Site) -> bool:
    """Say whether others read a site's weight."""
    return site.weight is not None and not site.weight.consumers <= {site.id}


def _may_add(raw: RawSite, *, is_old: bool) -> bool:
    """Say whether a tensor can be there once more: in an old model as a Constant, whose numbers stand in it."""
    return not is_old or (raw.trace.tensor is not None and not raw.trace.tensor.external_data)


def describe_copy(
    wanted: WeightCopy, source: Weight, shared: Mapping[str, RawSite], *, is_old: bool
) -> Iterator[tuple[TensorCopy, Trace]]:
    """Yield a copy of a weight, and of what goes with its codes, each with where the tensor is.

    Args:
        wanted: the copy.
        source: the weight.
        shared: the sites that can have one, by their ids.
        is_old: whether every initializer must be an input of the model.
    """
    found = [shared[site] for site in wanted.readers]
    traces = {"": found[0].trace} | {role: each.trace for role, each in find_operands(found[0]).items()}
    names = {"": wanted.name} | {role: name_companion(wanted.name, role) for role in wanted.roles}
    beside = source.coding.companions if source.coding is not None else {}
    for role, edits in list_edits(found, names).items():
        stored, tensor = (beside[role] if role else source.tensor), traces[role].tensor
        assert tensor is not None, "a site with a weight has one"
        assert isinstance(stored, StoredTensor), "others are not written"
        shape = tuple(tensor.dims)
        made = TensorCopy(names[role], tensor.data_type, shape, stored.span, tuple(edits), is_node=is_old)
        yield made, traces[role]
