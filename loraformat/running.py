"""What onnxruntime computes from a merged ONNX model, beside its base with the change computed apart from it.

Apart means: every node that reads a changed weight gets a second node beside it, the same with the change in the place
of the weight, and the two results are added. The base's own weights stay as they are, and no merged number is used.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.bases import BaseModel, CopyingBase
from loraformat.coded_work import CodedWork, list_tiles
from loraformat.engine import index_targets, open_floats
from loraformat.errors import refuse
from loraformat.limits import RETAINED_WARN
from loraformat.output_forms import Order, index_weights
from loraformat.problems import Problem
from loraformat.tiles import TileBuffers, change_tile
from loraformat.weight_work import WeightWork

if TYPE_CHECKING:
    import onnx

_PASSING: Final = frozenset({"Identity", "Cast", "Transpose", "DequantizeLinear", "Reshape"})
_NBITS: Final = "MatMulNBits"
_INTEGER: Final = "MatMulInteger"
_TABLE: Final = "GatherBlockQuantized"
_LINEAR: Final = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "Conv": (1,),
    "Gather": (0,),
    "FusedMatMul": (0, 1),
    _TABLE: (0,),
    _NBITS: (1,),
    _INTEGER: (1,),
}
"""Operators whose result is linear in a weight, and the inputs where it can be; their other inputs but X are added."""
_FOLDER_KEY: Final = "session.model_external_initializers_file_folder_path"
_SIZES: Final = {"past": 0, "batch": 2}
_SIZE: Final = 8
_LARGEST_ID: Final = (64, 2)
"""Random whole numbers lie below: first tried, and where a table is smaller."""
_NOISE: Final = 1e-3
_NO_SIZES: Final[Mapping[str, int]] = MappingProxyType({})
_FLOAT: Final = 1
_MARK: Final = "#change"


@dataclass(frozen=True, slots=True)
class RunResult:
    """How one output of the models compares; all norms are taken over all its numbers.

    Attributes:
        output: its name.
        effect: ‖base with the change apart - base‖ / ‖base‖.
        kept: share of that change that the merged model's output has: the projection on it.
        difference: ‖merged - base with the change apart‖ / ‖base‖.
    """

    output: str
    effect: float
    kept: float
    difference: float

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {"output": self.output, "effect": self.effect, "kept": self.kept, "difference": self.difference}


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one stored tensor.

    Attributes:
        tensor: the tensor's name in the graph.
        shape: its dimensions as the operator reads them.
        form: number form in which the operator reads it, as onnx numbers them.
        delta: the change, as a matrix of float32, in the stored orientation.
    """

    tensor: str
    shape: tuple[int, ...]
    form: int
    delta: NDArray[np.float32]


def list_changes(order: Order, base: BaseModel) -> list[Change]:
    """Return what an order adds to each weight, whole: as much memory as the touched weights take in float32."""
    weights, targets, buffers = index_weights(base), index_targets(order.adapters), TileBuffers()
    floats = open_floats(order.plan, order.checkpoint)
    tensors = {key: weight.tensor for key, weight in weights.items()}
    changes = []
    for weight in order.plan.weights:
        source = weights[weight.key]
        own = [targets[change.adapter][change.target] for change in weight.changes]
        if weight.is_coded:
            work: WeightWork = CodedWork(weight, source, own, floats)
        else:
            work = WeightWork(weight, source.tensor, own, tensors)
        tiles = [change_tile(work, buffers, rows)[2].astype(np.float32) for rows in list_tiles(weight)]
        delta, shape, dtype = np.concatenate(tiles), weight.shape, source.tensor.dtype
        if source.coding is not None:
            dtype = source.coding.companions["scales"].dtype
            delta = delta[:, : delta.shape[1] - source.coding.padding]
            if any(change.part is not None for change in weight.changes):  # Blocks of a row have shapes of their own.
                shape = delta.shape
        changes.append(Change(weight.name, shape, dtype.onnx or _FLOAT, delta))
    return changes


def compare_runs(
    base: CopyingBase, merged: Path, changes: Sequence[Change], sizes: Mapping[str, int] = _NO_SIZES
) -> tuple[list[RunResult], list[Problem]]:
    """Run base, merged model, and base with the changes apart on the same random inputs.

    Args:
        base: the base model, with the copies that the merge makes.
        merged: the merged model.
        changes: what the merge adds.
        sizes: sizes of symbolic dimensions of the inputs, by name; others get small ones.

    Raises:
        RefusedError: LF446 onnxruntime is missing or cannot run a model.
    """
    import onnx

    model = onnx.load(str(base.path), load_external_data=False)
    base.rewire(model.graph)
    feeds_apart = dict(_add_branches(model, changes))
    reached = {name.rpartition(_MARK)[0] for name in feeds_apart}
    problems = [
        Problem("LF446", each.tensor, "nothing reads it that can be computed apart", "MatMul, Gemm, Conv or Gather")
        for each in changes
        if each.tensor not in reached
    ]
    sessions = [_open(base.path), _open(merged), _open(base.path, model)]
    outputs = _run_all(sessions, feeds_apart, sizes)
    names = [output.name for output in sessions[0].get_outputs()]
    results = [
        _compare(name, *(np.asarray(each[index], np.float64) for each in outputs))
        for index, name in enumerate(names)
        if np.asarray(outputs[0][index]).dtype.kind == "f" and np.asarray(outputs[0][index]).size
    ]
    if problems:  # What was not computed apart cannot be blamed on the merged model.
        return results, problems
    return results, [problem for result in results for problem in _judge(result)]


@dataclass(frozen=True, slots=True)
class _Reader:
    """A node that applies a weight, and how to compute the change beside it.

    Attributes:
        total: the node to whose output the change is added: itself, or what makes a float of its whole numbers.
        beside: the same operation on the change, which it reads as `_MARK`; without an output yet.
        flipped: whether the change is to be transposed.
        form: number form in which it is read.
    """

    total: "onnx.NodeProto"
    beside: "onnx.NodeProto"
    flipped: bool
    form: int


def _add_branches(model: "onnx.ModelProto", changes: Sequence[Change]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Add to a model what computes changes apart; yield the new inputs and their values."""
    from onnx import helper

    graph = model.graph
    nodes, known = list(graph.node), {change.tensor for change in changes}
    for change in changes:
        for count, reader in enumerate(list(_find_readers(nodes, change, known))):
            name = f"{change.tensor}{_MARK}{count}"
            values = change.delta.reshape(change.shape)
            values = np.ascontiguousarray(values.T if reader.flipped else values)
            index = next(index for index, each in enumerate(nodes) if each is reader.total)
            nodes[index : index + 1] = _branch(reader, name)
            graph.input.append(helper.make_tensor_value_info(name, _FLOAT, values.shape))
            yield name, values
    del graph.node[:]
    graph.node.extend(nodes)


def _find_readers(nodes: "Sequence[onnx.NodeProto]", change: Change, known: Set[str]) -> Iterator[_Reader]:
    """Yield the nodes that apply a tensor, directly or through what only hands it on; copies change by themselves."""
    values = {change.tensor: (False, change.form)}
    for node in nodes:
        if node.op_type in _PASSING and node.input and node.input[0] in values and known.isdisjoint(node.output):
            flipped, form = values[node.input[0]]
            form = next((each.i for each in node.attribute if each.name == "to"), form)
            values[node.output[0]] = (flipped ^ (node.op_type == "Transpose"), form)
            continue
        for position in _LINEAR.get(node.op_type, ()):
            if position < len(node.input) and node.input[position] in values and _MARK not in node.name:
                reader = _read(nodes, node, position, *values[node.input[position]])
                if reader is not None:
                    yield reader


def _read(
    nodes: "Sequence[onnx.NodeProto]", node: "onnx.NodeProto", position: int, flipped: bool, form: int
) -> _Reader | None:
    from onnx import NodeProto, helper

    if node.op_type == _NBITS:
        return _Reader(node, helper.make_node("MatMul", [node.input[0], _MARK], []), True, form)
    if node.op_type == _TABLE:
        return _Reader(node, helper.make_node("Gather", [_MARK, node.input[1]], []), flipped, form)
    if node.op_type == _INTEGER:
        made_by = next((each for each in nodes if node.input[0] in each.output), None)
        total = _follow(nodes, node, ("Cast", "Mul"))
        if made_by is None or made_by.op_type != "DynamicQuantizeLinear" or total is None:
            return None
        return _Reader(total, helper.make_node("MatMul", [made_by.input[0], _MARK], []), flipped, form)
    beside = NodeProto()
    beside.CopyFrom(node)
    del beside.input[2:], beside.output[:]
    beside.input[position] = _MARK
    after = _follow(nodes, node, ("DequantizeLinear",)) if node.op_type == "Gather" else None
    return _Reader(after or node, beside, flipped, form)  # A table of codes is dequantised after the lookup.


def _follow(
    nodes: "Sequence[onnx.NodeProto]", node: "onnx.NodeProto", operators: Sequence[str]
) -> "onnx.NodeProto | None":
    """Return the last of a chain of operators that each read the one before."""
    for operator in operators:
        readers = [each for each in nodes if node.output[0] in each.input]
        if len(readers) != 1 or readers[0].op_type != operator:
            return None
        node = readers[0]
    return node


def _branch(reader: _Reader, name: str) -> "list[onnx.NodeProto]":
    """Return the node, what it makes of the change, and the sum of both under the name of the node's output."""
    from onnx import NodeProto, helper

    own, beside = NodeProto(), NodeProto()
    own.CopyFrom(reader.total)
    beside.CopyFrom(reader.beside)
    output = own.output[0]
    own.output[0] = f"{output}{name}#base"
    read = name if reader.form == _FLOAT else f"{name}#{reader.form}"
    cast = [] if read == name else [helper.make_node("Cast", [name], [read], read, to=reader.form)]
    beside.input[list(beside.input).index(_MARK)] = read
    beside.name = f"{own.name}{name}"
    beside.output.append(f"{output}{name}")
    total = helper.make_node("Add", [own.output[0], beside.output[0]], [output], f"{beside.name}#sum")
    return [own, *cast, beside, total]


def _open(path: Path, model: "onnx.ModelProto | None" = None) -> Any:
    """Return a session of a model file, or of a model whose data files stand beside that file."""
    try:
        import onnxruntime
    except ImportError as error:
        raise refuse("LF446", path, "no onnxruntime", "it installed: pip install loraformat[cpu]") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source: str | bytes = str(path)
    if model is not None:
        options.add_session_config_entry(_FOLDER_KEY, str(path.absolute().parent))
        source = model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors share no base class of theirs.
        raise refuse("LF446", path, _first_line(error), "a model that onnxruntime loads") from error


def _run_all(sessions: Sequence[Any], apart: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> list[Any]:
    """Return the outputs of base, merged model, and base with the changes; smaller ids where a table has fewer rows."""
    last: Exception = RuntimeError()
    for largest in _LARGEST_ID:
        feeds = make_inputs(sessions[0].get_inputs(), largest, sizes)
        try:
            return [session.run(None, feeds | (dict(apart) if session is sessions[2] else {})) for session in sessions]
        except Exception as error:  # As above.
            last = error
    raise refuse("LF446", "onnxruntime", _first_line(last), "models that run on random inputs") from last


def make_inputs(
    inputs: Sequence[Any], largest_id: int, sizes: Mapping[str, int] = _NO_SIZES
) -> dict[str, NDArray[Any]]:
    """Return random inputs for onnxruntime's description of them; symbolic sizes of one name are the same."""
    rng = np.random.default_rng(0)
    return {each.name: _make_input(rng, each, largest_id, sizes) for each in inputs}


def _make_input(rng: np.random.Generator, described: Any, largest_id: int, sizes: Mapping[str, int]) -> NDArray[Any]:
    shape = [size if isinstance(size, int) else sizes.get(size) or _bind(size) for size in described.shape]
    kind = described.type.removeprefix("tensor(").removesuffix(")")
    if kind in ("float", "double", "float16"):
        return rng.standard_normal(shape).astype({"float": "float32", "double": "float64"}.get(kind, kind))
    if kind == "bool" or "mask" in described.name:
        return np.ones(shape, kind)
    if "position" in described.name:
        return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape).astype(kind)
    return rng.integers(0, largest_id, shape).astype(kind)


def _bind(symbol: str | None) -> int:
    """Return a size for a symbolic dimension; `past_sequence_length + sequence_length` is a sum."""
    parts = (symbol or "").split("+")
    return sum(next((n for word, n in _SIZES.items() if word in part), _SIZE) for part in parts)


def _compare(name: str, base: NDArray[Any], merged: NDArray[Any], apart: NDArray[Any]) -> RunResult:
    wanted, found = (apart - base).ravel(), (merged - base).ravel()
    norm, square = float(np.linalg.norm(base)) or 1.0, float(wanted @ wanted)
    kept = float(found @ wanted) / square if square else 1.0
    effect, difference = float(np.sqrt(square)) / norm, float(np.linalg.norm(merged - apart)) / norm
    return RunResult(name, effect, kept, difference)


def _judge(result: RunResult) -> list[Problem]:
    """Return a problem for an output that is not the base's with the change, up to noise."""
    in_noise = result.difference <= _NOISE * max(result.effect, _NOISE)
    if in_noise or abs(result.kept - 1) <= 1 - RETAINED_WARN:
        return []
    found = f"{result.kept:.3f} of the change, off by {result.difference:.3g} of the output"
    return [Problem("LF445", result.output, found, "what the base gives with the change computed apart")]


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]
