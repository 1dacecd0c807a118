"""Tables of embeddings that onnxruntime's static quantiser leaves in codes: operators on codes read what is looked up.

The merged model is compared with one that the quantiser made of the merged floats, from the same calibration.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import loraformat
from builders import write_peft, write_tensors

pytestmark = pytest.mark.oracle
quantization = pytest.importorskip("onnxruntime.quantization")

Array = NDArray[Any]
SHAPES = {"emb": (40, 16), "pos": (12, 16), "lin": (24, 16)}
IDS = np.random.default_rng(2).integers(0, 12, (6, 1, 7))
INT8, UINT8 = quantization.QuantType.QInt8, quantization.QuantType.QUInt8
FORMS = {
    "uint8": {"activation_type": UINT8, "weight_type": INT8, "reduce_range": True},
    "int8 per channel": {"activation_type": INT8, "weight_type": INT8, "per_channel": True, "reduce_range": True},
}


def _product(rows: str) -> list[onnx.NodeProto]:
    return [helper.make_node("MatMul", [rows, "lin.weight_t"], ["y"], "/lin/MatMul")]


def _lookup(module: str) -> onnx.NodeProto:
    return helper.make_node("Gather", [f"{module}.weight", "ids"], [module], f"/{module}/Gather")


GRAPHS = {
    "QLinearMatMul": [_lookup("emb"), *_product("emb")],
    "QLinearAdd": [_lookup("emb"), _lookup("pos"), helper.make_node("Add", ["emb", "pos"], ["sum"]), *_product("sum")],
    "DequantizeLinear": [_lookup("emb"), helper.make_node("Erf", ["emb"], ["erf"]), *_product("erf")],
    "several": [
        _lookup("emb"),
        helper.make_node("Transpose", ["emb"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("Transpose", ["turned"], ["back"], perm=[1, 0, 2]),
        helper.make_node("Erf", ["back"], ["erf"]),
        helper.make_node("Add", ["back", "erf"], ["sum"]),
        *_product("sum"),
    ],
}


def _make(path: Path, graph: str, weights: Mapping[str, Array]) -> Path:
    arrays = {"emb.weight": weights["emb"], "pos.weight": weights["pos"], "lin.weight_t": weights["lin"].T}
    read = {name for node in GRAPHS[graph] for name in node.input}
    held = [numpy_helper.from_array(np.ascontiguousarray(a, np.float32), n) for n, a in arrays.items() if n in read]
    value = helper.make_tensor_value_info
    ends = [value("ids", TensorProto.INT64, [1, 7])], [value("y", TensorProto.FLOAT, [1, 7, 24])]
    made = helper.make_graph(GRAPHS[graph], "g", *ends, held)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.feeds = iter([{"ids": each} for each in IDS])

    def get_next(self) -> Any:
        return next(self.feeds, None)


def _quantise(source: Path, form: str) -> Path:
    target = source.with_name(f"q-{source.name}")
    quantization.quantize_static(
        source, target, Calibration(), quant_format=quantization.QuantFormat.QOperator, **FORMS[form]
    )
    return target


def _adapt(folder: Path, modules: tuple[str, ...]) -> tuple[Path, dict[str, Array]]:
    """Return an adapter, and what it adds to each weight."""
    rng, arrays, delta = np.random.default_rng(3), {}, {}
    for module in modules:
        rows, columns = SHAPES[module]
        up, down = rng.standard_normal((rows, 2)) * 0.2, rng.standard_normal((2, columns)) * 0.5
        up, down = up.astype(np.float32), down.astype(np.float32)
        table = module != "lin"
        keys = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
        factors = (up.T, down.T) if table else (down, up)
        arrays |= {
            f"base_model.model.{module}.{k}": np.ascontiguousarray(f) for k, f in zip(keys, factors, strict=True)
        }
        delta[module] = up.astype(np.float64) @ down
    write_peft(folder, {}, r=2, alpha=2)
    write_tensors(folder / "adapter_model.safetensors", arrays)
    return folder, delta


def _decode(path: Path, module: str) -> Array:
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    name = "lin.weight_t" if module == "lin" else f"{module}.weight"
    codes, scale, zero = (held[f"{name}_{part}"] for part in ("quantized", "scale", "zero_point"))
    values = (codes.astype(np.float64) - zero) * scale.astype(np.float64)
    return values.T if module == "lin" else values


def _compute(path: Path) -> Array:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([np.asarray(session.run(None, {"ids": each})[0], np.float64) for each in IDS])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_table_in_codes_is_merged_as_if_quantised_afterwards(tmp_path: Path, graph: str, form: str) -> None:
    rng = np.random.default_rng(1)
    weights = {module: rng.standard_normal(shape) * 0.5 for module, shape in SHAPES.items()}
    modules = tuple(m for m in SHAPES if m != "pos" or graph == "QLinearAdd")
    base = _quantise(_make(tmp_path / "base.onnx", graph, weights), form)
    operators = {node.op_type for node in onnx.load(base).graph.node}
    assert "emb.weight_quantized" in {t.name for t in onnx.load(base).graph.initializer}
    assert graph in operators or operators >= {"DequantizeLinear", "QLinearAdd"}
    adapter, delta = _adapt(tmp_path / "adapter", modules)
    merged = tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [adapter], merged, accept_ranges=True)
    assert all(weight.retained > 0.97 for weight in receipt.weights)
    whole = _make(tmp_path / "whole.onnx", graph, weights | {m: weights[m] + d for m, d in delta.items()})
    afresh = _quantise(whole, form)
    for module, change in delta.items():
        wanted = _decode(base, module) + change
        error = np.linalg.norm(_decode(merged, module) - wanted)
        usual = np.linalg.norm(_decode(afresh, module) - weights[module] - change)
        assert error <= 1.25 * usual, (module, error, usual)
    found = loraformat.verify(merged, base, [adapter], run=True)
    (run,) = found.runs
    assert found.holds
    assert abs(run.kept - 1) < 0.1


def test_ranges_are_measured_anew_beside_tables_in_codes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weights = {module: rng.standard_normal(shape) * 0.5 for module, shape in SHAPES.items()}
    base = _quantise(_make(tmp_path / "base.onnx", "QLinearAdd", weights), "uint8")
    adapter, delta = _adapt(tmp_path / "adapter", tuple(SHAPES))
    np.savez(tmp_path / "data.npz", ids=IDS)
    accepted, calibrated = tmp_path / "accepted.onnx", tmp_path / "calibrated.onnx"
    loraformat.merge(base, [adapter], accepted, accept_ranges=True)
    loraformat.merge(base, [adapter], calibrated, calibration=tmp_path / "data.npz")
    whole = _make(tmp_path / "whole.onnx", "QLinearAdd", weights | {m: weights[m] + d for m, d in delta.items()})
    wanted, afresh = _compute(whole), _compute(_quantise(whole, "uint8"))
    error = np.linalg.norm(_compute(calibrated) - wanted)
    assert error <= 1.5 * np.linalg.norm(afresh - wanted)
    assert error <= np.linalg.norm(_compute(accepted) - wanted)
    assert loraformat.verify(calibrated, base, [adapter]).holds
