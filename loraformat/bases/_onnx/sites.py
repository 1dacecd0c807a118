"""Where an ONNX graph applies weights: which inputs of which operators, and how they are oriented."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loraformat.adapter import SlotKind
from loraformat.bases._onnx.names import (
    NODE_NAME,
    OUTPUT_NAME,
    find_folding,
    find_repeated,
    module_of_node,
    module_of_tensor,
)
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.traces import Trace
from loraformat.bases._onnx.uses import UNREAD, USES, VECTORS, Use, UseReader, read_use, refuse_use
from loraformat.bases._onnx.views import trace_weight
from loraformat.problems import Problem
from loraformat.spans import Part

_OF_NODES: Final = frozenset({NODE_NAME, OUTPUT_NAME})
_EXPORT_AGAIN: Final = "Export with dynamo=True, or with do_constant_folding=False, which keeps the weights' names."
_SEVERAL: Final = "a change of its shape, while others read the tensor in another one"


@dataclass(frozen=True, slots=True)
class RawSite:
    """A place where an operator reads a constant as its weight.

    Attributes:
        visit: the node.
        position: which input.
        trace: where the constant is.
        use: how it is used.
        module: module path.
        evidence: how the path is known.
        folded: why the stored values are not the module's own weight; empty when they are.
        parameter: which of the module's parameters it is.
        repeated: whether the exporter may have given this path to another module of the same name.
        rows: start and stop of the module's rows in the canonical matrix `(out, in)` that is read; None for all.
        section: as in `Site`.
        part: where in the stored tensor it is, where that holds several matrices; None for all of it.
        apart: ids of readers of the tensor that never read this part.
        doubt: why it is not known how the part lies; empty when it is.
    """

    visit: Visit
    position: int
    trace: Trace
    use: Use
    module: str
    evidence: str
    folded: str = ""
    parameter: str = "weight"
    repeated: bool = False
    rows: tuple[int, int] | None = None
    section: tuple[int, int] | None = None
    part: Part | None = None
    apart: frozenset[str] = frozenset()
    doubt: str = ""

    @property
    def obstacle(self) -> Problem | None:
        """Why nothing can be merged here, as far as the graph tells."""
        where = f"{self.visit.op} {self.visit.node.name!r}"
        if self.folded:
            return Problem("LF407", where, self.folded, "the module's own weight")
        if self.repeated:
            found = f"{self.module!r} and the same with a number: the exporter numbers what it cannot tell apart"
            return Problem("LF404", where, found, "a path, or the name of a weight or bias, of its own", _EXPORT_AGAIN)
        if self.use.refusal:
            return Problem("LF403", where, self.use.refusal, "a plain weight of MatMul, Gemm, Conv or Gather")
        if self.doubt:
            return Problem("LF447", where, self.doubt, "experts of which it is known how they lie")
        if self.trace.blocked:
            return Problem("LF403", where, f"a weight behind {self.trace.blocked}", "a weight that is stored as it is")
        return None


def find_sites(visits: Iterable[Visit]) -> list[RawSite]:
    """Return every site; one whose module is unknown has an empty path."""
    sites = [site for visit in visits for site in _find_at(visit)]
    readable = {site.module for site in sites if site.visit.op not in UNREAD}
    sites = [site for site in sites if site.visit.op not in UNREAD or (site.module and site.module not in readable)]
    repeated = find_repeated(site.module for site in sites if site.evidence in _OF_NODES)
    return [replace(site, repeated=site.evidence in _OF_NODES and site.module in repeated) for site in sites]


def agree_on_views(found: Sequence[RawSite]) -> list[RawSite]:
    """Return the sites; those of a tensor that is read in several shapes are blocked, but for its own shape."""
    views: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for raw in found:
        views[id(raw.trace.tensor)].add(raw.trace.sizes)
    return [
        replace(raw, trace=replace(raw.trace, view=None, blocked=_SEVERAL))
        if raw.trace.view is not None and len(views[id(raw.trace.tensor)]) > 1
        else raw
        for raw in found
    ]


def _find_at(visit: Visit) -> Iterator[RawSite]:
    positions, reader = USES.get(visit.op, ((), refuse_use))
    for position in positions:
        trace = _trace_input(visit, position)
        if trace is not None:
            use = read_use(visit, position, reader)
            yield from _name_site(visit, position, trace, _without_doubt(visit, position, trace, use))
            break
    for positions, parameter, read_vector in VECTORS.get(visit.op, ()):
        yield from _find_vector(visit, positions, parameter, read_vector)


def _without_doubt(visit: Visit, position: int, trace: Trace, use: Use) -> Use:
    """Return the use without the slot `parameter` where the stored matrix may lie either way round.

    A tensor that bears a weight's own name is that weight as it is; one that an operator reads the other way round than
    a Linear's is some other module's, or was turned by a tool that kept the name. A nameless left factor was made of
    the weight in a way that nothing tells.
    """
    named = trace.tensor is not None and trace.tensor.name.endswith(".weight")
    turned = use.orientations.get(SlotKind.PARAMETER, False) ^ trace.flipped
    if turned if named else (visit.op == "MatMul" and position == 0):
        return replace(use, orientations={k: v for k, v in use.orientations.items() if k is not SlotKind.PARAMETER})
    return use


def _find_vector(visit: Visit, positions: Iterable[int], parameter: str, read: UseReader) -> Iterator[RawSite]:
    """Yield the site of a vector among the inputs at `positions`; two constants together are no module's parameter.

    A vector keeps its name on every way into a graph but one: a nameless one was computed from the parameter, as
    `1 + weight` of Gemma's norms is.
    """
    traced = [(position, trace) for position in positions if (trace := _trace_input(visit, position)) is not None]
    if len(traced) != 1:
        return
    position, trace = traced[0][0], replace(traced[0][1], view=None)
    if trace.tensor is None or len(trace.tensor.dims) != 1:
        return
    names = (visit.node.input[position], *(step.node.input[0] for step in trace.steps), trace.tensor.name)
    if not any(name.endswith(f".{parameter}") for name in names):
        return
    module, evidence = module_of_node(visit, position, trace, parameter)
    if module:
        use = read_use(visit, position, read)
        yield RawSite(visit, position, trace, use, module, evidence, find_folding(visit, trace), parameter)


def _trace_input(visit: Visit, position: int) -> Trace | None:
    inputs = visit.node.input
    return trace_weight(visit.scope, inputs[position]) if position < len(inputs) and inputs[position] else None


def _name_site(visit: Visit, position: int, trace: Trace, use: Use) -> Iterator[RawSite]:
    """Yield the site under its module's path, and under the tensor's name too where folding hides the module."""
    folded = find_folding(visit, trace)
    module, evidence = module_of_node(visit, position, trace)
    if not module or folded:
        named, tensor_evidence = module_of_tensor(visit, trace)
        if named and named != module:
            yield RawSite(visit, position, trace, use, named, tensor_evidence, folded)
            if not module:
                return
    yield RawSite(visit, position, trace, use, module, evidence, folded)
