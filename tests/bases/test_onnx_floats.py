"""Floats in the place of codes: what becomes of each operator, what is dropped, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import loraformat
from builders import write_peft, write_tensors
from graphs import Array, Net, run, write_model
from loraformat.engine import float_work

MODULE = "model.layers.1.fc"
NAME = "/model/layers.1/fc/MatMul"
OUT, IN = 24, 32
MICROSOFT = {"domain": "com.microsoft"}


def values(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


BIAS = values(1, OUT)
SCALES = np.random.default_rng(2).uniform(0.01, 0.03, OUT).astype(np.float32)
CODES = np.random.default_rng(3).integers(-127, 128, (IN, OUT)).astype(np.int8)
WEIGHT = CODES * SCALES
"""`(in, out)`."""


def dynamic(net: Net, name: str = "x") -> list[str]:
    if not any(node.op_type == "DynamicQuantizeLinear" for node in net.nodes):
        net.nodes.append(helper.make_node("DynamicQuantizeLinear", [net.feed(name)], ["xq", "xs", "xz"], "quantise"))
    return ["xq", "xs", "xz"]


def dynamic_matmul(net: Net) -> None:
    inputs = [net.feed("x"), net.weight("w", CODES), net.weight("s", SCALES), "", net.weight("b", BIAS)]
    net.op("DynamicQuantizeMatMul", inputs, net.result("y"), NAME, **MICROSOFT)


def to_float(net: Net) -> None:
    q, step, zero = dynamic(net)
    inputs = [q, net.weight("w", CODES), step, net.weight("s", SCALES), zero, "", net.weight("b", BIAS)]
    net.op("MatMulIntegerToFloat", inputs, net.result("y"), NAME, **MICROSOFT)


def nbits(net: Net, bits: int = 8) -> None:
    blocks = (CODES.T.astype(np.int16) + 128).astype(np.uint8).reshape(OUT, IN // 16, 16)
    scales = np.repeat(SCALES[:, None], IN // 16, axis=1)
    inputs = [net.feed("x"), net.weight("w_Q8", blocks), net.weight("s", scales), "", "", net.weight("b", BIAS)]
    net.op("MatMulNBits", inputs, net.result("y"), NAME, bits=bits, K=IN, N=OUT, block_size=16, **MICROSOFT)


def integers(net: Net) -> None:
    q, step, zero = dynamic(net)
    net.op("MatMulInteger", [q, net.weight("w_quantized", CODES), zero], "whole", f"{NAME}_quant")
    net.op("Mul", [step, net.weight("s", SCALES)], "both", "scales_mul")
    net.op("Add", [net.op("Mul", [net.op("Cast", ["whole"], "wide", to=1), "both"], "z"), net.weight("b", BIAS)], "y")
    net.result("y")


def dequantised(net: Net) -> None:
    net.op("DequantizeLinear", [net.weight("w", CODES), net.weight("s", SCALES)], "wide", axis=1)
    net.op("Add", [net.op("MatMul", [net.feed("x"), "wide"], "z", NAME), net.weight("b", BIAS)], net.result("y"))


OPERATORS: dict[str, Callable[[Net], None]] = {
    each.__name__: each for each in (dynamic_matmul, to_float, nbits, integers, dequantised)
}


def merge(folder: Path, model: onnx.ModelProto, **options: Any) -> Path:
    base, pair = write_model(folder / "base.onnx", model), (values(4, 2, IN), values(5, OUT, 2))
    adapter = write_peft(folder / "adapter", {MODULE: pair}, alpha=2)
    loraformat.merge(base, [adapter], folder / "merged.onnx", on_quantized="dequantize", **options)
    assert loraformat.verify(folder / "merged.onnx", base, [adapter]).holds
    return folder / "merged.onnx"


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_on_codes_becomes_one_on_floats(tmp_path: Path, name: str) -> None:
    net = Net()
    OPERATORS[name](net)
    merged = merge(tmp_path, net.model(check=False))
    x = values(6, 3, IN)
    wanted = x @ (WEIGHT + (values(5, OUT, 2) @ values(4, 2, IN)).T) + BIAS
    np.testing.assert_allclose(run(merged, {"x": x})[0], wanted, atol=1e-4)
    graph = onnx.load(merged).graph
    assert {node.op_type for node in graph.node} == {"MatMul", "Add"}
    assert next(node.name for node in graph.node if node.op_type == "MatMul").startswith(NAME)
    assert len(graph.initializer) == 2


def test_what_another_weight_needs_stays(tmp_path: Path) -> None:
    """One quantised activation for two products, as for q, k and v."""
    net = Net()
    integers(net)
    q, step, zero = dynamic(net)
    net.op("MatMulInteger", [q, net.weight("v_quantized", CODES[:, :8]), zero], "whole_v", "/other/MatMul_quant")
    net.op("Mul", [net.op("Cast", ["whole_v"], "wide_v", to=1), step], net.result("v"))
    merged = merge(tmp_path, net.model(check=False))
    kinds = [node.op_type for node in onnx.load(merged).graph.node]
    assert kinds.count("DynamicQuantizeLinear") == kinds.count("MatMulInteger") == kinds.count("MatMul") == 1
    x = {"x": values(6, 3, IN)}
    np.testing.assert_array_equal(run(merged, x)[1], run(tmp_path / "base.onnx", x)[1])


def test_scales_that_others_read_stay(tmp_path: Path) -> None:
    net = Net()
    dequantised(net)
    net.op("Mul", [net.feed("z1", rank=1), "s"], net.result("other", rank=1), "other")
    graph = onnx.load(merge(tmp_path, net.model())).graph
    assert {each.name for each in graph.initializer} == {"wide", "s", "b"}


def test_a_name_that_is_taken_is_not_taken_again(tmp_path: Path) -> None:
    net = Net()
    nbits(net)
    net.op("Mul", [net.feed("w"), "w"], net.result("other"), "other")
    graph = onnx.load(merge(tmp_path, net.model(check=False))).graph
    assert {each.name for each in graph.initializer} == {"w_1", "b"}


def test_a_table_becomes_one_of_floats(tmp_path: Path) -> None:
    net, scales = Net(), np.repeat(SCALES[:, None], 2, axis=1)
    codes = (CODES.T.astype(np.int16) + 128).astype(np.uint8)
    inputs = [net.weight("table", codes), net.feed("ids", TensorProto.INT64), net.weight("s", scales)]
    notes = {"gather_axis": 0, "quantize_axis": 1, "block_size": 16, "bits": 8}
    net.op("GatherBlockQuantized", inputs, net.result("y", rank=3), "/embed/Gather", **MICROSOFT, **notes)
    base = write_model(tmp_path / "base.onnx", net.model(check=False))
    adapter, down, up = tmp_path / "a", values(7, 2, OUT), values(8, IN, 2)
    write_peft(adapter, {}, r=2, alpha=2)
    arrays = {"base_model.model.embed.lora_embedding_A": down, "base_model.model.embed.lora_embedding_B": up}
    write_tensors(adapter / "adapter_model.safetensors", arrays)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", on_quantized="dequantize")
    ids = np.arange(OUT, dtype=np.int64)[None]
    found = run(tmp_path / "merged.onnx", {"ids": ids})[0][0]
    np.testing.assert_allclose(found, WEIGHT.T + (up @ down).T, atol=1e-5)


@pytest.mark.parametrize("on_quantized", ["requantize", "dequantize"])
def test_a_table_that_is_dequantised_after_the_lookup(tmp_path: Path, on_quantized: str) -> None:
    """As onnxruntime's dynamic quantiser leaves embeddings."""
    net, step = Net(), np.array(0.01, np.float32)
    inputs = [net.weight("embed.weight_quantized", CODES.T), net.feed("ids", TensorProto.INT64)]
    rows = net.op("Gather", inputs, "rows", "/embed/Gather_quant")
    zero = net.weight("zero", np.array(3, np.int8))
    net.op("DequantizeLinear", [rows, net.weight("step", step), zero], net.result("y", rank=3), "dequantise")
    base = write_model(tmp_path / "base.onnx", net.model())
    adapter, down, up = tmp_path / "a", values(7, 2, OUT) * 0.4, values(8, IN, 2) * 0.4
    write_peft(adapter, {}, r=2, alpha=2)
    arrays = {"base_model.model.embed.lora_embedding_A": down, "base_model.model.embed.lora_embedding_B": up}
    write_tensors(adapter / "adapter_model.safetensors", arrays)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", on_quantized=on_quantized)
    ids = np.arange(OUT, dtype=np.int64)[None]
    found = run(tmp_path / "merged.onnx", {"ids": ids})[0][0]
    wanted = (CODES.T.astype(np.float32) - 3) * step + (up @ down).T
    np.testing.assert_allclose(found, wanted, atol=1e-5 if on_quantized == "dequantize" else 0.01)
    assert loraformat.verify(tmp_path / "merged.onnx", base, [adapter], run=True, sizes={"ids_0": 1}).holds


def test_other_ways_are_refused(tmp_path: Path) -> None:
    net = Net()
    nbits(net)
    base, pair = write_model(tmp_path / "base.onnx", net.model(check=False)), (values(4, 2, IN), values(5, OUT, 2))
    adapter = write_peft(tmp_path / "adapter", {MODULE: pair}, alpha=2)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx", on_quantized="drop")
    assert caught.value.codes == ("LF626",)


def test_a_matrix_of_many_panels_is_turned_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = 520, 1008  # The last block of a row is not full.
    rng = np.random.default_rng(9)
    packed = rng.integers(0, 256, (rows, 32, 16)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.03, (rows, 32)).astype(np.float16)
    net = Net()
    x = net.feed("x", TensorProto.FLOAT16)
    inputs = [x, net.weight("w_Q4", packed), net.weight("s", scales)]
    sizes = {"bits": 4, "K": columns, "N": rows, "block_size": 32}
    net.op("MatMulNBits", inputs, net.result("y", TensorProto.FLOAT16), NAME, **sizes, **MICROSOFT)
    base = write_model(tmp_path / "base.onnx", net.model(check=False))
    down, up = values(10, 2, columns) * 0.1, values(11, rows, 2) * 0.1
    adapter = write_peft(tmp_path / "adapter", {MODULE: (down, up)}, alpha=2)
    monkeypatch.setattr(float_work, "PANEL_BYTES", 1)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", on_quantized="dequantize", jobs=1)
    found = onnx.numpy_helper.to_array(onnx.load(tmp_path / "merged.onnx").graph.initializer[0])
    codes = np.stack([packed & 15, packed >> 4], axis=3).reshape(rows, 32, 32).astype(np.float32) - 8
    weight = (codes * scales.astype(np.float32)[..., None]).reshape(rows, 1024)[:, :columns] + up @ down
    assert found.shape == (columns, rows)
    np.testing.assert_allclose(found, weight.T.astype(np.float16), rtol=1e-3, atol=1e-6)


def test_a_subgraphs_codes_are_refused(tmp_path: Path) -> None:
    inner = Net()
    dequantised(inner)
    inner.inputs.clear()
    net = Net()
    net.feed("x")
    branch = inner.branch("then")
    net.nodes.append(
        helper.make_node("If", [net.feed("yes", TensorProto.BOOL, 0)], [net.result("y")], "if", then_branch=branch)
    )
    net.nodes[-1].attribute.append(helper.make_attribute("else_branch", branch))
    with pytest.raises(loraformat.LoraformatError) as caught:
        merge(tmp_path, net.model(check=False))
    assert set(caught.value.codes) == {"LF619"}
