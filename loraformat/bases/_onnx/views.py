"""Weights that reach their operator in another shape than the stored one, with their numbers in the same order.

And who reads a weight, through all that lies between.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Final

from loraformat.bases._onnx.scopes import Scope, Visit
from loraformat.bases._onnx.traces import Trace, hands_on, read_sizes, reshapes, trace_constant

if TYPE_CHECKING:
    import onnx

_RESHAPES: Final = 8
_FLOATS: Final = frozenset({1, 10, 11, 16})
"""FLOAT, FLOAT16, DOUBLE, BFLOAT16, as ONNX numbers them."""
_MATRIX: Final = 2
_SHAPE_ONLY: Final = frozenset({"Shape", "Size"})


def trace_weight(scope: Scope, name: str) -> Trace | None:
    """Follow a value back as `trace_constant` does, and through what gives floats another shape that is constant."""
    found = trace_constant(scope, name)
    if found is None or not found.blocked:
        return found
    trace, count = found, 0
    while trace.tensor is None and count < _RESHAPES:
        visit = trace.scope.producers.get(trace.name)
        inner = (
            trace_constant(visit.scope, visit.node.input[0]) if isinstance(visit, Visit) and reshapes(visit) else None
        )
        if inner is None or not isinstance(visit, Visit):
            return found
        steps = (*trace.steps, visit, *inner.steps)
        trace = replace(inner, flipped=trace.flipped ^ inner.flipped, steps=steps)
        count += 1
    view = _read_view(trace) if trace.tensor is not None and not trace.blocked else None
    return replace(trace, view=view) if view is not None else found


def _read_view(trace: Trace) -> tuple[int, ...] | None:
    """Return the shape in which the stored numbers are read, before they are transposed; None where they are not."""
    assert trace.tensor is not None, "looked at by the caller"
    if trace.tensor.data_type not in _FLOATS:
        return None
    sizes, flipped = list(trace.tensor.dims), False
    for step in reversed(trace.steps):
        if step.op == "Transpose":
            if len(sizes) != _MATRIX:
                return None
            flipped ^= _turns(step)
        elif reshapes(step):
            wanted = _read_shape(step, sizes) if not flipped else None
            if wanted is None or math.prod(wanted) != math.prod(sizes):
                return None
            sizes = wanted
    return tuple(sizes)


def _turns(visit: Visit) -> bool:
    return next((list(each.ints) for each in visit.node.attribute if each.name == "perm"), [1, 0]) == [1, 0]


def _read_shape(visit: Visit, sizes: Sequence[int]) -> list[int] | None:
    """Return the shape that a node gives to one of these sizes; None where it cannot."""
    if visit.op == "Reshape":
        return _fill(read_sizes(visit, 1, ""), sizes, visit.node)
    if visit.op == "Flatten":
        axis = next((each.i for each in visit.node.attribute if each.name == "axis"), 1)
        return [math.prod(sizes[:axis]), math.prod(sizes[axis:])] if abs(axis) <= len(sizes) else None
    axes = read_sizes(visit, 1, "axes")
    if visit.op == "Squeeze":
        chosen = {axis % len(sizes) for axis in axes} if axes and sizes else set(_find_ones(sizes))
        return (
            [size for axis, size in enumerate(sizes) if axis not in chosen]
            if chosen <= set(_find_ones(sizes))
            else None
        )
    rank = len(sizes) + len(axes or ())
    chosen = {axis % rank for axis in axes or ()}
    rest = iter(sizes)
    return [1 if axis in chosen else next(rest) for axis in range(rank)] if len(chosen) == len(axes or ()) else None


def _find_ones(sizes: Sequence[int]) -> Iterator[int]:
    return (axis for axis, size in enumerate(sizes) if size == 1)


def _fill(wanted: Sequence[int] | None, sizes: Sequence[int], node: "onnx.NodeProto") -> list[int] | None:
    """Return the shape that a Reshape makes, with 0 for a size that stays and -1 for one that follows."""
    if wanted is None or any(each.name == "allowzero" and each.i for each in node.attribute):
        return None
    if any(size == 0 for size in islice(wanted, len(sizes), None)) or list(wanted).count(-1) > 1:
        return None
    shape = [sizes[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    known = math.prod(size for size in shape if size != -1)
    if known <= 0:
        return None
    return [math.prod(sizes) // known if size == -1 else size for size in shape]


def list_readers(trace: Trace) -> Iterator[str]:
    """Yield words for everything that reads the traced tensor, through what may be followed back.

    What asks only for its shape does not count.
    """
    pending, seen = [(trace.scope, trace.name)], set()
    while pending:
        scope, name = pending.pop()
        if (id(scope), name) in seen:
            continue
        seen.add((id(scope), name))
        if name in scope.outputs:
            yield f"output {name!r} of the {scope.label}"
        for visit, position in scope.readers.get(name, ()):
            if position == 0 and (hands_on(visit) or reshapes(visit)):
                pending += [visit.scope.find(output) for output in visit.node.output]
            elif visit.op not in _SHAPE_ONLY:
                yield visit.describe(position)
