"""One expert picked from a packed tensor: by which index, and into which product it goes.

The tensor has three dimensions, experts first. Before and after the pick it may pass through what leaves a matrix as it
is or transposes it.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from loraformat.adapter import SlotKind
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.traces import Trace, trace_constant
from loraformat.bases._onnx.uses import USES, read_attribute, read_use

if TYPE_CHECKING:
    import onnx

_STEPS: Final = 8
_WIDE: Final = 8
_WIDTHS: Final = {6: 4, 7: _WIDE}
"""Bytes of int32 and int64, by ONNX's numbers for them."""
_FEW: Final = 8
_NODES: Final = 64
_SHAPES: Final = frozenset({"Shape", "Size"})
_PRODUCTS: Final = frozenset({"MatMul", "Gemm", "com.microsoft.FusedMatMul", "com.microsoft.FusedGemm"})
_PASSING: Final = frozenset({"Identity", "Cast", "Squeeze", "Unsqueeze"})
_AFTER: Final = frozenset({"Add", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_HALVING: Final = frozenset({"Split", "SplitToSequence"})


@dataclass(frozen=True, slots=True)
class Product:
    """What an expert's matrix is multiplied with.

    Attributes:
        visit: the node; None for an operator that does all by itself.
        turned: whether the matrix that was picked is the transpose of `(out, in)`.
        divisor: what the operator multiplies the product by.
        refusal: why nothing can be merged there; empty when it can.
        doubt: why it is not known which side of the matrix is the input.
    """

    visit: Visit | None
    turned: bool
    divisor: float = 1.0
    refusal: str = ""
    doubt: str = ""


def trace_packed(visit: Visit, position: int) -> Trace | None:
    """Follow an input back to a stored tensor of three dimensions; None where it is none, or cannot be followed."""
    inputs = visit.node.input
    if position >= len(inputs) or not inputs[position]:
        return None
    scope, name = visit.scope, inputs[position]
    steps: list[Visit] = []
    flipped = False
    for _ in range(_STEPS):
        trace = trace_constant(scope, name)
        if trace is None or trace.flipped:
            return None
        steps += trace.steps
        if trace.tensor is not None:
            found = replace(trace, flipped=flipped, steps=tuple(steps))
            return found if len(trace.tensor.dims) == 3 and not trace.blocked else None
        made_by = trace.scope.producer(trace.name)
        turn = _read_turn(made_by) if isinstance(made_by, Visit) and made_by.op == "Transpose" else None
        if turn is None or not isinstance(made_by, Visit):
            return None
        flipped ^= turn
        steps.append(made_by)
        scope, name = made_by.scope, made_by.node.input[0]
    return None


def _read_turn(visit: Visit) -> bool | None:
    """Say whether a Transpose swaps the last two dimensions, the only ones that it may; None for any other."""
    order = next((list(a.ints) for a in visit.node.attribute if a.name == "perm"), [])
    if order == list(range(len(order))):
        return False if order else None
    swapped = [*range(len(order) - 2), len(order) - 1, len(order) - 2]
    return True if order == swapped else None


def pick_expert(visit: Visit, experts: int) -> int | str | None:
    """Return the one expert that a node picks, None where any may be, words for a pick that is none of experts."""
    if visit.op == "Gather":
        if read_attribute(visit.node, "axis", 0) != 0:
            return "a lookup along another axis"
        return _read_index(visit, 1, experts)
    if visit.op == "GatherND":
        return "a lookup in batches" if read_attribute(visit.node, "batch_dims", 0) else None
    if visit.op != "Slice":
        return None
    start, stop, axis = (_read_index(visit, position, experts) for position in (1, 2, 3))
    one = start is not None and stop is not None and axis == 0 and stop == start + 1
    return start if one else "a slice of more than one"


def _read_index(visit: Visit, position: int, experts: int) -> int | None:
    """Return the one number that an input holds, counted from the front; None where it is none or not constant."""
    numbers = read_numbers(visit, position)
    if len(numbers) != 1:
        return None
    return numbers[0] + experts if numbers[0] < 0 else numbers[0]


def read_numbers(visit: Visit, position: int) -> list[int]:
    """Return the few whole numbers that an input holds in the graph itself; nothing where it holds none."""
    inputs = visit.node.input
    if position >= len(inputs) or not inputs[position]:
        return []
    trace = trace_constant(visit.scope, inputs[position])
    if trace is None or trace.tensor is None or trace.blocked or any(step.op != "Identity" for step in trace.steps):
        return []
    return _unpack(trace.tensor)


def _unpack(tensor: "onnx.TensorProto") -> list[int]:
    width = _WIDTHS.get(tensor.data_type, 0)
    count = math.prod(tensor.dims)
    if not width or not 0 < count <= _FEW or tensor.external_data:
        return []
    if tensor.raw_data:
        raw = bytes(tensor.raw_data)
        return [int.from_bytes(raw[at : at + width], "little", signed=True) for at in range(0, len(raw), width)]
    held = tensor.int64_data if width == _WIDE else tensor.int32_data
    return [int(number) for number in held] if len(held) == count else []


def find_product(visit: Visit, position: int) -> Product | None:
    """Return the product that a picked expert goes into, and on which side; None where it goes elsewhere too."""
    turned = False
    for _ in range(_STEPS):
        if visit.op in _PRODUCTS:
            use = read_use(visit, position, USES[visit.op][1])
            return Product(visit, turned ^ use.orientations[SlotKind.LINEAR], use.divisor, use.refusal)
        readers = visit.scope.readers.get(next(iter(visit.node.output), ""), [])
        if len(readers) != 1:
            return None
        visit, position = readers[0]
        turn = _read_turn(visit) if visit.op == "Transpose" else False
        if turn is None or (position and visit.op not in _PRODUCTS):
            return None
        if visit.op not in _PASSING | _PRODUCTS | {"Transpose"}:
            return None
        turned ^= turn
    return None


def find_arrangement(visit: Visit) -> str:
    """Return how what follows divides a product of gate and up: `halves`, `turns`, or nothing where it does not."""
    for _ in range(_STEPS):
        readers = [reader for reader, _ in visit.scope.readers.get(next(iter(visit.node.output), ""), [])]
        readers = [reader for reader in readers if reader.op not in ("Shape", "Size")]
        if any(reader.op in _HALVING for reader in readers):
            return "halves"
        if len(readers) == 2 and all(reader.op == "Slice" for reader in readers):
            return _read_strides(readers)
        if len(readers) != 1 or readers[0].op not in _AFTER:
            return ""
        visit = readers[0]
    return ""


def _read_strides(slices: list[Visit]) -> str:
    """Return which of the two it is that two Slices take: one after the other, or every other one."""
    strides = {_read_index(each, 4, 0) if len(each.node.input) > 4 else 1 for each in slices}
    return "halves" if strides == {1} else "turns" if strides == {2} else ""


def find_chooser(visit: Visit) -> tuple[Visit, int, Trace] | None:
    """Return the linear layer whose results say which experts a node picks: node, input and weight; None for no one.

    Its results go through a TopK, and what stands between makes nothing of other layers.
    """
    pending = [visit.scope.find(visit.node.input[1])] if len(visit.node.input) > 1 else []
    seen: set[tuple[int, str]] = set()
    ops: set[str] = set()
    layers: dict[Visit, tuple[Visit, int, Trace]] = {}
    while pending and len(seen) < _NODES:
        scope, name = pending.pop()
        made_by = scope.producers.get(name)
        if (id(scope), name) in seen or not isinstance(made_by, Visit) or made_by.op in _SHAPES:
            continue
        seen.add((id(scope), name))
        ops.add(made_by.op)
        layer = _read_layer(made_by)
        if layer is not None:
            layers[made_by] = layer
        else:
            pending += [made_by.scope.find(each) for each in made_by.node.input if each]
    return next(iter(layers.values())) if len(layers) == 1 and not pending and "TopK" in ops else None


def _read_layer(visit: Visit) -> tuple[Visit, int, Trace] | None:
    """Return a node that multiplies by a stored matrix, with the input that it reads it at, and the matrix."""
    for position in (1, 0) if visit.op in _PRODUCTS else ():
        trace = trace_constant(visit.scope, visit.node.input[position])
        if trace is not None and trace.tensor is not None and len(trace.tensor.dims) > 1:
            return visit, position, trace
    return None
