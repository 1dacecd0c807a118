"""What onnxruntime computes from a merged ONNX model, beside its base with the change computed apart from it.

Apart means: beside each node that reads a changed weight (`branching.py`). The base's own weights stay as they are, and
no merged number is used.
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.bases import BaseModel, RunnableBase
from loraformat.dtypes import BY_NAME
from loraformat.engine.coded_work import CodedWork, list_recoded, list_tiles
from loraformat.engine.jobs import index_targets, open_floats
from loraformat.engine.tiles import TileBuffers, change_tile
from loraformat.engine.weight_work import WeightWork
from loraformat.errors import LoraformatError, refuse
from loraformat.limits import RETAINED_WARN
from loraformat.output_forms import Order, index_weights
from loraformat.problems import Problem
from loraformat.verification.branching import FLOAT, MARK, Change, add_branches

if TYPE_CHECKING:
    import onnx

_FOLDER_KEY: Final = "session.model_external_initializers_file_folder_path"
_EXACT_PRODUCTS: Final = "session.x64quantprecision"
"""Without it, products of int8 and uint8 saturate on processors that lack instructions for them, and the noise is that
of the processor."""
_SIZES: Final = {"past": 0, "batch": 2}
_SIZE: Final = 8
_TRIES: Final = ((64, _SIZE), (2, _SIZE), (64, 32), (64, 224), (64, 4096))
"""Bounds of random whole numbers, and sizes of dimensions: in turn, where a table, picture or sound is too small."""
_MAX_NUMBERS: Final = 1 << 26
"""Of one input; larger ones are not made."""
_NAMED_FORMS: Final = {"tensor(float)": "float32", "tensor(double)": "float64"}
_FORMS: Final = frozenset({"bool", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64))}) | {
    f"float{bits}" for bits in (16, 32, 64)
}
"""Number forms that an input may have, as numpy calls them."""
_SAY_SIZES: Final = "Say how large the dimensions of the inputs are (--size NAME=N), or leave out --run."
_NOISE: Final = 1e-3
_NO_SIZES: Final[Mapping[str, int]] = MappingProxyType({})


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


def list_changes(order: Order, base: BaseModel) -> list[Change]:
    """Return what an order adds to each weight, whole: as much memory as the touched weights take in float32."""
    weights, targets, buffers = index_weights(base), index_targets(order.adapters), TileBuffers()
    floats = open_floats(order.plan, order.checkpoint)
    tensors = {key: weight.tensor for key, weight in weights.items()}
    changes = []
    for weight in order.plan.weights:
        source = weights.get(weight.key)
        own = [targets[change.adapter][change.target] for change in weight.changes]
        if source is not None and weight.is_coded:
            work: WeightWork = CodedWork(weight, source, own, floats)
        else:
            work = WeightWork(weight, tensors.get(weight.key), own, tensors)
        delta, shape, dtype = np.concatenate(list(_list_tiles(work, buffers))), weight.shape, BY_NAME[weight.dtype]
        if source is not None and source.coding is not None:
            dtype = source.coding.companions["scales"].dtype
            delta = delta[:, : delta.shape[1] - source.coding.padding]
            if any(change.part is not None for change in weight.changes):  # Blocks of a row have shapes of their own.
                shape = delta.shape
        changes.append(Change(weight.name, shape, dtype.onnx or FLOAT, delta))
    return changes


def _list_tiles(work: WeightWork, buffers: TileBuffers) -> Iterator[NDArray[np.float32]]:
    """Yield the change of each tile; of few bits from float numbers, as it is once these have been rounded."""
    if isinstance(work, CodedWork) and work.references:
        yield from list_recoded(work, buffers)
        return
    for rows in list_tiles(work.weight):
        yield change_tile(work, buffers, rows)[2].astype(np.float32)


def compare_runs(
    base: RunnableBase, merged: Path, changes: Sequence[Change], sizes: Mapping[str, int] = _NO_SIZES
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
    floats = base.rewire(model.graph, {change.tensor for change in changes})
    feeds_apart = dict(add_branches(model, changes, floats))
    reached = {name.rpartition(MARK)[0] for name in feeds_apart}
    problems = [
        Problem("LF446", each.tensor, "nothing reads it that can be computed apart", "a reader in the main graph")
        for each in changes
        if each.tensor not in reached
    ]
    sessions = _open_all((base.path, None), (merged, None), (base.path, model))
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


def _open_all(*models: tuple[Path, "onnx.ModelProto | None"]) -> list[Any]:
    """Return sessions that all multiply alike: without saturation, where onnxruntime has kernels for that."""
    try:
        return [_open(path, model, _EXACT_PRODUCTS) for path, model in models]
    except LoraformatError:
        return [_open(path, model) for path, model in models]


def _open(path: Path, model: "onnx.ModelProto | None" = None, *entries: str) -> Any:
    """Return a session of a model file, or of a model whose data files stand beside that file.

    Args:
        path: the file.
        model: the model, if it is another than the file's.
        entries: of the session's configuration, which are to be 1.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise refuse("LF446", path, "no onnxruntime", "it installed: pip install loraformat[cpu]") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # What goes wrong is reported once, by us.
    for entry in entries:
        options.add_session_config_entry(entry, "1")
    source: str | bytes = str(path)
    if model is not None:
        options.add_session_config_entry(_FOLDER_KEY, str(path.absolute().parent))
        source = model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors share no base class of theirs.
        raise refuse("LF446", path, _first_line(error), "a model that onnxruntime loads") from error


def _run_all(sessions: Sequence[Any], apart: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> list[Any]:
    """Return the outputs of base, merged model, and base with the changes, on the first inputs that they run on."""
    errors: list[Exception] = []
    for largest, size in _TRIES:
        try:
            feeds = make_inputs(sessions[0].get_inputs(), largest, sizes, size)
            return [session.run(None, feeds | (dict(apart) if session is sessions[2] else {})) for session in sessions]
        except Exception as error:  # As above.
            errors.append(error)
    if isinstance(errors[0], LoraformatError):
        raise errors[0]
    mend = _say_sizes(sessions[0].get_inputs())
    raise refuse("LF446", "onnxruntime", _first_line(errors[0]), "models that run on random inputs", mend)


def _say_sizes(inputs: Sequence[Any]) -> str:
    names = dict.fromkeys(each for described in inputs for each in described.shape if isinstance(each, str))
    return _SAY_SIZES + (f" The dimensions are: {', '.join(names)}." if names else "")


def make_inputs(
    inputs: Sequence[Any], largest_id: int, sizes: Mapping[str, int] = _NO_SIZES, size: int = _SIZE
) -> dict[str, NDArray[Any]]:
    """Return random inputs for onnxruntime's description of them; symbolic sizes of one name are the same.

    What no name tells is of `size`; a first dimension, as of a batch, stays small. LF446 for what is no tensor of
    numbers or texts.
    """
    rng = np.random.default_rng(0)
    first = {each.shape[0] for each in inputs if each.shape}
    return {each.name: _make_input(rng, each, largest_id, _measure(each.shape, sizes, size, first)) for each in inputs}


def _measure(shape: Sequence[Any], sizes: Mapping[str, int], size: int, first: Set[Any]) -> list[int]:
    """Return a shape with all its sizes."""
    chosen = (_SIZE if axis == 0 or (each is not None and each in first) else size for axis, each in enumerate(shape))
    return [
        each if isinstance(each, int) else sizes.get(each) or _bind(each, own)
        for each, own in zip(shape, chosen, strict=True)
    ]


def _make_input(rng: "np.random.Generator", described: Any, largest_id: int, shape: Sequence[int]) -> NDArray[Any]:
    kind = _NAMED_FORMS.get(described.type) or described.type.removeprefix("tensor(").removesuffix(")")
    if math.prod(shape) > _MAX_NUMBERS:
        raise refuse("LF446", described.name, f"an input of {list(shape)}", "a smaller one", _SAY_SIZES)
    if kind == "string":
        return np.full(shape, "a", object)
    if kind not in _FORMS:
        raise refuse("LF446", described.name, f"an input of the type {described.type}", "a tensor of numbers or texts")
    if kind.startswith("float"):
        return rng.standard_normal(shape).astype(kind)
    if kind == "bool" or "mask" in described.name:
        return np.ones(shape, kind)
    if "position" in described.name:
        return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape).astype(kind)
    return np.asarray(rng.integers(0, largest_id, shape)).astype(kind)


def _bind(symbol: str | None, size: int) -> int:
    """Return a size for a symbolic dimension; `past_sequence_length + sequence_length` is a sum."""
    parts = (symbol or "").split("+")
    return sum(next((n for word, n in _SIZES.items() if word in part), size) for part in parts)


def _compare(name: str, base: NDArray[Any], merged: NDArray[Any], apart: NDArray[Any]) -> RunResult:
    sound = np.isfinite(base) & np.isfinite(apart)
    if sound.any():  # The model gave infinities before: these say nothing of the merge.
        base, merged, apart = base[sound], merged[sound], apart[sound]
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
