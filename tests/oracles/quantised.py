"""Graphs that onnxruntime's own quantisers make, of a small float model and of the same with an adapter merged.

They are read back with onnx alone: DequantizeLinear's definition in float64.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from builders import write_peft, write_tensors

quantization = pytest.importorskip("onnxruntime.quantization")

Array = NDArray[Any]
SHAPES = {"fc1": (96, 72), "fc2": (40, 96), "fc3": (24, 40)}
RANK = 4
SCALE = 2.0


def make_float(folder: Path, weights: Mapping[str, Array], name: str) -> Path:
    """Write x -> fc1 -> Relu -> fc2 -> Relu -> fc3 (a Gemm with bias), named as torch's exporter does."""
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["a"], name="/fc1/MatMul"),
        helper.make_node("Relu", ["a"], ["b"], name="/act/Relu"),
        helper.make_node("MatMul", ["b", "onnx::MatMul_2"], ["c"], name="/fc2/MatMul"),
        helper.make_node("Relu", ["c"], ["d"], name="/act_1/Relu"),
        helper.make_node("Gemm", ["d", "fc3.weight", "fc3.bias"], ["y"], name="/fc3/Gemm", transB=1),
    ]
    arrays = {
        "onnx::MatMul_1": weights["fc1"].T,
        "onnx::MatMul_2": weights["fc2"].T,
        "fc3.weight": weights["fc3"],
        "fc3.bias": np.linspace(-1, 1, 24),
    }
    initializers = [numpy_helper.from_array(np.ascontiguousarray(a, np.float32), n) for n, a in arrays.items()]
    value = helper.make_tensor_value_info
    ends = [value("x", TensorProto.FLOAT, ["n", 72])], [value("y", TensorProto.FLOAT, ["n", 24])]
    graph = helper.make_graph(nodes, "g", *ends, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / name
    onnx.save(model, path)
    return path


class Case:
    """A float model with its checkpoint, an adapter of some share of its weights, and the same merged in float64."""

    def __init__(self, folder: Path, share: float = 0.1) -> None:
        rng = np.random.default_rng(11)
        self.folder = folder
        self.base = {n: rng.standard_normal(s) / np.sqrt(s[1]) for n, s in SHAPES.items()}
        factors, self.delta = {}, {}
        for name, (out, inner) in SHAPES.items():
            down, up = rng.standard_normal((RANK, inner)), rng.standard_normal((out, RANK))
            up *= share * np.linalg.norm(self.base[name]) / np.linalg.norm(SCALE * up @ down)
            factors[name] = (down.astype(np.float32), up.astype(np.float32))
            self.delta[name] = SCALE * factors[name][1].astype(np.float64) @ factors[name][0].astype(np.float64)
        self.factors = factors
        self.adapter = self.adapt("adapter", *SHAPES)
        self.merged = {n: self.base[n] + self.delta[n] for n in SHAPES}
        self.x = rng.standard_normal((32, 72)).astype(np.float32)
        self.checkpoint = write_tensors(
            folder / "model.safetensors", {f"{n}.weight": w.astype(np.float32) for n, w in self.base.items()}
        )
        self.float_base = self.make({}, "float.onnx")
        self.float_merged = self.make(self.merged, "float-merged.onnx")

    def adapt(self, name: str, *modules: str, **config: Any) -> Path:
        """Write the adapter, with some of its targets."""
        factors = {module: self.factors[module] for module in modules}
        return write_peft(self.folder / name, factors, r=RANK, lora_alpha=SCALE * RANK, **config)

    def make(self, weights: Mapping[str, Array], name: str) -> Path:
        """Write the float model with some other weights."""
        return make_float(self.folder, self.base | dict(weights), name)


class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        rng = np.random.default_rng(12)
        self.feeds: Iterator[Any] = iter([{"x": rng.standard_normal((16, 72)).astype(np.float32)} for _ in range(4)])

    def get_next(self) -> Any:
        return next(self.feeds, None)


def dynamic(**options: Any) -> Callable[[Path, Path], None]:
    return lambda source, target: quantization.quantize_dynamic(source, target, **options)


def static(**options: Any) -> Callable[[Path, Path], None]:
    return lambda source, target: quantization.quantize_static(source, target, Calibration(), **options)


def nbits(bits: int, **options: Any) -> Callable[[Path, Path], None]:
    def quantise(source: Path, target: Path) -> None:
        pytest.importorskip("onnx_ir")
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        made = MatMulNBitsQuantizer(onnx.load(source), bits=bits, **options)
        made.process()
        made.model.save_model_to_file(str(target))

    return quantise


INT8, UINT8 = quantization.QuantType.QInt8, quantization.QuantType.QUInt8
QDQ, QOPERATOR = quantization.QuantFormat.QDQ, quantization.QuantFormat.QOperator
FLOATS_BETWEEN = {
    "dynamic int8": dynamic(weight_type=INT8, reduce_range=True),
    "dynamic uint8": dynamic(weight_type=UINT8),
    "dynamic int8 per channel": dynamic(weight_type=INT8, per_channel=True, reduce_range=True),
    "MatMulNBits 8": nbits(8, block_size=32, is_symmetric=True),
    "MatMulNBits 8 with zero points": nbits(8, block_size=32, is_symmetric=False),
    "MatMulNBits 8 by 16": nbits(8, block_size=16, is_symmetric=True),
}
RANGES = {
    "QDQ": static(quant_format=QDQ, weight_type=INT8, reduce_range=True),
    "QDQ per channel": static(quant_format=QDQ, weight_type=INT8, per_channel=True, reduce_range=True),
    "QOperator": static(quant_format=QOPERATOR, weight_type=INT8, reduce_range=True),
}


def quantise(case: Case, path: str, source: Path) -> Path:
    target = case.folder / f"{path.replace(' ', '-')}-{source.name}"
    if not target.exists():
        (FLOATS_BETWEEN | RANGES)[path](source, target)
    return target


def compute(path: Path, x: Array) -> Array:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def decode(path: Path) -> dict[str, NDArray[np.float64]]:
    """Return each weight as `(out, in)` by the definitions of the operators."""
    graph = onnx.load(path).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = {}
    for node in graph.node:
        module = next((m for m in SHAPES if node.name.startswith(f"/{m}/")), "")
        names = [name for name in node.input if name in arrays and arrays[name].ndim >= 2]
        scaled = [n for n in node.input if n.endswith("_DequantizeLinear_Output") and n[:-24] + "_quantized" in arrays]
        name = names[0] if names else scaled[0][:-24] + "_quantized" if scaled else ""
        if not module or not name or node.op_type in ("Mul", "Add"):
            continue
        values = arrays[name].astype(np.float64)
        if node.op_type == "MatMulNBits":
            scales, blocks = arrays[node.input[1].replace("_Q8", "_scales")], arrays[name].shape[1]
            zeros = arrays.get(node.input[1].replace("_Q8", "_zero_points"), np.array(128)).astype(np.float64)
            zeros = zeros.reshape(-1, blocks, 1) if zeros.ndim else zeros
            whole = (values - zeros) * scales.astype(np.float64).reshape(-1, blocks, 1)
            values = whole.reshape(len(whole), -1)[:, : SHAPES[module][1]]
        else:
            root = name.removesuffix("_quantized")
            if root != name:
                shape = (-1, 1) if "Gemm" in node.op_type else (1, -1)
                scale, zero = (arrays[f"{root}_{part}"].reshape(shape) for part in ("scale", "zero_point"))
                values = (values - zero) * scale.astype(np.float64)
            values = values if values.shape == SHAPES[module] else values.T
        found[module] = values
    assert found.keys() == SHAPES.keys()
    return found
