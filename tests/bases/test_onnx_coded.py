"""Quantised weights of graphs made node by node: which are merged where, and which are refused and why."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import loraformat
from builders import write_peft
from graphs import Array, Net, dyadic, merge_model, run, stored_weights, torchscript_name, write_model

MODULE = "model.layers.1.fc"
NAME = torchscript_name(MODULE, "MatMul")
OUT, IN = 7, 16


def some_factors(seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, IN)).astype(np.float32), rng.standard_normal((OUT, 2)).astype(np.float32)


def codes(seed: int = 2, form: str = "int8") -> Array:
    least = -127 if form == "int8" else 0
    return np.random.default_rng(seed).integers(least, least + 255, (IN, OUT)).astype(form)


def scales(count: int = OUT) -> Array:
    return np.random.default_rng(3).uniform(0.01, 0.03, count).astype(np.float32)


def refused(folder: Path, net: Net, **options: Any) -> loraformat.LoraformatError:
    base = write_model(folder / "base.onnx", net.model(check=False))
    adapter = write_peft(folder / "adapter", {MODULE: some_factors()})
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], folder / "merged.onnx", **options)
    assert not (folder / "merged.onnx").exists()
    return caught.value


def dequantised(net: Net, x: str, **attributes: Any) -> str:
    wide = net.op("DequantizeLinear", [net.weight("codes", codes()), net.weight("scales", scales())], "wide", axis=1)
    return net.op("MatMul", [x, wide], net.result("y"), NAME)


def test_a_dequantised_weight_is_merged(tmp_path: Path) -> None:
    net = Net()
    dequantised(net, net.feed("x"))
    down, up = some_factors()
    merged = merge_model(tmp_path, net.model(), {MODULE: (down, up)}, alpha=2.0)
    x = dyadic(np.random.default_rng(4), 3, IN)
    change = run(merged, {"x": x})[0] - run(tmp_path / "base.onnx", {"x": x})[0]
    wanted = x.astype(np.float64) @ (up.astype(np.float64) @ down).T
    assert np.linalg.norm(change - wanted) < 0.02 * np.linalg.norm(wanted)
    before, after = stored_weights(tmp_path / "base.onnx"), stored_weights(merged)
    assert before["scales"].shape == after["scales"].shape
    assert (before["scales"] != after["scales"]).all()


def test_scales_that_another_operator_reads_stay(tmp_path: Path) -> None:
    net = Net()
    dequantised(net, net.feed("x"))
    net.op("Mul", [net.feed("z"), "scales"], net.result("other"), "other")
    base = write_model(tmp_path / "base.onnx", net.model())
    down, up = some_factors()
    adapter = write_peft(tmp_path / "adapter", {MODULE: (down * 0.1, up * 0.1)})
    receipt = loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    (problem,) = receipt.problems
    assert (problem.code, problem.severity, problem.where) == ("LF442", "warning", "codes")
    assert "other" in problem.found
    np.testing.assert_array_equal(stored_weights(tmp_path / "merged.onnx")["scales"], scales())


@pytest.mark.parametrize("channels", [5000])
def test_zero_points_written_one_by_one_are_read(tmp_path: Path, channels: int) -> None:
    """onnxruntime's quantisers write them as int32_data, which is no run of bytes."""
    net, rng = Net(), np.random.default_rng(5)
    zeros = rng.integers(100, 150, channels).astype(np.uint8)
    q = rng.integers(0, 256, (IN, channels)).astype(np.uint8)
    s = rng.uniform(0.01, 0.03, channels).astype(np.float32)
    net.initializers.append(helper.make_tensor("zeros", TensorProto.UINT8, zeros.shape, zeros.tolist()))
    wide = net.op("DequantizeLinear", [net.weight("codes", q), net.weight("scales", s), "zeros"], "wide", axis=1)
    net.op("MatMul", [net.feed("x"), wide], net.result("y"), NAME)
    down, up = rng.standard_normal((2, IN)).astype(np.float32), np.zeros((channels, 2), np.float32)
    up[3] = 1
    merged = merge_model(tmp_path, net.model(), {MODULE: (down, up)}, alpha=2.0)
    after = stored_weights(merged)
    untouched = np.arange(channels) != 3
    np.testing.assert_array_equal(after["codes"][:, untouched], q[:, untouched])
    new = (after["codes"][:, 3].astype(np.float64) - zeros[3]) * after["scales"][3]
    wanted = (q[:, 3].astype(np.float64) - zeros[3]) * s[3] + down.sum(axis=0)
    assert np.abs(new - wanted).max() <= after["scales"][3] * 0.51


def test_four_bits_are_refused_by_name(tmp_path: Path) -> None:
    net = Net()
    packed = np.random.default_rng(6).integers(0, 255, (OUT, 1, 8)).astype(np.uint8)
    inputs = [net.feed("x"), net.weight("w_Q4", packed), net.weight("w_scales", scales())]
    net.op("MatMulNBits", inputs, net.result("y"), NAME, domain="com.microsoft", K=IN, N=OUT, bits=4, block_size=16)
    error = refused(tmp_path, net)
    assert error.codes == ("LF440",)
    assert MODULE in str(error)


def test_columns_in_another_order_are_refused(tmp_path: Path) -> None:
    net = Net()
    q = np.random.default_rng(7).integers(0, 255, (OUT, 1, 16)).astype(np.uint8)
    order = net.weight("order", np.arange(IN, dtype=np.int32))
    inputs = [net.feed("x"), net.weight("w_Q8", q), net.weight("w_scales", scales()), "", order]
    net.op("MatMulNBits", inputs, net.result("y"), NAME, domain="com.microsoft", K=IN, N=OUT, bits=8, block_size=16)
    error = refused(tmp_path, net)
    assert error.codes == ("LF403",)
    assert "g_idx" in str(error)


@pytest.mark.parametrize("count", [3, IN + 1])
def test_scales_that_fit_no_axis_are_refused(tmp_path: Path, count: int) -> None:
    net = Net()
    wide = net.op("DequantizeLinear", [net.weight("codes", codes()), net.weight("scales", scales(count))], "w", axis=1)
    net.op("MatMul", [net.feed("x"), wide], net.result("y"), NAME)
    assert refused(tmp_path, net).codes == ("LF403",)


def test_measured_ranges_speak_against_float_weights_too(tmp_path: Path) -> None:
    net = Net()
    step, zero = net.weight("step", np.array(0.1, np.float32)), net.weight("zero", np.array(0, np.int8))
    q = net.op("QuantizeLinear", [net.feed("x"), step, zero], "q", "Quantise")
    x = net.op("DequantizeLinear", [q, step, zero], "xq")
    net.op("MatMul", [x, net.weight("w", dyadic(np.random.default_rng(8), IN, OUT))], net.result("y"), NAME)
    error = refused(tmp_path, net)
    assert error.codes == ("LF441",)
    assert "Quantise" in str(error)
    receipt = loraformat.merge(
        tmp_path / "base.onnx", [tmp_path / "adapter"], tmp_path / "merged.onnx", accept_ranges=True
    )
    assert [(problem.code, problem.severity) for problem in receipt.problems] == [("LF441", "warning")]


def test_a_change_that_the_kept_scales_cannot_hold_is_refused(tmp_path: Path) -> None:
    net = Net()
    dequantised(net, net.feed("x"))
    base = write_model(tmp_path / "base.onnx", net.model())
    down, up = some_factors()
    adapter = write_peft(tmp_path / "adapter", {MODULE: (down * 1e-2, up * 1e-2)})
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx", keep_scales=True)
    assert caught.value.codes == ("LF504",)


def test_zero_points_that_are_too_few_are_refused(tmp_path: Path) -> None:
    net = Net()
    zeros = helper.make_tensor("zeros", TensorProto.INT8, [OUT], [0] * OUT)
    del zeros.int32_data[-1]
    net.initializers.append(zeros)
    wide = net.op("DequantizeLinear", [net.weight("codes", codes()), net.weight("scales", scales()), "zeros"], "w")
    net.op("MatMul", [net.feed("x"), wide], net.result("y"), NAME)
    assert refused(tmp_path, net).codes == ("LF116",)
