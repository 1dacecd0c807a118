"""Tensors of experts where an ONNX graph reads them, and which parameter of which module each is."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from loraformat.bases._onnx.names import module_of_node, module_of_tensor
from loraformat.bases._onnx.picks import Product, find_chooser
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.traces import Trace

GATE_UP: Final = "gate_up_proj"
MEMBERS: Final = ("gate_proj", "up_proj")
DOWN: Final = "down_proj"
KNOWN: Final = frozenset({GATE_UP, DOWN, *MEMBERS})
CHOOSING: Final = frozenset({"Gather", "GatherND"})
_ROUTERS: Final = frozenset({"gate", "router"})
_DOTTED: Final = re.compile(r"\w+(\.\w+)+")


@dataclass(frozen=True, slots=True)
class Pack:
    """A tensor of experts where the graph reads it.

    Attributes:
        visit: the node that reads it.
        position: at which input.
        trace: where the tensor is.
        product: what the expert that was picked is multiplied with.
        expert: the only one that is read here; None for any.
        module: path of the module that has the tensor.
        parameter: its name there; empty where nothing tells.
        evidence: how both are known.
        stored: how gate and up lie in it, `halves` or `turns`; empty where nothing tells.
        own: how they lie in the module's own parameter.
        folded: why its numbers are not the module's own.
        bits: of one code, where it holds codes packed by the byte along its last axis.
    """

    visit: Visit
    position: int
    trace: Trace
    product: Product
    expert: int | None
    module: str = ""
    parameter: str = ""
    evidence: str = ""
    stored: str = ""
    own: str = ""
    folded: str = ""
    bits: int = 8

    @property
    def id(self) -> str:
        """Words for the place, as in `Site.id`."""
        return self.visit.describe(self.position)

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of the tensor, in numbers."""
        dims = tuple(self.trace.tensor.dims) if self.trace.tensor is not None else ()
        return (*dims[:-1], dims[-1] * 8 // self.bits) if dims else ()

    @property
    def turned(self) -> bool:
        """Whether an expert's stored matrix is the transpose of its `(out, in)`."""
        return self.product.turned ^ self.trace.flipped

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one expert's matrix, `(out, in)`."""
        return self.dims[:0:-1] if self.turned else self.dims[1:]


def name_pack(pack: Pack) -> Pack:
    """Return the pack with its module's path, as the node and the tensor's name tell it, and the parameter's name."""
    owner, parameter = _split_name(pack)
    module, evidence = module_of_node(pack.visit, pack.position, pack.trace, parameter)
    if owner and (not module or owner.startswith(f"{module}.")):
        return replace(pack, module=owner, parameter=parameter, evidence="initializer name")
    if not module:
        module, evidence = _find_owner(pack), "name of the router"
    return replace(pack, module=module, parameter=parameter, evidence=evidence)


def _find_owner(pack: Pack) -> str:
    """Return the module of experts by the name of the layer that chooses among them; nothing where it has none."""
    chooser = find_chooser(pack.visit) if pack.visit.op in CHOOSING else None
    if chooser is None:
        return ""
    visit, position, trace = chooser
    path = module_of_node(visit, position, trace)[0] or module_of_tensor(visit, trace)[0]
    owner, _, name = path.rpartition(".")
    return f"{owner}.experts" if owner and name in _ROUTERS else ""


def _split_name(pack: Pack) -> tuple[str, str]:
    """Return module and parameter as the tensor's name has them; nothing for a name that the exporter made up."""
    steps = (step.node.input[0] for step in pack.trace.steps)
    own = pack.trace.tensor.name if pack.trace.tensor is not None else ""
    for name in (pack.visit.node.input[pack.position], *steps, own):
        if _DOTTED.fullmatch(name):
            shorter = name.removesuffix(".weight").removesuffix(".qweight")
            known = shorter.rpartition(".")[2] in KNOWN
            owner, _, parameter = (shorter if known else name).rpartition(".")
            return owner, parameter
    return "", ""


def name_by_shape(packs: Sequence[Pack]) -> list[Pack]:
    """Return the packs, those without a parameter's name with the one that the shapes of a gated mixture give.

    Of two tensors of one module whose experts are `(2 n, m)` and `(m, n)`, the first is gate and up, the second down;
    no two shapes can be read both ways.
    """
    groups: dict[str, dict[int, Pack]] = defaultdict(dict)
    for pack in packs:
        if pack.module and not pack.parameter:
            groups[pack.module][id(pack.trace.tensor)] = pack
    names: dict[int, str] = {}
    for group in groups.values():
        pairs = [(a, b) for a in group for b in group if a != b and _is_gated(group[a].shape, group[b].shape)]
        if len(group) == 2 and len(pairs) == 1:
            names |= dict(zip(pairs[0], (GATE_UP, DOWN), strict=True))
    return [replace(pack, parameter=pack.parameter or names.get(id(pack.trace.tensor), "")) for pack in packs]


def _is_gated(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    return first == (2 * second[1], second[0])
