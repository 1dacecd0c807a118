"""Which names of an ONNX graph change when some readers of a tensor get one of their own."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from loraformat.bases._abilities import name_companion
from loraformat.bases._onnx.operands import CODE_ENDING, Operand, find_operands
from loraformat.bases._onnx.scopes import Scope, Visit
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.traces import Trace, hands_on, reshapes
from loraformat.bases._onnx.views import list_readers
from loraformat.containers.onnx_file import InputEdit, TensorCopy

if TYPE_CHECKING:
    import onnx


def name_copies(found: Iterable[RawSite], names: set[str]) -> Mapping[str, str]:
    """Return, by site, the name of a tensor that it could have for itself; sites that cannot are left out.

    It is the name of the module's parameter where the module is known, else the tensor's with a number.

    Args:
        found: sites of tensors that others read too.
        names: all names of values in the model.
    """
    taken = set(names)
    chosen: dict[str, str] = {}
    for raw in found:
        site = raw.visit.describe(raw.position)
        if site not in chosen and can_part(raw):
            chosen[site] = _choose(_name_after_module(raw), taken, find_operands(raw))
            taken.update(_list_names(chosen[site], find_operands(raw)))
    return chosen


def _name_after_module(raw: RawSite) -> str:
    """Return the name of the module's parameter, with what quantisers add to the name of one."""
    name = raw.trace.name
    ending = CODE_ENDING.search(name)
    suffix = ending[0] if ending else ""
    return f"{raw.module}.{raw.parameter}{suffix}" if raw.module else f"{name}_1"


def _choose(wanted: str, taken: set[str], roles: Iterable[str]) -> str:
    name, number = wanted, 0
    while not taken.isdisjoint(_list_names(name, roles)):
        number += 1
        name = f"{wanted}_{number}"
    return name


def _list_names(name: str, roles: Iterable[str]) -> list[str]:
    return [name, *(name_companion(name, role) for role in roles)]


def can_part(raw: RawSite) -> bool:
    """Say whether names between the tensor and the node can change: a function's are those of all its callers.

    What a call hands to a function can change for this call, where the function makes nothing else of it.
    """
    operands = find_operands(raw).values()
    if not operands and raw.visit.scope.path is None:
        return _find_call(raw) is not None
    visits = (raw.visit, *raw.trace.steps, *(reader for each in operands for reader in each.readers))
    return all(visit.scope.path is not None for visit in visits) and all(each.is_own for each in operands)


def _find_call(raw: RawSite) -> tuple[Visit, int, Sequence[Visit]] | None:
    """Return the call in a graph whose function has the node, which input hands it the value, and the steps before."""
    call = raw.visit.call
    while call is not None and call.scope.path is None:
        call = call.call
    outer = [step for step in raw.trace.steps if step.scope.path is not None]
    if call is None or raw.trace.scope.path is None:
        return None
    scope, value = outer[0].scope.find(outer[0].node.output[0]) if outer else (raw.trace.scope, raw.trace.name)
    positions = [
        place for place, name in enumerate(call.node.input) if name and call.scope.find(name) == (scope, value)
    ]
    inside = set(_list_inside(call, scope, value))
    if len(positions) != 1 or inside != {raw.visit.describe(raw.position)}:
        return None
    return call, positions[0], outer


def _list_inside(call: Visit, scope: Scope, value: str) -> Iterator[str]:
    """Yield words for what reads a value inside a call; for a result of the function, words that no node has."""
    pending, seen = [(scope, value)], set()
    while pending:
        owner, name = pending.pop()
        if (id(owner), name) in seen:
            continue
        seen.add((id(owner), name))
        if name in owner.outputs:
            yield f"output {name!r}"
        for visit, position in owner.readers.get(name, ()):
            if _is_inside(visit, call) and position == 0 and (hands_on(visit) or reshapes(visit)):
                pending += [visit.scope.find(output) for output in visit.node.output]
            elif _is_inside(visit, call):
                yield visit.describe(position)


def _is_inside(visit: Visit, call: Visit) -> bool:
    around = visit.call
    while around is not None and around is not call:
        around = around.call
    return around is call


def list_edits(found: Sequence[RawSite], names: Mapping[str, str]) -> Mapping[str, list[InputEdit]]:
    """Return what must change for some sites of one tensor to read other ones.

    Args:
        found: the sites.
        names: what they are to read, by role: under none the tensor itself.

    Returns:
        Edits by the role of what they have read.
    """
    own = {raw.visit.describe(raw.position) for raw in found}
    edits: dict[tuple[Visit, int], tuple[str, InputEdit]] = {}
    for number, raw in enumerate(found):
        operands = {role: each for role, each in find_operands(raw).items() if role in names}
        visit, position, skipped = _find_place(raw, own)
        edits.setdefault((visit, position), ("", _edit(visit, position, skipped, names, number, operands)))
        for role, each in operands.items():
            for reader, place in each.places:
                if reader not in skipped:
                    edits.setdefault((reader, place), (role, _rename(reader, place, names[role])))
    return {role: [edit for found_role, edit in edits.values() if found_role == role] for role in names}


def _find_place(raw: RawSite, own: set[str]) -> tuple[Visit, int, Sequence[Visit]]:
    """Return the input that is to read the new tensor, nearest to the old one, and the nodes that this leaves out.

    What that input feeds must feed the sites in `own` and nothing else.
    """
    steps, place, position = raw.trace.steps, raw.visit, raw.position
    if (found := _find_call(raw) if place.scope.path is None else None) is not None:
        place, position, steps = found[0], found[1], tuple(found[2])
    for index in range(len(steps) - 1, -1, -1):
        outputs = [steps[index].scope.find(output) for output in steps[index].node.output]
        readers = {reader for scope, value in outputs for reader in list_readers(_start_at(raw.trace, scope, value))}
        if readers <= own:
            return steps[index], 0, steps[index + 1 :]
    return place, position, steps


def _start_at(trace: Trace, scope: Scope, name: str) -> Trace:
    return Trace(trace.tensor, scope, name, trace.flipped, ())


def _edit(
    visit: Visit,
    position: int,
    skipped: Sequence[Visit],
    names: Mapping[str, str],
    number: int,
    operands: Mapping[str, Operand],
) -> InputEdit:
    """Return the edit of an input, with copies of the nodes that change what they hand on."""
    before: list[onnx.NodeProto] = []
    value = names[""]
    for index, step in enumerate(reversed([step for step in skipped if step.op != "Identity"])):
        made = f"{names['']}_{step.node.op_type}_{number}_{index}"
        beside = {
            position: names[role]
            for role, each in operands.items()
            for reader, position in each.places
            if reader is step
        }
        before.append(_copy_node(step, {0: value, **beside}, made))
        value = made
    return _rename(visit, position, value, tuple(before))


def _rename(visit: Visit, position: int, name: str, before: "tuple[onnx.NodeProto, ...]" = ()) -> InputEdit:
    assert visit.scope.path is not None, "checked before"
    return InputEdit(visit.scope.path, visit.index, position, name, before)


def _copy_node(step: Visit, reads: Mapping[int, str], made: str) -> "onnx.NodeProto":
    import onnx

    node = onnx.NodeProto()
    node.CopyFrom(step.node)
    node.name, node.output[0] = made, made
    for position, name in reads.items():
        node.input[position] = name
    return node


def apply_edits(graph: "onnx.GraphProto", copies: Iterable[tuple[TensorCopy, str]]) -> None:
    """Have the nodes of a main graph read copies of tensors that are Identities of these; those inside it stay.

    Args:
        graph: changed in place; nothing was inserted into it before.
        copies: of tensors of the main graph, each with the tensor's name.
    """
    from onnx import helper

    added: dict[int, list[onnx.NodeProto]] = {}
    made_by = {name: index for index, node in enumerate(graph.node) for name in node.output}
    for copy, tensor in copies:
        same = helper.make_node("Identity", [tensor], [copy.name], copy.name)
        added.setdefault(made_by.get(tensor, -1) + 1, []).insert(0, same)
        for edit in copy.edits:
            if not edit.path:
                graph.node[edit.node].input[edit.position] = edit.name
                added.setdefault(edit.node, []).extend(edit.before)
    nodes = [each for index, node in enumerate(graph.node) for each in (*added.get(index, ()), node)]
    del graph.node[:]
    graph.node.extend(nodes)
