"""Which names of an ONNX graph change when some readers of a tensor get one of their own."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from loraformat.bases._onnx_scopes import Scope, Trace, Visit, list_readers
from loraformat.bases._onnx_sites import RawSite
from loraformat.containers.onnx_file import InputEdit

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
            chosen[site] = _choose(f"{raw.module}.{raw.parameter}" if raw.module else f"{raw.trace.name}_1", taken)
            taken.add(chosen[site])
    return chosen


def _choose(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 0
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def can_part(raw: RawSite) -> bool:
    """Say whether names between the tensor and the node can change: a function's are those of all its callers."""
    return all(scope.path is not None for scope in (raw.visit.scope, *(step.scope for step in raw.trace.steps)))


def list_edits(found: Sequence[RawSite], name: str) -> Iterator[InputEdit]:
    """Yield what must change for some sites of one tensor to read another one called `name`."""
    own = {raw.visit.describe(raw.position) for raw in found}
    edits: dict[tuple[Visit, int], InputEdit] = {}
    for number, raw in enumerate(found):
        visit, position, skipped = _find_place(raw, own)
        edits.setdefault((visit, position), _edit(visit, position, skipped, name, number))
    yield from edits.values()


def _find_place(raw: RawSite, own: set[str]) -> tuple[Visit, int, Sequence[Visit]]:
    """Return the input that is to read the new tensor, nearest to the old one, and the nodes that this leaves out.

    What that input feeds must feed the sites in `own` and nothing else.
    """
    steps = raw.trace.steps
    for index in range(len(steps) - 1, -1, -1):
        outputs = [steps[index].scope.find(output) for output in steps[index].node.output]
        readers = {reader for scope, value in outputs for reader in list_readers(_start_at(raw.trace, scope, value))}
        if readers <= own:
            return steps[index], 0, steps[index + 1 :]
    return raw.visit, raw.position, steps


def _start_at(trace: Trace, scope: Scope, name: str) -> Trace:
    return Trace(trace.tensor, scope, name, trace.flipped, ())


def _edit(visit: Visit, position: int, skipped: Sequence[Visit], name: str, number: int) -> InputEdit:
    """Return the edit of an input, with copies of the nodes that change what they hand on."""
    before: list[onnx.NodeProto] = []
    value = name
    for index, step in enumerate(reversed([step for step in skipped if step.op != "Identity"])):
        made = f"{name}_{step.node.op_type}_{number}_{index}"
        before.append(_copy_node(step, value, made))
        value = made
    assert visit.scope.path is not None, "checked before"
    return InputEdit(visit.scope.path, visit.index, position, value, tuple(before))


def _copy_node(step: Visit, read: str, made: str) -> "onnx.NodeProto":
    import onnx

    node = onnx.NodeProto()
    node.CopyFrom(step.node)
    node.name = made
    node.input[0], node.output[0] = read, made
    return node


def apply_edits(graph: "onnx.GraphProto", edits: Iterable[InputEdit], tensor: str, name: str) -> None:
    """Have the nodes of a main graph read a copy of `tensor` that is an Identity of it; those inside it stay.

    Args:
        graph: changed in place; nothing was inserted into it before.
        edits: of `list_edits`.
        tensor: the tensor.
        name: the copy.
    """
    from onnx import helper

    added: dict[int, list[onnx.NodeProto]] = {}
    for edit in edits:
        if not edit.path:
            graph.node[edit.node].input[edit.position] = edit.name
            added.setdefault(edit.node, []).extend(edit.before)
    nodes = [each for index, node in enumerate(graph.node) for each in (*added.get(index, ()), node)]
    made_by = next((index for index, node in enumerate(nodes) if tensor in node.output), -1)
    nodes.insert(made_by + 1, helper.make_node("Identity", [tensor], [name], name))
    del graph.node[:]
    graph.node.extend(nodes)
