"""Experts whose codes become floats: in the place of QMoE stands MoE, which reads floats of all experts."""

from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, Final

from loraformat.bases import Site, Weight
from loraformat.bases._onnx.opened_experts import has_router_weights, make_mixture
from loraformat.bases._onnx.operands import EXPERT_OPERANDS, QMOE
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.traces import trace_constant
from loraformat.bases._onnx.uses import read_attribute
from loraformat.problems import Problem

if TYPE_CHECKING:
    import onnx

_FLOAT32: Final = 1


def replace_experts(visit: Visit, name_floats: Callable[[str], str]) -> "onnx.NodeProto | str":
    """Return the MoE that computes what a QMoE does, or why none does.

    Args:
        visit: the QMoE.
        name_floats: the name of the floats that stand for the codes of a name.
    """
    if has_router_weights(visit.node):
        return "how much each expert counts (router_weights), which MoE does not read"
    places = [place for place in EXPERT_OPERANDS if visit.read_input(place)]
    if _may_be_for_cuda(visit, places):
        return "codes that may be laid out for CUDA's kernels (weights_prepacked is not 0)"
    codes = [visit.read_input(place) for place in places]
    if any(name not in visit.scope.producers or isinstance(visit.scope.producer(name), Visit) for name in codes):
        return "codes that no initializer holds"
    return make_mixture(visit.node, {name: name_floats(name) for name in codes})


def _may_be_for_cuda(visit: Visit, places: Sequence[int]) -> bool:
    """Say whether codes may lie otherwise than their shape says: such kernels have no scales of float32."""
    prepacked = int(read_attribute(visit.node, "weights_prepacked", -1))
    scales = (trace_constant(visit.scope, visit.read_input(place + 1)) for place in places)
    forms = {each.tensor.data_type for each in scales if each is not None and each.tensor is not None}
    return prepacked != 0 and (prepacked > 0 or forms != {_FLOAT32})


def list_joint_experts(found: Sequence[RawSite], sites: Sequence[Site], keys: Set[str]) -> Iterator[Weight | Problem]:
    """Yield the other weights of every QMoE of which one becomes floats, or why one cannot.

    Args:
        found: the sites.
        sites: the same, with their weights.
        keys: of the weights that become floats.
    """
    pairs = [(raw.visit, site) for raw, site in zip(found, sites, strict=True) if raw.visit.op == QMOE]
    nodes = {visit for visit, site in pairs if site.weight is not None and site.weight.key in keys}
    weights = {site.weight.key: site.weight for visit, site in pairs if visit in nodes and site.weight is not None}
    yield from (weight for key, weight in weights.items() if key not in keys)
    lost = {site.id: site.obstacle for visit, site in pairs if visit in nodes and site.weight is None}
    for where, obstacle in lost.items():
        yield obstacle or Problem("LF619", where, "codes of experts that are not read", "codes of 4 or 8 bits")
