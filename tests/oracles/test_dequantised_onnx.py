"""Merges that leave floats in the place of codes, beside a float model of the very numbers that the codes stand for.

What codes stand for is asked of onnxruntime: each node of the quantised model, alone, on the identity matrix.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper

import loraformat
from loraformat.errors import LoraformatError

pytestmark = pytest.mark.oracle
pytest.importorskip("onnxruntime.quantization")

from quantised import FLOATS_BETWEEN, QDQ, RANGES, SHAPES, Case, compute, decode, nbits  # noqa: E402

FEW: dict[str, Callable[[Path, Path], None]] = {
    "MatMulNBits 4": nbits(4, block_size=32, is_symmetric=True),
    "MatMulNBits 4 with zero points": nbits(4, block_size=16, is_symmetric=False),
    "QDQ 4": nbits(4, block_size=32, is_symmetric=True, quant_format=QDQ),
    "QDQ 4 with zero points": nbits(4, block_size=16, is_symmetric=False, quant_format=QDQ),
}
MADE = FLOATS_BETWEEN | FEW | {name: made for name, made in RANGES.items() if name != "QOperator"}
CODES = {"MatMulNBits", "MatMulInteger", "DynamicQuantizeLinear", "QGemm"}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("dequantised"), share=0.02)


def quantise(case: Case, name: str) -> Path:
    if "4" in name or "NBits" in name:
        pytest.importorskip("onnx_ir", reason="MatMulNBitsQuantizer needs onnx_ir")
    target = case.folder / f"{name.replace(' ', '-')}.onnx"
    if not target.exists():
        MADE[name](case.float_base, target)
    return target


def read_weight(path: Path, module: str) -> NDArray[np.float64]:
    """Return what the codes of a module stand for, `(out, in)`, as onnxruntime has it."""
    model = onnx.load(path)
    makers = {output: node for node in model.graph.node for output in node.output}
    held = {each.name for each in model.graph.initializer}
    start = next(n for n in model.graph.node if n.name.startswith(f"/{module}/") and n.op_type in OPERATORS)
    if start.op_type == "MatMulInteger":
        start = next(n for n in model.graph.node if n.op_type == "MatMulInteger" and n.name == start.name)
        return read_integers(model, start)
    wanted, nodes = [start.input[1]], []
    while wanted:
        name = wanted.pop()
        if name in makers and name not in held:
            nodes.insert(0, makers[name])
            wanted += makers[name].input
    inner = SHAPES[module][1]
    alone = onnx.NodeProto()
    alone.CopyFrom(start)
    alone.input[0] = "identity"
    if start.op_type == "Gemm":
        del alone.input[2:]
    value = helper.make_tensor_value_info
    ends = [value("identity", 1, [inner, inner])], [value(alone.output[0], 1, None)]
    graph = helper.make_graph([*nodes, alone], "g", *ends, model.graph.initializer)
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"identity": np.eye(inner, dtype=np.float32)})
    return found.T.astype(np.float64)


def read_integers(model: onnx.ModelProto, node: onnx.NodeProto) -> NDArray[np.float64]:
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    root = node.input[1].removesuffix("_quantized")
    codes, zero = arrays[node.input[1]].astype(np.float64), arrays[f"{root}_zero_point"]
    return ((codes - zero) * arrays[f"{root}_scale"].astype(np.float64)).T


OPERATORS = ("MatMul", "Gemm", "MatMulNBits", "MatMulInteger")


@pytest.mark.parametrize("name", MADE)
def test_floats_are_what_the_codes_stood_for_and_the_change(case: Case, tmp_path: Path, name: str) -> None:
    base, merged = quantise(case, name), tmp_path / "merged.onnx"
    options = {"on_quantized": "dequantize", "accept_ranges": True}
    receipt = loraformat.merge(base, [case.adapter], merged, **options)
    assert all(weight.retained > 0.999 for weight in receipt.weights)
    model = onnx.load(merged)
    onnx.checker.check_model(model)
    assert not CODES & {node.op_type for node in model.graph.node}
    wanted = {module: read_weight(base, module) + case.delta[module] for module in SHAPES}
    floats = {module: read_weight(merged, module) for module in SHAPES}
    for module in SHAPES:
        np.testing.assert_allclose(floats[module], wanted[module], atol=1e-6)
    if name not in RANGES:
        exact = compute(case.make(wanted, f"{name}.exact.onnx"), case.x)
        np.testing.assert_allclose(compute(merged, case.x), exact, atol=2e-5)
    read = {each for node in model.graph.node for each in node.input}
    assert {each.name for each in model.graph.initializer} <= read


@pytest.mark.parametrize("name", ["MatMulNBits 4 with zero points", "QDQ 4", "dynamic int8", "QDQ per channel"])
def test_it_is_proven(case: Case, tmp_path: Path, name: str) -> None:
    base, merged = quantise(case, name), tmp_path / "merged.onnx"
    loraformat.merge(base, [case.adapter], merged, on_quantized="dequantize", accept_ranges=True)
    assert loraformat.verify(merged, base, [case.adapter], run=name not in RANGES).holds
    model = onnx.load(merged)
    floats = next(each for each in model.graph.initializer if each.data_type == 1 and len(each.dims) == 2)
    data = bytearray(merged.read_bytes())
    data[data.index(floats.raw_data) + 50] ^= 1
    merged.write_bytes(data)
    found = loraformat.verify(merged, base, [case.adapter])
    assert [problem.code for problem in found.problems] == ["LF802"]
    model.graph.node[0].name += "x"
    onnx.save(model, merged)
    assert not loraformat.verify(merged, base, [case.adapter]).holds


@pytest.mark.parametrize("name", ["MatMulNBits 4", "dynamic int8"])
def test_data_files_hold_the_floats(case: Case, tmp_path: Path, name: str) -> None:
    model = onnx.load(quantise(case, name))
    base, merged = tmp_path / "base.onnx", tmp_path / "out" / "merged.onnx"
    merged.parent.mkdir()
    onnx.save(model, base, save_as_external_data=True, location="base.data", size_threshold=64)
    receipt = loraformat.merge(base, [case.adapter], merged, on_quantized="dequantize")
    assert merged.stat().st_size < 32768
    one = loraformat.merge(quantise(case, name), [case.adapter], tmp_path / "one.onnx", on_quantized="dequantize")
    np.testing.assert_array_equal(compute(merged, case.x), compute(tmp_path / "one.onnx", case.x))
    assert [w.retained for w in receipt.weights] == [w.retained for w in one.weights]
    assert loraformat.verify(merged, base, [case.adapter]).holds
    shared = tmp_path / "shared.onnx"
    loraformat.merge(base, [case.adapter], shared, on_quantized="dequantize", external_data="share")
    np.testing.assert_array_equal(compute(shared, case.x), compute(merged, case.x))
    assert loraformat.verify(shared, base, [case.adapter]).holds


def test_with_the_checkpoint_the_floats_are_its_own(case: Case, tmp_path: Path) -> None:
    base, merged = quantise(case, "MatMulNBits 4"), tmp_path / "merged.onnx"
    options = {"base_checkpoint": case.checkpoint}
    loraformat.merge(base, [case.adapter], merged, on_quantized="dequantize", **options)
    np.testing.assert_allclose(compute(merged, case.x), compute(case.float_merged, case.x), atol=2e-5)
    assert loraformat.verify(merged, base, [case.adapter], **options).holds


def test_operators_on_codes_of_both_factors_round_their_result_as_before(case: Case, tmp_path: Path) -> None:
    base, merged = tmp_path / "base.onnx", tmp_path / "merged.onnx"
    RANGES["QOperator"](case.float_base, base)
    loraformat.merge(base, [case.adapter], merged, on_quantized="dequantize", accept_ranges=True)
    model = onnx.load(merged)
    onnx.checker.check_model(model)
    assert {"QLinearMatMul", "QGemm"}.isdisjoint(node.op_type for node in model.graph.node)
    rounded = [sum(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node) for path in (base, merged)]
    assert rounded[1] == rounded[0] + len(SHAPES)
    before = decode(base)
    for module, delta in case.delta.items():
        np.testing.assert_allclose(read_weight(merged, module), before[module] + delta, atol=1e-6)
    found = loraformat.verify(merged, base, [case.adapter], run=True)
    assert found.holds
    assert abs(found.runs[0].kept - 1) < 0.1


def test_a_models_own_files_are_not_rewritten_for_it(case: Case, tmp_path: Path) -> None:
    base = tmp_path / "base.onnx"
    base.write_bytes(quantise(case, "MatMulNBits 4").read_bytes())
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge_into(base, [case.adapter], on_quantized="dequantize")
    assert caught.value.codes == ("LF620",)
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(base, [case.adapter], tmp_path / "m.onnx", on_quantized="dequantize", keep_undo=True)
    assert caught.value.codes == ("LF622",)
