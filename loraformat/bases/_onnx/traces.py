"""Values of an ONNX graph that hang on no input of the model, followed back to the tensors that they are made of."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from loraformat.bases._onnx.scopes import Scope, Visit

if TYPE_CHECKING:
    import onnx

_STEPS: Final = 32
_PASSING: Final = frozenset({"Identity", "Cast", "Transpose", "DequantizeLinear"})
_RESHAPING: Final = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_UINT8: Final = 2
_INT64: Final = 7
_DIMS: Final = 3
"""Rows of codes, blocks of a row, bytes of a block: how MatMulNBits has its weight."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A value followed back to a stored tensor.

    Attributes:
        tensor: the tensor.
        scope: where its name lives.
        name: the value's name there.
        flipped: whether an odd number of transpositions lies between.
        steps: the nodes between, nearest first.
        blocked: the operator that stands in the way, when the value is constant but cannot be followed.
        view: the shape that nodes give the stored numbers before any transposition; None for the stored one.
    """

    tensor: "onnx.TensorProto | None"
    scope: Scope
    name: str
    flipped: bool
    steps: tuple[Visit, ...]
    blocked: str = ""
    view: tuple[int, ...] | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape in which the stored numbers are read; of none, nothing."""
        return self.view if self.view is not None else tuple(self.tensor.dims if self.tensor is not None else ())


def trace_constant(scope: Scope, name: str) -> Trace | None:
    """Follow a value back through Identity, Cast, matrix Transpose and DequantizeLinear; None if it is no constant."""
    steps: list[Visit] = []
    flipped = False
    for _ in range(_STEPS):
        owner, own = scope.find(name)
        made_by = owner.producers.get(own)
        if made_by is None:
            sparse = own in owner.sparse
            return Trace(None, owner, own, flipped, tuple(steps), "a sparse initializer") if sparse else None
        if not isinstance(made_by, Visit):
            return _end_trace(Trace(made_by, owner, own, flipped, tuple(steps)))
        if made_by.op == "Constant":
            return _trace_constant_node(made_by, own, flipped, steps)
        if not hands_on(made_by) or not made_by.node.input or not _passes(made_by):
            return Trace(None, owner, own, flipped, tuple(steps), made_by.op) if _is_constant(made_by) else None
        flipped ^= made_by.op == "Transpose" and not _keeps_order(made_by)
        steps.append(made_by)
        scope, name = made_by.scope, made_by.node.input[0]
    return None


def _trace_constant_node(visit: Visit, name: str, flipped: bool, steps: Sequence[Visit]) -> Trace | None:
    for attribute in visit.node.attribute:
        if attribute.name == "value" and attribute.HasField("t"):
            return _end_trace(Trace(attribute.t, visit.scope, name, flipped, tuple(steps)))
    return None


def _end_trace(trace: Trace) -> Trace:
    """Return the trace, blocked where what was taken for the transposition of a matrix is one of more dimensions."""
    turned = any(step.op == "Transpose" for step in trace.steps)
    if turned and trace.tensor is not None and len(trace.tensor.dims) != 2:
        return replace(trace, blocked="Transpose")
    return trace


def hands_on(visit: Visit) -> bool:
    """Say whether a node's first input is followed by `trace_constant`, a Transpose's of any sizes too."""
    return visit.op in _PASSING or (visit.op == "Reshape" and _flattens_blocks(visit))


def _flattens_blocks(visit: Visit) -> bool:
    """Say whether a Reshape makes rows of stored codes in blocks, `(rows, blocks, bytes)`: as tied tables have them."""
    if len(visit.node.input) != 2:
        return False
    codes, wanted = visit.scope.producer(visit.node.input[0]), read_sizes(visit, 1, "")
    if codes is None or isinstance(codes, Visit) or codes.data_type != _UINT8 or len(codes.dims) != _DIMS:
        return False
    rows, blocks, length = codes.dims
    return wanted in ([rows, blocks * length], [rows, -1])


def read_sizes(visit: Visit, position: int, attribute: str) -> list[int] | None:
    """Return the few whole numbers that stand at an input or in an attribute; None where they are not constant."""
    if position >= len(visit.node.input) or not visit.node.input[position]:
        return next((list(each.ints) for each in visit.node.attribute if each.name == attribute), [])
    made_by = visit.scope.producer(visit.node.input[position])
    if isinstance(made_by, Visit) and made_by.op == "Constant":
        values = {each.name: each for each in made_by.node.attribute}
        if "value_ints" in values:
            return list(values["value_ints"].ints)
        made_by = values["value"].t if "value" in values else None
    if made_by is None or isinstance(made_by, Visit) or made_by.data_type != _INT64:
        return None
    found = [each for (each,) in struct.iter_unpack("<q", made_by.raw_data)] or list(made_by.int64_data)
    return found if len(found) == math.prod(made_by.dims) else None


def reshapes(visit: Visit) -> bool:
    """Say whether a node gives its first input another shape, which is constant."""
    return visit.op in _RESHAPING and read_sizes(visit, 1, "axes") is not None


def _permutation(visit: Visit) -> list[int]:
    return next((list(a.ints) for a in visit.node.attribute if a.name == "perm"), [1, 0])


def _passes(visit: Visit) -> bool:
    """Say whether a Transpose is of a matrix; without a permutation it may be of anything: `_end_trace` looks."""
    return visit.op != "Transpose" or sorted(_permutation(visit)) == [0, 1]


def _keeps_order(visit: Visit) -> bool:
    return _permutation(visit) == [0, 1]


def _is_constant(visit: Visit) -> bool:
    """Say whether a node's result does not depend on the model's inputs, looking a bounded number of nodes back."""
    pending, seen = [visit], {id(visit)}
    while pending:
        current = pending.pop()
        for name in filter(None, current.node.input):
            made_by = current.scope.producer(name)
            if made_by is None or len(seen) > _STEPS:
                return False
            if isinstance(made_by, Visit) and id(made_by) not in seen:
                seen.add(id(made_by))
                pending.append(made_by)
    return bool(visit.node.input)
