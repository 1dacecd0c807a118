"""What must change in an ONNX graph for floats to stand where a quantised weight has codes.

An initializer takes the place of what DequantizeLinear makes; operators on codes become those on floats, where they
have their other factor in floats at hand. Nodes and tensors that nothing needs any more go.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loraformat.bases import FloatForm, Weight
from loraformat.bases._onnx.float_experts import replace_experts
from loraformat.bases._onnx.float_nodes import REPLACED
from loraformat.bases._onnx.operands import CODE_ENDING, DEQUANTISE, GATHER, MATMUL_BNB4, MATMUL_NBITS, QMOE
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.sites import RawSite
from loraformat.containers.onnx_file import GraphChange, NodeEdit, TensorFloats
from loraformat.problems import Problem

_BUILT: Final = ".qweight"
"""What onnxruntime-genai's builder has in the place of `.weight`."""


@dataclass(frozen=True, slots=True)
class Surgery:
    """What must change for one weight.

    Attributes:
        form: how it stands then.
        beside: the file with the codes.
        edits: nodes of the main graph that become others.
        doomed: nodes that go, if nothing else reads what they make.
    """

    form: FloatForm
    beside: Path
    edits: tuple[NodeEdit, ...]
    doomed: tuple[Visit, ...] = ()


def plan_surgery(found: RawSite, weight: Weight, names: set[str]) -> Surgery | Problem:
    """Return what must change for a quantised weight to stand in floats, or why it cannot.

    Args:
        found: a site of the weight.
        weight: the weight.
        names: all names of values in the model.
    """
    trace = found.trace
    readers = [visit for visit, _ in trace.scope.readers.get(trace.name, ())]
    if not readers or trace.name in trace.scope.outputs:
        return Problem("LF619", weight.name, "codes that leave the graph", "codes that nodes read")
    if readers[0].op == QMOE:
        return _plan_experts(readers, weight, names)
    return _plan(readers, _describe(readers[0], weight, names, weight.name), weight)


def plan_copy(found: Sequence[RawSite], weight: Weight, names: set[str], name: str) -> Surgery | Problem:
    """Return what must change for some readers of codes to have floats of their own, or why it cannot.

    Args:
        found: the sites that get them.
        weight: the weight, whose codes stay for others.
        names: all names of values in the model.
        name: of a copy of the codes, or of the floats.
    """
    between = next((step for raw in found for step in raw.trace.steps if step.op == DEQUANTISE), None)
    if between is not None:
        where = f"{weight.name} at {between.op} {between.node.name!r}"
        return Problem(
            "LF619", where, "codes that it dequantises for others too", "a node beside which there are floats"
        )
    readers = list({raw.visit.node.output[0]: raw.visit for raw in found}.values())
    form = _describe(readers[0], weight, names, name)
    if any(raw.trace.flipped for raw in found):
        form = replace(form, turned=not form.turned, shape=form.shape[::-1])
    planned = _plan(readers, form, weight)
    if isinstance(planned, Problem):
        return planned
    return replace(planned, doomed=(*planned.doomed, *(step for raw in found for step in raw.trace.steps)))


def _plan_experts(readers: Sequence[Visit], weight: Weight, names: set[str]) -> Surgery | Problem:
    """Return what must change for experts; all weights of a node become floats together, and say the same of it."""
    edits: list[NodeEdit] = []
    for visit in readers:
        made = replace_experts(visit, lambda codes: _choose_name(codes, names)) if visit.op == QMOE else "other nodes"
        if isinstance(made, str) or visit.scope.path != ():
            found = made if isinstance(made, str) else "codes that a subgraph or function reads"
            return Problem("LF619", f"{weight.name} at {visit.op} {visit.node.name!r}", found, "a node like MoE")
        edits.append(NodeEdit(visit.index, (made,)))
    return Surgery(_describe(readers[0], weight, names, weight.name), weight.tensor.span.path, tuple(edits))


def _plan(readers: Sequence[Visit], form: FloatForm, weight: Weight) -> Surgery | Problem:
    edits: list[NodeEdit] = []
    doomed: list[Visit] = []
    for visit in readers:
        made = REPLACED[visit.op](visit, form.name) if visit.op in REPLACED else None
        if made is None or visit.scope.path != () or visit.op != readers[0].op:
            where = f"{weight.name} at {visit.op} {visit.node.name!r}"
            return Problem("LF619", where, "codes that this node needs", "a node beside which there are floats")
        edits += made[0]
        doomed += made[1]
    return Surgery(form, weight.tensor.span.path, tuple(edits), tuple(doomed))


def _describe(visit: Visit, weight: Weight, names: set[str], codes: str) -> FloatForm:
    """Return how a weight stands in floats, for the operator that reads its codes."""
    coding = weight.coding
    assert coding is not None, "only quantised weights are asked for"
    rows, columns = coding.matrix[0], coding.matrix[1] - coding.padding
    turned = visit.op in (MATMUL_NBITS, MATMUL_BNB4)
    shape = (columns, rows) if turned else (rows, columns) if visit.op == GATHER else weight.tensor.shape
    if visit.op == QMOE:
        shape = (weight.tensor.shape[0], rows // weight.tensor.shape[0], columns)
    name = visit.node.output[0] if visit.op == DEQUANTISE else _choose_name(codes, names)
    return FloatForm(name, coding.companions["scales"].dtype, shape, turned, coding.padding)


def _choose_name(codes: str, names: set[str]) -> str:
    """Return the name that the weight may have had before it was quantised, or another that is free."""
    plain = CODE_ENDING.sub("", codes)
    if plain.endswith(_BUILT):
        plain = f"{plain.removesuffix(_BUILT)}.weight"
    if any(name != codes and name.startswith(plain) and CODE_ENDING.sub("", name) == plain != name for name in names):
        plain = f"{codes}_float"
    wanted, number = plain, 0
    while wanted in names:
        number += 1
        wanted = f"{plain}_{number}"
    return wanted


def join_surgeries(
    surgeries: Sequence[Surgery], visits: Sequence[Visit], kept: set[str], change: GraphChange
) -> GraphChange:
    """Return a change of the graph with those of several weights.

    Args:
        surgeries: of the weights.
        visits: all nodes.
        kept: names of initializers that stay: inputs of the model.
        change: what changes otherwise.
    """
    edits = _join_edits(surgeries, visits)
    dropped = frozenset(_list_unread(edits, visits, kept))
    floats = tuple(_describe_tensor(each.form, each.beside) for each in surgeries)
    return replace(change, floats=floats, edits=tuple(edits), dropped=dropped)


def _describe_tensor(form: FloatForm, beside: Path) -> TensorFloats:
    assert form.dtype.onnx is not None, "scales have a form that ONNX has"
    return TensorFloats(form.name, form.dtype.onnx, form.shape, form.dtype.count_bytes(math.prod(form.shape)), beside)


def _join_edits(surgeries: Sequence[Surgery], visits: Sequence[Visit]) -> list[NodeEdit]:
    """Return the edits of all, and those of doomed nodes of which nothing is read any more."""
    edits = {edit.node: edit for each in surgeries for edit in each.edits}
    main = {visit.index: visit for visit in visits if visit.scope.path == ()}
    doomed = {visit.index: visit for each in surgeries for visit in each.doomed if visit.scope.path == ()}
    for index, visit in sorted(doomed.items(), reverse=True):  # What reads another's result comes after it.
        if all(_is_unread(visit, name, edits, main) for name in visit.node.output if name):
            edits.setdefault(index, NodeEdit(index, ()))
    return [edits[index] for index in sorted(edits)]


def _is_unread(visit: Visit, name: str, edits: Mapping[int, NodeEdit], main: Mapping[int, Visit]) -> bool:
    """Say whether a value is read by nothing but nodes that have gone."""
    if name in visit.scope.outputs:
        return False
    for reader, _ in visit.scope.readers.get(name, ()):
        edit = edits.get(reader.index) if main.get(reader.index) is reader else None
        if edit is None or any(name in node.input for node in edit.nodes):
            return False
    return True


def _list_unread(edits: Sequence[NodeEdit], visits: Sequence[Visit], kept: set[str]) -> Iterator[str]:
    """Yield the initializers that nothing reads once the edits are made."""
    main = {visit.index: visit for visit in visits if visit.scope.path == ()}
    by_index = {edit.node: edit for edit in edits}
    for name in dict.fromkeys(name for edit in edits for name in main[edit.node].node.input if name):
        visit = main[edits[0].node]
        is_own = not isinstance(visit.scope.producers.get(name), Visit) and name in visit.scope.producers
        if is_own and name not in kept and _is_unread(visit, name, by_index, main):
            yield name
