"""Floats of 8 bits behind DequantizeLinear, MatMulBnb4, float zero points of MatMulNBits: against onnxruntime."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import loraformat
from graphs import Array, Net, product, run, write_model, write_peft, write_state
from loraformat.errors import LoraformatError

OUT, INNER = 24, 64
MODULE = "model.layers.0.q_proj"
RNG = np.random.default_rng(12)
W = (RNG.standard_normal((OUT, INNER)) * 0.05).astype(np.float32)
FACTORS = tuple((RNG.standard_normal(shape) * 0.02).astype(np.float32) for shape in ((3, INNER), (OUT, 3)))
DELTA = product((FACTORS[0], FACTORS[1]))


def merge(folder: Path, model: onnx.ModelProto, **options: Any) -> tuple[Path, Path]:
    base = write_model(folder / "base.onnx", model)
    adapter = write_peft(folder / "adapter", {MODULE: (FACTORS[0], FACTORS[1])}, alpha=3.0)
    loraformat.merge(base, [adapter], folder / "merged.onnx", **options)
    checkpoint = {key: options[key] for key in ("base_checkpoint",) if key in options}
    assert loraformat.verify(folder / "merged.onnx", base, [adapter], **checkpoint).holds
    return base, folder / "merged.onnx"


def weight_of(path: Path) -> Array:
    """Return `(out, in)` as onnxruntime applies it."""
    return run(path, {"x": np.eye(INNER, dtype=np.float32)})[0].T.astype(np.float64)


def float8_net(shape: tuple[int, ...]) -> onnx.ModelProto:
    """Return Y = X·DequantizeLinear(W)ᵀ with scales of a tensor, a row or blocks of a row."""
    wide = INNER // shape[1] if len(shape) == 2 else 1
    largest = np.abs(W).max() if not shape else np.abs(W.reshape(OUT, -1, wide if wide > 1 else INNER)).max(axis=2)
    scales = (np.asarray(largest).reshape(shape) / 448).astype(np.float32)
    spread = np.repeat(scales, wide, axis=1) if wide > 1 else scales.reshape(-1, 1) if shape else scales
    codes = (W / spread).astype(ml_dtypes.float8_e4m3fn)
    net = Net()
    kind = TensorProto.FLOAT8E4M3FN
    net.initializers.append(helper.make_tensor(f"{MODULE}.weight", kind, codes.shape, codes.tobytes(), raw=True))
    zeros = np.zeros(shape, np.uint8)
    net.initializers.append(helper.make_tensor("z", kind, shape, zeros.tobytes(), raw=True))
    notes = {"axis": 1, "block_size": wide} if wide > 1 else {"axis": 0}
    net.op("DequantizeLinear", [f"{MODULE}.weight", net.weight("s", scales), "z"], "w", **notes)
    net.op("Transpose", ["w"], "wt", perm=[1, 0])
    net.op("MatMul", [net.feed("x", rank=2), "wt"], net.result("y", rank=2), "/model/layers.0/q_proj/MatMul")
    model = net.model(check=False)
    model.opset_import[0].version = 21
    model.ir_version = 10
    return model


@pytest.mark.parametrize("shape", [(), (OUT,), (OUT, 4)], ids=str)
def test_floats_of_8_bits_follow_their_scales(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(LoraformatError, match="LF440"):
        merge(tmp_path, float8_net(shape))
    base, merged = merge(tmp_path, float8_net(shape), on_quantized="dequantize")
    np.testing.assert_allclose(weight_of(merged), weight_of(base) + DELTA, atol=1e-7)
    assert [node.op_type for node in onnx.load(merged).graph.node] == ["Transpose", "MatMul"]


@pytest.mark.parametrize("shape", [(), (OUT,), (OUT, 4)], ids=str)
def test_floats_of_8_bits_are_rounded_afresh_from_the_checkpoint(shape: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint = write_state(tmp_path / "model.safetensors", {f"{MODULE}.weight": W})
    base, merged = merge(tmp_path, float8_net(shape), base_checkpoint=checkpoint)
    assert base.stat().st_size < merged.stat().st_size  # A receipt, and nothing else.
    apart = weight_of(merged) - (W + DELTA)
    assert np.abs(apart).max() <= np.abs(W + DELTA).max() / 448 * 16 * 1.01
    assert np.vdot(weight_of(merged) - W, DELTA) / np.vdot(DELTA, DELTA) == pytest.approx(1, abs=0.15)


def float_net() -> onnx.ModelProto:
    net = Net()
    x, y = net.feed("x", rank=2), net.result("y", rank=2)
    net.op("MatMul", [x, net.weight("onnx::MatMul_7", W.T.copy())], y, "/model/layers.0/q_proj/MatMul")
    return net.model(check=False)


@pytest.mark.parametrize("kind", [0, 1])
def test_bnb4_is_decoded_as_onnxruntime_does(kind: int, tmp_path: Path) -> None:
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

    quantiser = MatMulBnb4Quantizer(float_net(), kind, 16)
    quantiser.process()
    model = quantiser.model.model
    with pytest.raises(LoraformatError, match="LF471"):
        merge(tmp_path, model)
    base, merged = merge(tmp_path, model, on_quantized="dequantize")
    assert np.abs(weight_of(base) - W).max() > 1e-3
    np.testing.assert_allclose(weight_of(merged), weight_of(base) + DELTA, atol=1e-7)
    assert [node.op_type for node in onnx.load(merged).graph.node] == ["MatMul"]


def test_float_zero_points_stay_where_all_is_rounded_afresh(tmp_path: Path) -> None:
    """HQQ's: they are shifts, and no codes."""
    scales = np.ptp(W.reshape(OUT, -1, 16), axis=2) / 14
    zeros = 7.5 - (W.reshape(OUT, -1, 16).max(2) + W.reshape(OUT, -1, 16).min(2)) / 2 / scales
    codes = np.clip(np.rint(W.reshape(OUT, -1, 16) / scales[..., None] + zeros[..., None]), 0, 15).astype(np.uint8)
    net = Net()
    inputs = [net.feed("x", rank=2), net.weight("w_Q4", codes[..., 0::2] | codes[..., 1::2] << 4)]
    inputs += [net.weight("w_scales", scales.reshape(-1).astype(np.float32))]
    inputs += [net.weight("w_zeros", zeros.reshape(-1).astype(np.float32))]
    sizes = {"K": INNER, "N": OUT, "bits": 4, "block_size": 16}
    net.op(
        "MatMulNBits",
        inputs,
        net.result("y", rank=2),
        "/model/layers.0/q_proj/MatMul_Q4",
        domain="com.microsoft",
        **sizes,
    )
    checkpoint = write_state(tmp_path / "model.safetensors", {f"{MODULE}.weight": W})
    _, merged = merge(tmp_path, net.model(check=False), base_checkpoint=checkpoint)
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(merged).graph.initializer}
    np.testing.assert_array_equal(kept["w_zeros"], zeros.reshape(-1).astype(np.float32))
    assert np.abs(weight_of(merged) - (W + DELTA)).max() <= np.abs(kept["w_scales"]).max() * 0.51


@pytest.mark.parametrize(
    ("op", "odd", "why"),
    [
        ("MatMulFpQ4", {}, "MatMulFpQ4"),
        ("MatMulNBits", {"bits": 3}, "scales of the shape"),
        ("MatMulNBits", {"weight_prepacked": 2}, "weight_prepacked is 2"),
    ],
)
def test_others_are_refused_by_name(op: str, odd: dict[str, int], why: str, tmp_path: Path) -> None:
    """FpQ4's blobs, MatMulNBits of 3 bits, and codes that are laid out for CUDA's kernels."""
    net = Net()
    inputs = [net.feed("x", rank=2), net.weight("w_Q", np.ones((OUT, 4, 4), np.uint8))]
    inputs.append(net.weight("s", np.ones(OUT * 4, np.float32)))
    sizes = {"K": INNER, "N": OUT, "bits": 2, "block_size": 16, **odd}
    net.op(op, inputs, net.result("y", rank=2), "/model/layers.0/q_proj/MatMul", domain="com.microsoft", **sizes)
    with pytest.raises(LoraformatError, match=why) as caught:
        merge(tmp_path, net.model(check=False), on_quantized="dequantize")
    assert caught.value.codes == ("LF403",)
