"""Ranges of activations in graphs made node by node: what follows them, and what cannot be measured again."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import loraformat
from builders import write_peft
from graphs import Array, Net, linear_net, run, stored_weights, write_model
from loraformat.bases._onnx.ranges import compute_numbers

MODULE, NAME = "model.layers.1.fc", "/model/layers.1/fc/Gemm"
OUT, IN = 600, 16
RNG = np.random.default_rng(1)
CODES = RNG.integers(-64, 65, (OUT, IN)).astype(np.int8)
STEPS = RNG.uniform(0.01, 0.02, OUT).astype(np.float32)
BIAS = RNG.standard_normal(OUT).astype(np.float32)
PAIR = (RNG.standard_normal((2, IN)).astype(np.float32), RNG.standard_normal((OUT, 2)).astype(np.float32) * 0.2)
SAMPLES = RNG.standard_normal((5, 3, IN)).astype(np.float32) * 4
LOW, HIGH = -1.0, 1.5
"""The range of x that the base was measured on: far less than the samples take."""


def number(net: Net, name: str, value: Any, form: Any) -> str:
    return net.weight(name, np.array(value, form))


def between(net: Net, value: str, scale: str, zero: str) -> str:
    net.op("QuantizeLinear", [value, scale, zero], f"{value}_q", f"{value}_QuantizeLinear")
    return net.op("DequantizeLinear", [f"{value}_q", scale, zero], f"{value}_dq", f"{value}_DequantizeLinear")


def gemm_net() -> Net:
    """Return x -> Q -> DQ -> Gemm with an int32 bias in steps of both scales -> y."""
    net = Net()
    step = np.float32((HIGH - LOW) / 255)
    x = between(net, net.feed("x"), number(net, "xs", step, np.float32), number(net, "xz", 102, np.uint8))
    counts = np.rint(BIAS / (step * STEPS)).astype(np.int32)
    net.op("DequantizeLinear", [net.weight("w_quantized", CODES), net.weight("ws", STEPS)], "w", axis=0)
    net.op("DequantizeLinear", [net.weight("b_quantized", counts), net.weight("bs", step * STEPS)], "b", axis=0)
    net.op("Gemm", [x, "w", "b"], net.result("y"), NAME, transB=1)
    return net


def calibrate(folder: Path, model: onnx.ModelProto, files: str = "", **options: Any) -> Path:
    base = write_model(folder / "base.onnx", model, files)
    adapter = write_peft(folder / "adapter", {MODULE: PAIR}, alpha=2)
    np.savez(folder / "data.npz", x=SAMPLES)
    merged = folder / "merged.onnx"
    loraformat.merge(base, [adapter], merged, calibration=folder / "data.npz", min_retained=0, **options)
    assert loraformat.verify(merged, base, [adapter], calibration=folder / "data.npz").holds
    return merged


def wanted(x: Array) -> Array:
    return x @ (CODES * STEPS[:, None] + PAIR[1] @ PAIR[0]).T + BIAS


@pytest.mark.parametrize("files", ["", "one"])
def test_a_bias_follows_the_scale_that_it_counts_in(tmp_path: Path, files: str) -> None:
    """Its 600 counts are in a data file where there is one."""
    merged = calibrate(tmp_path, gemm_net().model(), files)
    before, after = stored_weights(tmp_path / "base.onnx"), stored_weights(merged)
    assert after["xs"] == pytest.approx((SAMPLES.max() - SAMPLES.min()) / 255)
    ratio = before["xs"] / after["xs"]
    np.testing.assert_allclose(after["b_quantized"], before["b_quantized"] * ratio, atol=0.51)
    np.testing.assert_allclose(after["bs"], before["bs"] / ratio, rtol=1e-6)
    np.testing.assert_allclose(after["b_quantized"] * after["bs"], BIAS, atol=2e-3)
    assert {name: each.shape for name, each in after.items()} == {name: each.shape for name, each in before.items()}
    found = run(merged, {"x": SAMPLES[0]})[0]
    assert np.linalg.norm(found - wanted(SAMPLES[0])) < 0.1 * np.linalg.norm(wanted(SAMPLES[0]))


def test_floats_may_stand_beside_it(tmp_path: Path) -> None:
    merged = calibrate(tmp_path, gemm_net().model(), on_quantized="dequantize")
    found = run(merged, {"x": SAMPLES[0]})[0]
    assert np.linalg.norm(found - wanted(SAMPLES[0])) < 0.02 * np.linalg.norm(wanted(SAMPLES[0]))


def test_zero_as_the_first_code_cuts_off_as_a_relu_does(tmp_path: Path) -> None:
    net = gemm_net()
    net.nodes[-1].output[0] = "y0"
    scale, zero = number(net, "ys", 0.01, np.float32), number(net, "yz", 0, np.uint8)
    net.op("QuantizeLinear", ["y0", scale, zero], "y0_q", "q")
    net.op("DequantizeLinear", ["y0_q", scale, zero], "y")
    after = stored_weights(calibrate(tmp_path, net.model()))
    assert after["yz"] == 0
    assert after["ys"] == pytest.approx(wanted(SAMPLES.reshape(-1, IN)).max() / 255, rel=0.1)


def refuse(folder: Path, net: Net) -> loraformat.LoraformatError:
    with pytest.raises(loraformat.LoraformatError) as caught:
        calibrate(folder, net.model(check=False))
    assert not (folder / "merged.onnx").exists()
    return caught.value


def test_a_scale_that_something_else_needs_is_refused(tmp_path: Path) -> None:
    net = gemm_net()
    net.op("Mul", [net.feed("z", rank=1), "xs"], net.result("other", rank=1), "other")
    error = refuse(tmp_path, net)
    assert error.codes == ("LF627",)
    assert "other" in str(error)


def test_no_zero_point_is_refused(tmp_path: Path) -> None:
    net = gemm_net()
    for node in net.nodes[:2]:
        del node.input[2:]
    assert refuse(tmp_path, net).codes == ("LF627",)


def test_other_files_are_not_rewritten_for_it(tmp_path: Path) -> None:
    calibrate(tmp_path, gemm_net().model())
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge_into(
            tmp_path / "base.onnx", [tmp_path / "adapter"], calibration=tmp_path / "data.npz", min_retained=0
        )
    assert caught.value.codes == ("LF620",)
    plan = loraformat.plan_merge(tmp_path / "base.onnx", [tmp_path / "adapter"], calibration=tmp_path / "data.npz")
    assert "LF441" in {problem.code for problem in plan.problems}


def test_an_unknown_operator_on_codes_is_refused(tmp_path: Path) -> None:
    net = gemm_net()
    net.nodes[-1].output[0] = "y0"
    number(net, "ys", 0.1, np.float32), number(net, "yz", 128, np.uint8)
    net.op("QuantizeLinear", ["y0", "ys", "yz"], "y0_q", "q")
    inputs = ["y0_q", "ys", "yz", "ys", "yz"]
    net.op("QLinearReduceMean", inputs, "mean", "mean", domain="com.microsoft", axes=[1], keepdims=1)
    net.op("DequantizeLinear", ["mean", "ys", "yz"], "y")
    assert set(refuse(tmp_path, net).codes) == {"LF627"}


@given(
    st.floats(-50, 50, width=32),
    st.floats(0, 100, width=32),
    st.booleans(),
    st.sampled_from([TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16]),
)
def test_numbers_are_those_of_the_quantiser(low: float, width: float, symmetric: bool, kind: int) -> None:
    tools = pytest.importorskip("onnxruntime.quantization.quant_utils")
    form = helper.tensor_dtype_to_np_dtype(kind).type
    ends = tools.get_qmin_qmax_for_qType(kind, symmetric=symmetric)
    low32, high32 = np.float32(low), np.float32(np.float32(low) + np.float32(width))
    zero, scale = tools.compute_scale_zp(low32, high32, *ends, symmetric)
    found = compute_numbers(float(low32), float(high32), form, symmetric=symmetric)
    assert np.float32(found[0]) == pytest.approx(float(scale), rel=1e-6)
    assert abs(found[1] - int(zero)) <= (abs(float(high32)) > 1e6)


def test_each_graph_of_a_folder_has_data_of_its_own(tmp_path: Path) -> None:
    """The graph in floats needs none, and goes with a range that nobody measures; another choice needs less data."""
    base, data, out = tmp_path / "base", tmp_path / "data", tmp_path / "out"
    for name in ("one/model.onnx", "two/model.onnx"):
        write_model(base / name, gemm_net().model(), "one")
    write_model(base / "model.onnx", linear_net({MODULE: CODES * STEPS[:, None]}).model())
    adapter = write_peft(tmp_path / "adapter", {MODULE: PAIR}, alpha=2)
    for name, factor in (("one", 1), ("two", 3)):
        (data / name).mkdir(parents=True)
        np.savez(data / name / "model.npz", x=SAMPLES * np.float32(factor))
    receipt = loraformat.merge(base, [adapter], out, calibration=data, min_retained=0)
    assert len(receipt.weights) == 3
    found = [stored_weights(out / name / "model.onnx")["xs"] for name in ("one", "two")]
    assert found == pytest.approx([scale * (SAMPLES.max() - SAMPLES.min()) / 255 for scale in (1, 3)])
    assert loraformat.verify(out, base, [adapter], calibration=data).holds
    (data / "two" / "model.npz").unlink()
    with pytest.raises(loraformat.LoraformatError, match=r"no two/model\.npz"):
        loraformat.merge(base, [adapter], tmp_path / "none", calibration=data, min_retained=0)
    some = loraformat.merge(base, [adapter], tmp_path / "some", calibration=data, min_retained=0, graphs=["one"])
    assert [weight.name.partition(":")[0] for weight in some.weights] == ["one/model.onnx"]
    assert loraformat.verify(tmp_path / "some", base, [adapter], calibration=data).holds
