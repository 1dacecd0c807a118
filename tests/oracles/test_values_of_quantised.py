"""Weights of graphs that onnxruntime's quantisers made, all names dropped: found by the numbers of the checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import loraformat
from builders import write_peft, write_tensors

pytestmark = pytest.mark.oracle
quantization = pytest.importorskip("onnxruntime.quantization")

OUT, IN, RANK = 40, 72, 4
MODULES = ("a", "b", "c")


def dynamic(**options: Any) -> Callable[[Path, Path], None]:
    return lambda source, target: quantization.quantize_dynamic(source, target, **options)


def nbits(bits: int, **options: Any) -> Callable[[Path, Path], None]:
    def quantise(source: Path, target: Path) -> None:
        pytest.importorskip("onnx_ir")
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        made = MatMulNBitsQuantizer(onnx.load(source), bits=bits, **options)
        made.process()
        made.model.save_model_to_file(str(target))

    return quantise


def static(source: Path, target: Path) -> None:
    feeds = [{"x": np.random.default_rng(5).standard_normal((16, IN)).astype(np.float32)}]

    class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return feeds.pop() if feeds else None

    quantization.quantize_static(source, target, Calibration(), per_channel=True)


INT8, UINT8 = quantization.QuantType.QInt8, quantization.QuantType.QUInt8
QUANTISERS = {
    "dynamic int8": dynamic(weight_type=INT8),
    "dynamic uint8, 7 bits": dynamic(weight_type=UINT8, reduce_range=True),
    "dynamic int8 per channel": dynamic(weight_type=INT8, per_channel=True),
    "QDQ per channel": static,
    "MatMulNBits 8": nbits(8, block_size=32, is_symmetric=True),
    "MatMulNBits 8 with zero points": nbits(8, block_size=16, is_symmetric=False),
    "MatMulNBits 4": nbits(4, block_size=32, is_symmetric=True),
    "MatMulNBits 4 with zero points": nbits(4, block_size=32, is_symmetric=False),
}


def write_float(path: Path, weights: dict[str, Any]) -> Path:
    """Write three matrices of one shape on one input, in the order c, a, b."""
    names = sorted(weights, key=lambda name: (name != "c", name))
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"], name=f"n{i}") for i, _ in enumerate(names)]
    stored = [numpy_helper.from_array(np.ascontiguousarray(weights[n].T), f"w{i}") for i, n in enumerate(names)]
    value = helper.make_tensor_value_info
    outputs = [value(f"y{i}", TensorProto.FLOAT, ["n", OUT]) for i, _ in enumerate(names)]
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.FLOAT, ["n", IN])], outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_every_weight_is_found_and_none_of_another_checkpoint(tmp_path: Path, quantiser: str) -> None:
    rng = np.random.default_rng(9)
    weights = {name: rng.standard_normal((OUT, IN)).astype(np.float32) for name in MODULES}
    base = tmp_path / "base.onnx"
    QUANTISERS[quantiser](write_float(tmp_path / "float.onnx", weights), base)
    factors = {n: (rng.standard_normal((RANK, IN)), rng.standard_normal((OUT, RANK))) for n in MODULES}
    adapter = write_peft(
        tmp_path / "adapter", {n: (a.astype(np.float32), b.astype(np.float32)) for n, (a, b) in factors.items()}
    )
    checkpoint = write_tensors(tmp_path / "model.safetensors", {f"{n}.weight": w for n, w in weights.items()})
    found = loraformat.resolve_targets(base, adapter, base_checkpoint=checkpoint)
    assert not [problem for problem in found.problems if problem.severity == "error"]
    stems = {target.target: target.weight[:2] for target in found.targets}
    assert stems == {"c": "w0", "a": "w1", "b": "w2"}
    assert {target.verified for target in found.targets} == {("values",)}
    near = {f"{n}.weight": w + 0.25 * rng.standard_normal(w.shape).astype(np.float32) for n, w in weights.items()}
    other = write_tensors(tmp_path / "other.safetensors", near)
    found = loraformat.resolve_targets(base, adapter, base_checkpoint=other)
    assert not found.targets
    assert {problem.code for problem in found.problems if problem.severity == "error"} == {"LF401"}
