"""Ranges of activations that a graph has as numbers: which they are, what hangs on them, and the numbers of others.

A range is known by its scale: what is quantised with one scale has one range. Biases of whole numbers count in steps of
an activation's scale times the weight's, and follow it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.traces import trace_constant
from loraformat.containers.onnx_file import OnnxFile
from loraformat.dtypes import BY_ONNX
from loraformat.errors import refuse
from loraformat.problems import Problem

if TYPE_CHECKING:
    import onnx

Ranges: TypeAlias = Mapping[str, tuple[float, float]]
_INT32: Final = 6
FORMS: Final[Mapping[int, type[np.integer[Any]]]] = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16}
"""Number forms of quantised activations, as ONNX numbers them."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """Where an operator has the scales of activations, each with the zero point after it.

    Attributes:
        result: that of what it makes; -1 where that is a float.
        factors: those of what it reads, after the codes themselves; these may be constants, whose scales stay.
        rest: where more of them begin, every third input; 0 for none.
        bias: a bias of whole numbers in steps of the first factor's scale times the weight's; 0 for none.
    """

    result: int
    factors: tuple[int, ...] = ()
    rest: int = 0
    bias: int = 0

    def list_factors(self, inputs: int) -> tuple[int, ...]:
        """Return the scales of what an operator with so many inputs reads."""
        return (*self.factors, *range(self.rest, inputs, 3)) if self.rest else self.factors


QUANTISED: Final[Mapping[str, Quantised]] = {
    "QuantizeLinear": Quantised(1),
    "DequantizeLinear": Quantised(-1, (1,)),
    "QLinearMatMul": Quantised(6, (1, 4)),
    "QLinearConv": Quantised(6, (1,), bias=8),
    "com.microsoft.QGemm": Quantised(7, (1,), bias=6),
    "com.microsoft.QLinearConcat": Quantised(0, rest=3),
    "com.microsoft.QLinearAdd": Quantised(6, (1, 4)),
    "com.microsoft.QLinearMul": Quantised(6, (1, 4)),
    "com.microsoft.QLinearSigmoid": Quantised(3, (1,)),
    "com.microsoft.QLinearLeakyRelu": Quantised(3, (1,)),
    "com.microsoft.QLinearAveragePool": Quantised(3, (1,)),
    "com.microsoft.QLinearGlobalAveragePool": Quantised(3, (1,)),
    "com.microsoft.QLinearSoftmax": Quantised(3, (1,)),
}
HANDING_ON: Final = frozenset({"Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that hand codes on."""
_UNKNOWN: Final = ("QLinear", "QAttention", "QGemm")
_FLOAT_BIASES: Final = frozenset({"Gemm", "Conv"})


@dataclass(slots=True)
class Measured:
    """One range of a graph.

    Attributes:
        scale: the initializer with the scale.
        zero: the one with the zero point.
        biases: the initializers of biases that count in steps of it, each with the one that has its own scale.
    """

    scale: "onnx.TensorProto"
    zero: "onnx.TensorProto"
    biases: "dict[str, tuple[onnx.TensorProto, onnx.TensorProto | None]]"


def find_measured(visits: Sequence[Visit]) -> tuple[dict[str, Measured], list[Problem]]:
    """Return the ranges of the main graph by the names of their scales, and what cannot be measured again."""
    found: dict[str, Measured] = {}
    problems: list[Problem] = []
    for visit in visits:
        if visit.op not in QUANTISED and visit.node.op_type.startswith(_UNKNOWN):
            expected = f"one of {', '.join(QUANTISED)}"
            problems.append(Problem("LF627", f"{visit.op} {visit.node.name!r}", "its own scales", expected))
        place = QUANTISED[visit.op].result if visit.op in QUANTISED else -1
        if place < 0 or _is_fixed(visit):
            continue
        scale, zero = (_find_initializer(visit, position) for position in (place, place + 1))
        if scale is None:
            continue
        tied = next(_list_ties(visit, place, scale.name), None)
        if visit.scope.path != () or zero is None or zero.data_type not in FORMS or scale.dims[:] not in ([], [1]):
            tied = Problem("LF627", "", "a form that is not a number and a zero point of the main graph", "these")
        if tied is not None:
            problems.append(replace(tied, where=f"the scale {scale.name!r} of {visit.op} {visit.node.name!r}"))
        elif zero is not None:
            found.setdefault(scale.name, Measured(scale, zero, {}))
    for visit in visits:
        problems += _note_bias(visit, found)
    return found, problems


def _is_fixed(visit: Visit) -> bool:
    """Say whether a range has nothing to do with the weights: of a constant, or of Softmax, whose operator tells it."""
    if visit.op != "QuantizeLinear":
        return visit.op.endswith("Softmax")
    made_by = visit.scope.producer(visit.node.input[0])
    return _is_constant(visit, 0) or (isinstance(made_by, Visit) and made_by.op == "Softmax")


def _find_initializer(visit: Visit, position: int) -> "onnx.TensorProto | None":
    inputs = visit.node.input
    trace = trace_constant(visit.scope, inputs[position]) if position < len(inputs) and inputs[position] else None
    return trace.tensor if trace is not None and not trace.steps and not trace.blocked else None


def _list_ties(visit: Visit, position: int, name: str) -> Iterator[Problem]:
    """Yield what reads a scale besides operators that use it for activations.

    What a weight is stored in steps of has the weight's range: that of a table that is looked up is its rows' too.
    """
    scope, own = visit.scope.find(visit.node.input[position])
    for reader, place in scope.readers.get(own, ()):
        known = QUANTISED.get(reader.op)
        used = known is not None and place in (known.result, *known.list_factors(len(reader.node.input)))
        if not used:
            yield Problem("LF627", "", f"{reader.describe(place)} needs it as it is", "operators on activations alone")
        elif known is not None and place != known.result and _is_constant(reader, place - 1):
            found = f"{reader.describe(place)} has codes that are stored in steps of it"
            yield Problem("LF627", "", found, "the same scale in the output", severity="note")


def _is_constant(visit: Visit, position: int) -> bool:
    return trace_constant(visit.scope, visit.node.input[position]) is not None


def _note_bias(visit: Visit, found: Mapping[str, Measured]) -> Iterator[Problem]:
    """Note the bias of an operator at the range that it counts in."""
    entry = QUANTISED.get(visit.op)
    if entry is not None and entry.bias:
        scale, bias, step = _find_initializer(visit, entry.factors[0]), _find_initializer(visit, entry.bias), None
    elif visit.op in _FLOAT_BIASES:
        scale, bias, step = _find_dequantised(visit)
    else:
        return
    if scale is None or bias is None or bias.data_type != _INT32 or scale.name not in found:
        return
    other = next((name for name, each in found.items() if bias.name in each.biases and name != scale.name), "")
    if other:
        found_ties = f"the bias {bias.name!r} counts in steps of {scale.name!r} and of {other!r}"
        yield Problem("LF627", f"{visit.op} {visit.node.name!r}", found_ties, "a bias for each")
    found[scale.name].biases[bias.name] = (bias, step)


def _find_dequantised(visit: Visit) -> "tuple[onnx.TensorProto | None, ...]":
    """Return the scale of the activation, the bias and its own scale, of an operator behind DequantizeLinear."""
    if len(visit.node.input) < 3:
        return None, None, None
    x, b = (visit.scope.producer(visit.node.input[position]) for position in (0, 2))
    if not all(isinstance(each, Visit) and each.op == "DequantizeLinear" for each in (x, b)):
        return None, None, None
    assert isinstance(x, Visit) and isinstance(b, Visit), "asked before"  # noqa: PT018
    return _find_initializer(x, 1), _find_initializer(b, 0), _find_initializer(b, 1)


def check_ranges(found: Mapping[str, Measured], problems: Sequence[Problem], ranges: Ranges | None) -> list[Problem]:
    """Return what speaks against giving a graph these ranges; None stands for any."""
    if ranges is None:
        return list(problems)
    missing = sorted(found.keys() - ranges.keys())
    unknown = sorted(ranges.keys() - found.keys())
    listed = [*problems]
    if missing:
        listed.append(Problem("LF627", missing[0], "no range", f"one for each of {len(found)} scales"))
    if unknown:
        listed.append(Problem("LF627", unknown[0], "a range", "the scales that the graph has"))
    return listed


def set_ranges(opened: OnnxFile, found: Mapping[str, Measured], ranges: Ranges) -> "Iterator[onnx.TensorProto]":
    """Yield the initializers that have other numbers for other ranges.

    Scale and zero point are those of onnxruntime's quantiser: zero lies in the range, and where all zero points of the
    graph are the middle code, the range is made symmetric.

    Raises:
        LoraformatError: LF627 a bias that does not fit into 32 bits any more.
    """
    symmetric = all(_read(opened, each.zero) == _middle(each.zero) for each in found.values())
    for name, measured in found.items():
        old = np.float64(_read(opened, measured.scale).reshape(-1)[0])
        scale, zero = compute_numbers(*ranges[name], FORMS[measured.zero.data_type], symmetric=symmetric)
        stored = np.asarray(scale, BY_ONNX[measured.scale.data_type].numpy())
        yield _write(measured.scale, stored)
        yield _write(measured.zero, np.asarray(zero, FORMS[measured.zero.data_type]))
        ratio = old / np.float64(stored)
        for bias, step in measured.biases.values():
            counts = np.rint(_read(opened, bias) * ratio)
            if np.abs(counts).max(initial=0) >= 2**31:
                raise refuse("LF627", bias.name, f"a bias of more than 31 bits for {name!r}", "a wider range")
            yield _write(bias, counts.astype(np.int32))
            if step is not None:
                steps = _read(opened, step)
                yield _write(step, (steps / ratio).astype(steps.dtype))


def compute_numbers(low: float, high: float, form: type[np.integer[Any]], *, symmetric: bool) -> tuple[float, int]:
    """Return scale and zero point of a range."""
    limits = np.iinfo(form)
    low, high = min(low, 0.0), max(high, 0.0)
    first, last = int(limits.min), int(limits.max)
    if symmetric:
        high = max(-low, high)
        low, first = -high, first + 1 if first < 0 else first
    scale = (high - low) / (last - first)
    if scale < np.finfo(np.float32).tiny:
        return 1.0, 0
    return scale, int(np.round((first + last) / 2 if symmetric else first - low / scale))


def _middle(zero: "onnx.TensorProto") -> int:
    limits = np.iinfo(FORMS[zero.data_type])
    return (int(limits.min) + int(limits.max) + 1) // 2


def _read(opened: OnnxFile, tensor: "onnx.TensorProto") -> NDArray[Any]:
    stored = opened.stored_tensor(tensor)
    if isinstance(stored, Problem):
        held = opened.held_tensor(tensor)
        if held is None:
            raise refuse("LF627", tensor.name, "numbers that cannot be read", "a tensor that is stored as one run")
        return held.read()
    return stored.read()


def _write(like: "onnx.TensorProto", values: NDArray[Any]) -> "onnx.TensorProto":
    import onnx

    shaped = np.array(values).reshape(tuple(like.dims))
    made: onnx.TensorProto = onnx.numpy_helper.from_array(shaped, like.name)
    return made
