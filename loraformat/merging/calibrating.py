"""Ranges of a merged model's activations, measured by onnxruntime's own calibrator on data of the user's.

The model is merged once beside its place, its activations are left in floats, and the calibrator runs it on every
sample. What it finds becomes part of the plan; the model is then merged with the scales that follow.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.apply import Work, apply_order
from loraformat.bases import BaseModel, CalibratedBase, MeasurableGraph
from loraformat.engine import Effort
from loraformat.errors import error_for, refuse
from loraformat.loading import open_base
from loraformat.output_forms import Order
from loraformat.plan import Plan
from loraformat.problems import Problem
from loraformat.viewing import choose_graphs

MINMAX: Final = "minmax"
METHODS: Final[Mapping[str, str]] = {MINMAX: "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
"""What onnxruntime calls its calibrators."""
_NO_DISTRIBUTION: Final = "onnxruntime's Distribution is for 8-bit floats: it gives mean and deviation, and no range."
_TOLERANCE: Final = 1e-3
_MEASURED: Final = "Identity"
_INLINE_BYTES: Final = 1 << 30
"""Larger models are handed to the runtime with their weights apart: one protobuf message ends at 2 GiB."""
Ranges = Mapping[str, tuple[float, float]]


def measure_merged(base: BaseModel, order: Order, data: Path, effort: Effort, method: str = MINMAX) -> Ranges:
    """Return the ranges that a merged model's activations have, by the scales that they are known by.

    Args:
        base: the opened base.
        order: the merge, whose plan accepts the base's ranges; nothing stays where its output is to go.
        data: the calibration data.
        effort: how much of the machine to take.
        method: one of `METHODS`.

    Raises:
        LoraformatError: LF628 data that do not fit, or no known method, LF627 ranges that cannot be measured, what
            merging raises.
    """
    base = choose_graphs(base, order.plan.graphs)
    if not isinstance(base, CalibratedBase) or not base.check_ranges({}):
        raise refuse("LF628", data, "activations with no measured ranges", "a graph that has some; no --calibration")
    listed = base.check_ranges(None)
    problems = [problem for problem in listed if problem.severity == "error"]
    if problems:
        raise error_for(problems)
    apply_order(base, order, Work(effort, min_retained=0, warn_retained=0))
    return measure_ranges(open_base(order.plan.output), order.plan, data, method)


def make_room(output: Path) -> "TemporaryDirectory[str]":
    """Return a folder on the disk of an output, which goes when it is closed."""
    folder = next(each for each in output.absolute().parents if each.is_dir())
    return TemporaryDirectory(prefix=".loraformat-", dir=folder)


def describe_data(data: Path) -> str:
    """Return name and digest of the calibration data, for the receipt; of a folder, that of its files' digests."""
    if data.is_dir():
        inside = sorted(path for path in data.rglob("*.npz") if path.is_file())
        told = "".join(f"{path.relative_to(data).as_posix()} {describe_data(path)}\n" for path in inside)
        return f"{data.name} {hashlib.sha256(told.encode()).hexdigest()}"
    with data.open("rb") as stream:
        return f"{data.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}"


def check_measured(merged: BaseModel, plan: Plan, data: Path, method: str = MINMAX) -> Iterator[Problem]:
    """Yield the ranges of a merged model that its data give otherwise than its receipt has them."""
    for scale, (low, high) in measure_ranges(merged, plan, data, method).items():
        first, last = plan.ranges.get(scale, (math.nan, math.nan))
        slack = _TOLERANCE * (high - low)
        if not (abs(first - low) <= slack and abs(last - high) <= slack):
            where = f"{merged.path}: {scale}"
            yield Problem("LF629", where, f"a range from {first:.6g} to {last:.6g}", f"{low:.6g} to {high:.6g}")


def measure_ranges(merged: BaseModel, plan: Plan, data: Path, method: str = MINMAX) -> Ranges:
    """Return the ranges of a model's activations, by the scales that they are known by.

    Args:
        merged: the opened model; as much memory is needed as a graph of it has weights.
        plan: what it was merged by.
        data: an `.npz` with an array for each input of the graph, samples along its first axis; for several graphs a
            folder of such, each called as its graph is.
        method: one of `METHODS`.

    Raises:
        LoraformatError: as `measure_merged`.
    """
    merged = choose_graphs(merged, plan.graphs)
    if not isinstance(merged, CalibratedBase):
        raise refuse("LF627", merged.path, f"a base of the format {merged.format!r}", "an ONNX model")
    if method not in METHODS:
        raise refuse("LF628", "--calibration-method", method, f"one of {', '.join(METHODS)}", _NO_DISTRIBUTION)
    return {
        f"{mark}{scale}": ends
        for mark, graph in merged.list_measurable().items()
        for scale, ends in _measure_graph(graph, _find_data(data, mark), method).items()
    }


def _find_data(data: Path, mark: str) -> Path:
    """Return the samples of one graph."""
    if not mark:
        return data
    own = data / PurePosixPath(mark.removesuffix(":")).with_suffix(".npz")
    if not own.is_file():
        raise refuse("LF628", data, f"no {own.relative_to(data)}", "a folder with an .npz for each graph with ranges")
    return own


def _measure_graph(merged: MeasurableGraph, data: Path, method: str) -> Ranges:
    import onnx

    model = onnx.load(str(merged.path))
    values = merged.float_activations(model.graph)
    samples = _read_samples(data, {each.name for each in model.graph.input} - _names(model.graph.initializer))
    with make_room(merged.path) as room:
        found = _run_calibrator(model, Path(room), samples, merged, METHODS[method])
    ranges: dict[str, tuple[float, float]] = {}
    for value in values:
        low, high = (float(np.asarray(each).min()) for each in found[value.name].range_value)
        first, last = ranges.get(value.scale, (low, high))
        ranges[value.scale] = (min(first, low), max(last, high))
    if not all(math.isfinite(end) for pair in ranges.values() for end in pair):
        raise refuse("LF628", data, "activations that are not finite", "samples that the model can compute")
    return ranges


def _names(tensors: Any) -> set[str]:
    return {each.name for each in tensors}


def _run_calibrator(model: Any, room: Path, samples: "Samples", merged: MeasurableGraph, method: str) -> Any:
    try:
        import onnx
        from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator
    except ImportError as error:
        raise refuse("LF446", merged.path, "no onnxruntime", "it installed: pip install loraformat[cpu]") from error
    apart = sum(file.size_bytes for file in merged.files) > _INLINE_BYTES
    onnx.save(model, str(room / "float.onnx"), save_as_external_data=apart)
    try:
        calibrator = create_calibrator(
            room / "float.onnx",
            [_MEASURED],
            str(room / "measured.onnx"),
            CalibrationMethod[method],
            use_external_data_format=apart,
        )
        with redirect_stdout(StringIO()):  # Some tell how many bins they have.
            calibrator.collect_data(samples)
            return calibrator.compute_data()
    except Exception as error:  # onnxruntime's own errors share no base class of theirs.
        found = str(error).split("\n", 1)[0][:300]
        raise refuse("LF628", merged.path, found, "samples that onnxruntime can run the model on") from error


class Samples:
    """Calibration data as onnxruntime's calibrators read them.

    Args:
        arrays: by input, samples along the first axis.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = arrays
        self._count = len(next(iter(arrays.values())))
        self._next = 0

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the next sample by inputs, None after the last."""
        if self._next == self._count:
            return None
        self._next += 1
        return {name: array[self._next - 1] for name, array in self._arrays.items()}


def _read_samples(data: Path, inputs: set[str]) -> Samples:
    """Return the samples of an `.npz`, whose arrays are those of a graph's inputs."""
    from loraformat.containers.npz import CONTAINER

    opened = CONTAINER.open(data)
    if opened.tensors.keys() != inputs:
        found = f"arrays named {', '.join(sorted(opened.tensors)) or 'nothing'}"
        raise refuse("LF628", data, found, f"those of the model's inputs: {', '.join(sorted(inputs))}")
    arrays = {name: tensor.read() for name, tensor in opened.tensors.items()}
    counts = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    if len(counts) != 1 or not counts.pop():
        raise refuse("LF628", data, "arrays of different numbers of samples, or none", "samples along the first axis")
    return Samples(arrays)
