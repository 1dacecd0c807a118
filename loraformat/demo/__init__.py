"""A demonstration that checks itself: builds a small ONNX model and an adapter, merges, and runs the result.

The merged model is compared with the same graph with explicit branches beside each weight, both run by onnxruntime.
Needs onnxruntime, which is an extra.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from loraformat.demo.model import RANK, VOCABULARY, Floats, build_model, make_factors, make_weights, write_adapter
from loraformat.errors import refuse

_BATCH: Final = 4
_TOKENS: Final = 32
_RUNS: Final = 40
_WARM_UP: Final = 5
TOLERANCE_SHARE: Final = 1e-4
"""Of the largest output. float32 sums of some hundred terms through some twenty products differ by 1e-6 to 1e-5 when
their order changes; a wrong scale or one forgotten target shows from 1e-2 on."""
EFFECT_SHARE: Final = 1e-2
"""What the adapter must at least change, as a share of the largest output: else the comparison would prove nothing."""


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What the demo found.

    Attributes:
        base_bytes: size of the base model's file.
        rank: the adapter's rank.
        targets: modules that the adapter changes.
        tensors: initializers of the base.
        tensor_bytes: their bytes.
        rewritten: initializers whose bytes the merge changed.
        differing_bytes: bytes of initializers that the merge changed.
        nodes: nodes of the base's graph.
        merged_nodes: nodes of the merged graph.
        nodes_identical: every node is the same, byte for byte.
        difference: largest difference of an output between the merged model and the reference.
        effect: largest difference of an output between the base and the reference.
        output_scale: largest output of the reference.
        runs: timed runs of each model.
        base_ms: median latency of the base, in milliseconds.
        merged_ms: that of the merged model.
        base_again_ms: that of a second session of the base: what differs from `base_ms` is noise.
        versions: of the libraries that took part.
    """

    base_bytes: int
    rank: int
    targets: int
    tensors: int
    tensor_bytes: int
    rewritten: int
    differing_bytes: int
    nodes: int
    merged_nodes: int
    nodes_identical: bool
    difference: float
    effect: float
    output_scale: float
    runs: int
    base_ms: float
    merged_ms: float
    base_again_ms: float
    versions: Mapping[str, str]

    @property
    def tolerance(self) -> float:
        """The largest difference that rounding may explain."""
        return TOLERANCE_SHARE * self.output_scale

    @property
    def failures(self) -> tuple[str, ...]:
        """What speaks against the merge, in words; latency does not, it belongs to the machine."""
        checks = {
            "the merged model differs from the reference by more than rounding": self.difference <= self.tolerance,
            "the adapter's effect is too small to prove anything": self.effect >= EFFECT_SHARE * self.output_scale,
            "the merge changed the graph": self.nodes_identical and self.nodes == self.merged_nodes,
            "the number of changed weights is not that of the targets": self.rewritten == self.targets,
        }
        return tuple(failure for failure, holds in checks.items() if not holds)

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the merge."""
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        verdict = {"tolerance": self.tolerance, "passed": self.passed, "failures": list(self.failures)}
        return asdict(self) | verdict


def run_demo(folder: Path) -> DemoReport:
    """Write base, adapter, reference and merged model into `folder`, a new or an empty one, and compare them.

    Raises:
        LoraformatError: the folder cannot be used, or the merge failed.
        ImportError: onnxruntime is not installed.
    """
    from loraformat.merging import merge

    _prepare(folder)
    weights, factors = make_weights(), make_factors()
    base, reference = folder / "base.onnx", folder / "reference.onnx"
    onnx.save_model(build_model(weights), base)
    onnx.save_model(build_model(weights, factors), reference)
    write_adapter(folder / "adapter", factors)
    receipt = merge(base, [folder / "adapter"], folder / "merged.onnx")
    merged = Path(receipt.output)
    return DemoReport(
        base_bytes=base.stat().st_size,
        rank=RANK,
        targets=len(factors),
        versions=_versions(),
        **_compare_files(base, merged),
        **_compare_runs(base, merged, reference),
    )


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = next(folder.iterdir(), None)
    except OSError as error:
        raise refuse("LF605", folder, str(error)) from error
    if taken is not None:
        raise refuse("LF601", folder, f"a folder with files, such as {taken.name}", "a new or an empty folder")


def _compare_files(base: Path, merged: Path) -> dict[str, Any]:
    """Return what the merge changed in the file."""
    before, after = onnx.load_model(base).graph, onnx.load_model(merged).graph
    later = {tensor.name: tensor for tensor in after.initializer}
    changed = {
        tensor.name: int(np.count_nonzero(_bytes_of(tensor) != _bytes_of(later[tensor.name])))
        for tensor in before.initializer
    }
    return {
        "tensors": len(before.initializer),
        "tensor_bytes": sum(_bytes_of(tensor).size for tensor in before.initializer),
        "rewritten": sum(count > 0 for count in changed.values()),
        "differing_bytes": sum(changed.values()),
        "nodes": len(before.node),
        "merged_nodes": len(after.node),
        "nodes_identical": [n.SerializeToString() for n in before.node] == [n.SerializeToString() for n in after.node],
    }


def _bytes_of(tensor: onnx.TensorProto) -> NDArray[np.uint8]:
    return np.frombuffer(numpy_helper.to_array(tensor).tobytes(), np.uint8)


def _compare_runs(base: Path, merged: Path, reference: Path) -> dict[str, Any]:
    """Return differences and latencies; the models take turns, so that a busy machine is busy for all of them."""
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (_BATCH, _TOKENS))
    models = {"base_ms": base, "merged_ms": merged, "base_again_ms": base}
    runs = {name: _session(path, tokens) for name, path in models.items()}
    expected = _session(reference, tokens)()
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(_WARM_UP + _RUNS):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            runs[name]()
            if turn >= _WARM_UP:
                times[name].append(1000 * (time.perf_counter() - start))
    return {
        "difference": float(np.abs(runs["merged_ms"]() - expected).max()),
        "effect": float(np.abs(runs["base_ms"]() - expected).max()),
        "output_scale": float(np.abs(expected).max()),
        "runs": _RUNS,
    } | {name: median(taken) for name, taken in times.items()}


def _session(path: Path, tokens: NDArray[np.int64]) -> Callable[[], Floats]:
    """Return a function that runs the model once, on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: np.asarray(session.run(None, {"input_ids": tokens})[0], np.float32)


def _versions() -> dict[str, str]:
    import onnxruntime

    return {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
