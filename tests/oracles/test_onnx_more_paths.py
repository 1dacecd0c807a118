"""What else is done to exported models on their way: each merged, and compared with PEFT's unmerged model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

pytestmark = pytest.mark.oracle
for package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime", "sympy"):
    pytest.importorskip(package)

import onnxruntime  # noqa: E402
import zoo  # noqa: E402
from lab import Lab, difference  # noqa: E402

import loraformat  # noqa: E402

Step = Callable[[Path, Path], Any]


def blocked_float16(source: Path, path: Path, **more: Any) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    blocked = ["MatMul", "Softmax", "LayerNormalization"]
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True, op_block_list=blocked, **more), path)


def preprocess(source: Path, path: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source), str(path), auto_merge=True)


def compose(source: Path, path: Path) -> None:
    """Put a prefix before all names, and give inputs and outputs theirs back."""
    model = onnx.compose.add_prefix(onnx.load(source), "first/")
    own = {entry.name: entry.name.removeprefix("first/") for entry in (*model.graph.input, *model.graph.output)}
    for entry in (*model.graph.input, *model.graph.output):
        entry.name = own[entry.name]
    for node in model.graph.node:
        node.input[:] = [own.get(name, name) for name in node.input]
        node.output[:] = [own.get(name, name) for name in node.output]
    onnx.save(model, path)


def save_optimised(source: Path, path: Path) -> None:
    """Have onnxruntime write external data, and kernels' own forms of weights beside them."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", "weights.bin"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "512"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def share_equal(source: Path, path: Path) -> None:
    import onnx_ir
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateHashedInitializersPass

    model = onnx_ir.load(str(source))
    for change in (DeduplicateHashedInitializersPass(), CommonSubexpressionEliminationPass()):
        change(model)
    onnx_ir.save(model, str(path), external_data="weights.data", size_threshold_bytes=100)


def save_some_outside(source: Path, path: Path) -> None:
    apart: dict[str, Any] = {"save_as_external_data": True, "convert_attribute": True, "size_threshold": 3000}
    onnx.save(onnx.load(source), path, location="weights.bin", **apart)


def raise_opset(source: Path, path: Path) -> None:
    onnx.save(onnx.version_converter.convert_version(onnx.load(source), 23), path)


def take_out(source: Path, path: Path) -> None:
    inputs = [entry.name for entry in onnx.load(source).graph.input]
    onnx.utils.extract_model(str(source), str(path), inputs, [onnx.load(source).graph.output[0].name])


PATHS: Mapping[str, tuple[Step, float]] = {
    "float16, some operators kept": (blocked_float16, 5e-3),
    "float16, their weights too": (lambda *places: blocked_float16(*places, force_fp16_initializers=True), 5e-3),
    "quant_pre_process": (preprocess, 1e-4),
    "prefix of onnx.compose": (compose, 1e-4),
    "ORT extended, external and prepacked": (save_optimised, 1e-4),
    "onnx-ir, equal tensors and nodes once": (share_equal, 1e-4),
    "external data from 3000 bytes on": (save_some_outside, 1e-4),
    "version converter, opset 23": (raise_opset, 1e-4),
    "onnx.utils.extract_model": (take_out, 1e-4),
}


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
@pytest.mark.parametrize("name", PATHS)
def test_merged_by_names_alone(lab: Lab, tmp_path: Path, name: str, exporter: zoo.Exporter) -> None:
    trained, (change, allowed) = lab.trained("bert"), PATHS[name]
    base, merged = tmp_path / "in" / "base.onnx", tmp_path / "merged.onnx"
    base.parent.mkdir()
    with zoo.quiet():
        change(lab.exported("bert", exporter), base)
    loraformat.merge(base, [trained.folder], merged)
    assert trained.effect > 100 * allowed
    assert difference(zoo.run_onnx(merged, trained.feeds, trained.specimen.outputs), trained.unmerged) <= allowed
    assert loraformat.verify(merged, base, [trained.folder]).holds
