"""The single numbers, and sizes, that a graph holds or computes from such."""

from collections.abc import Callable, Mapping, Sequence
from math import prod, sqrt
from operator import mul, truediv
from typing import Any, Final

import numpy as np

from loraformat.bases._onnx.scopes import Scope, Visit
from loraformat.bases._onnx.traces import read_sizes, trace_constant

_INT64: Final = 7
_SCALAR_FORMS: Final[Mapping[int, Any]] = {1: np.float32, 7: np.int64, 10: np.float16, 11: np.float64}
_CODES: Final[Mapping[int, Any]] = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16}
_ARITHMETIC: Final[Mapping[str, tuple[int, Callable[..., float]]]] = {
    **dict.fromkeys(("Cast", "CastLike", "Identity", "Reshape", "Squeeze", "Unsqueeze", "QuantizeLinear"), (1, float)),
    "Sqrt": (1, sqrt),
    "Reciprocal": (1, lambda number: 1 / number),
    "Div": (2, truediv),
    "Mul": (2, mul),
}
"""What exporters compute scales with: how many inputs count, and what is made of them."""

_WRITTEN: Final[Mapping[str, Callable[[Any], Sequence[float]]]] = {
    "value_float": lambda attribute: [attribute.f],
    "value_floats": lambda attribute: attribute.floats,
    "value_int": lambda attribute: [attribute.i],
    "value_ints": lambda attribute: attribute.ints,
}
"""Attributes of a Constant that has its numbers in no tensor."""


def read_scalar(visit: Visit, position: int) -> float | None:
    """Return the one number that a node reads at a position; None where it reads something else."""
    return compute_scalar(visit.scope, visit.node.input[position]) if position < len(visit.node.input) else None


def compute_scalar(scope: Scope, name: str, steps: int = 8) -> float | None:
    """Return the one number that a value is, stored or computed of such."""
    scope, own = scope.find(name)
    made_by = scope.producers.get(own)
    if isinstance(made_by, Visit) and made_by.op == "DequantizeLinear" and steps:
        return _decode(made_by, steps - 1)
    if isinstance(made_by, Visit) and made_by.op == "Constant":
        written = [
            float(number) for a in made_by.node.attribute if a.name in _WRITTEN for number in _WRITTEN[a.name](a)
        ]
        return written[0] if len(written) == 1 else _read_number(scope, own)
    if not isinstance(made_by, Visit) or made_by.op not in _ARITHMETIC or not steps:
        return _read_number(scope, own)
    count, apply = _ARITHMETIC[made_by.op]
    numbers = [compute_scalar(made_by.scope, each, steps - 1) for each in made_by.node.input[:count]]
    known = [number for number in numbers if number is not None]
    try:
        return apply(*known) if len(known) == count else None
    except (ZeroDivisionError, OverflowError, ValueError):
        return None


def _decode(visit: Visit, steps: int) -> float | None:
    """Return the one number that a node makes of a code, or of a number that was just rounded to one."""
    made_by = visit.scope.producer(visit.node.input[0])
    if isinstance(made_by, Visit) and made_by.op == "QuantizeLinear":
        return compute_scalar(made_by.scope, made_by.node.input[0], steps)
    code, step = _read_number(visit.scope, visit.node.input[0]), _read_number(visit.scope, visit.node.input[1])
    zero = _read_number(visit.scope, visit.node.input[2]) if len(visit.node.input) > 2 else 0.0
    return (code - zero) * step if code is not None and step is not None and zero is not None else None


def _read_number(scope: Scope, name: str) -> float | None:
    trace = trace_constant(scope, name)
    tensor = trace.tensor if trace is not None and not trace.blocked else None
    form = _SCALAR_FORMS.get(tensor.data_type, _CODES.get(tensor.data_type)) if tensor is not None else None
    if tensor is None or form is None or prod(tensor.dims) != 1:
        return None
    if tensor.raw_data:
        return float(np.frombuffer(tensor.raw_data, form)[0])
    codes = tensor.int32_data if tensor.data_type in _CODES else ()  # It holds the bits of float16 too.
    typed = [*tensor.float_data, *tensor.double_data, *tensor.int64_data, *codes]
    return float(typed[0]) if typed else None


def read_last_size(reshape: Visit) -> int:
    """Return the last size that a Reshape gives, 0 where the graph does not say."""
    made_by, visit, position = reshape.scope.producer(reshape.node.input[1]), reshape, 1
    if isinstance(made_by, Visit) and made_by.op == "Concat":
        visit, position = made_by, len(made_by.node.input) - 1
    numbers = read_sizes(visit, position, "") or [int(read_scalar(visit, position) or 0)]
    return max(0, numbers[-1])


def read_integers(scope: Scope, name: str) -> list[int]:
    """Return constant whole numbers; none for anything else."""
    trace = trace_constant(scope, name)
    tensor = trace.tensor if trace is not None and not trace.blocked else None
    if tensor is None or tensor.data_type != _INT64:
        return []
    return np.frombuffer(tensor.raw_data, np.int64).tolist() if tensor.raw_data else list(tensor.int64_data)
