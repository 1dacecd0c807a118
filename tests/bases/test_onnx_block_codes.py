"""Codes in blocks of a row: slices of a fused weight, tables that are looked up, fused attention."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import loraformat
from builders import write_peft, write_tensors
from graphs import Array, Net, run, stored_weights, write_model

BUILDER = "onnxruntime-genai"
QKV = "/model/layers.0/attn/qkv_proj"
WIDTH, HEADS, GROUPS, SIZE = 48, 4, 2, 8
ROWS = (HEADS + 2 * GROUPS) * SIZE


def factors(out: int, inner: int, seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, inner)).astype(np.float32), rng.standard_normal((out, 2)).astype(np.float32)


def round_rows(weight: Array, bits: int, block: int) -> tuple[Array, Array, Array]:
    """Return codes, scales and the values of both, by the rule max / first code."""
    least = -(1 << (bits - 1))
    blocks = weight.reshape(len(weight), -1, block)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], 2)
    scales = (largest / least).astype(np.float32)
    codes = np.clip(np.rint(blocks / scales), least, -least - 1)
    return (codes - least).astype(np.uint8), scales[..., 0], (codes * scales).reshape(weight.shape)


def pack(codes: Array, bits: int) -> Array:
    return codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


def packed_net(weight: Array, bits: int) -> Any:
    """Return q, k and v side by side as the builder writes them, with the attention that tells their sizes."""
    net = Net()
    codes, scales, _ = round_rows(weight, bits, 16)
    inputs = [net.feed("x", rank=3), net.weight("w_Q", pack(codes, bits)), net.weight("w_scales", scales)]
    sizes = {"K": WIDTH, "N": ROWS, "bits": bits, "block_size": 16}
    net.op("MatMulNBits", inputs, net.result("qkv", rank=3), f"{QKV}/MatMul_Q{bits}", domain="com.microsoft", **sizes)
    heads = {"num_heads": HEADS, "kv_num_heads": GROUPS}
    net.op("GroupQueryAttention", ["qkv"], "y", "attention", domain="com.microsoft", **heads)
    model = net.model(check=False)
    model.producer_name = BUILDER
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_a_fused_weight_are_merged_alone(tmp_path: Path, bits: int) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    base = write_model(tmp_path / "base.onnx", packed_net(weight, bits))
    rows = {"q_proj": slice(0, 32), "k_proj": slice(32, 48), "v_proj": slice(48, 64)}
    plain = {f"model.layers.0.self_attn.{name}.weight": weight[own] for name, own in rows.items()}
    checkpoint = write_tensors(tmp_path / "model.safetensors", plain)
    pairs = {name: factors(len(weight[rows[name]]), WIDTH, 2) for name in ("q_proj", "v_proj")}
    adapter = write_peft(tmp_path / "a", {f"model.layers.0.self_attn.{n}": pair for n, pair in pairs.items()}, alpha=2)
    receipt = loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    assert [len(each.targets) for each in receipt.weights] == [2]
    before, after = stored_weights(base), stored_weights(tmp_path / "merged.onnx")
    for name in ("w_Q", "w_scales"):
        np.testing.assert_array_equal(after[name][rows["k_proj"]], before[name][rows["k_proj"]])
    start = weight if bits == 4 else round_rows(weight, bits, 16)[2]
    for name, (down, up) in pairs.items():
        codes, scales, _ = round_rows(start[rows[name]] + up @ down, bits, 16)
        np.testing.assert_allclose(after["w_scales"][rows[name]], scales, rtol=2e-2 if bits == 8 else 1e-6)
        same = after["w_Q"][rows[name]] == pack(codes, bits)
        assert same.mean() > (0.9 if bits == 8 else 0.999)


@pytest.mark.parametrize(("bits", "form"), [(4, "uint8"), (8, "uint8"), (4, "int4"), (4, "uint4")])
def test_a_table_that_is_looked_up_is_merged(tmp_path: Path, bits: int, form: str) -> None:
    rows, width = 20, 32
    table = np.random.default_rng(3).standard_normal((rows, width)).astype(np.float32)
    codes, scales, values = round_rows(table, bits, 16)
    codes = codes.reshape(rows, width)
    net = Net()
    if form == "uint8":
        inputs = [net.weight("table", pack(codes, bits)), net.feed("ids", TensorProto.INT64), net.weight("s", scales)]
    else:
        kind = {"int4": TensorProto.INT4, "uint4": TensorProto.UINT4}[form]
        shifted = codes if form == "uint4" else codes ^ 8
        data = pack(shifted, 4).tobytes()
        net.initializers.append(helper.make_tensor("table", kind, [rows, width], data, raw=True))
        inputs = ["table", net.feed("ids", TensorProto.INT64), net.weight("s", scales)]
        if form == "uint4":
            zeros = helper.make_tensor("z", kind, scales.shape, np.full(rows, 0x88, np.uint8).tobytes(), raw=True)
            net.initializers.append(zeros)
            inputs.append("z")
    notes = {"gather_axis": 0, "quantize_axis": 1, "block_size": 16} | ({"bits": bits} if form == "uint8" else {})
    net.op("GatherBlockQuantized", inputs, net.result("y", rank=3), "/embed/Gather", domain="com.microsoft", **notes)
    base = write_model(tmp_path / "base.onnx", net.model(check=False))
    ids = np.arange(rows, dtype=np.int64).reshape(4, 5)
    np.testing.assert_allclose(run(base, {"ids": ids})[0].reshape(rows, width), values, atol=1e-6)
    down, up = factors(width, rows, 4)
    adapter = tmp_path / "a"
    arrays = {"base_model.model.embed.lora_embedding_A": down, "base_model.model.embed.lora_embedding_B": up}
    write_peft(adapter, {}, r=2, alpha=2)
    write_tensors(adapter / "adapter_model.safetensors", arrays)
    checkpoint = write_tensors(tmp_path / "model.safetensors", {"embed.weight": table})
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    found = run(tmp_path / "merged.onnx", {"ids": ids})[0].reshape(rows, width)
    wanted = (table if bits == 4 else values) + (up @ down).T
    steps = np.repeat(np.abs(stored_weights(tmp_path / "merged.onnx")["s"]), 16, axis=1)
    assert (np.abs(found - wanted) <= steps * 1.001).all()
    assert (np.abs(found - wanted) <= steps * 0.51).mean() > 0.97


def attention_net(weight: Array, per_column: bool) -> Any:
    """Return the fused attention that onnxruntime's dynamic quantiser writes."""
    net = Net()
    columns = weight.shape[1]
    scale = np.abs(weight).max(axis=0) / 127 if per_column else np.array(np.abs(weight).max() / 127)
    codes = np.rint(weight / scale).astype(np.int8)
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", [net.feed("x", rank=3)], ["q", "step", "zero"]))
    zero = np.zeros(columns if per_column else (), np.int8)
    inputs = ["q", net.weight("w_quantized", codes), net.weight("bias", np.zeros(columns, np.float32)), "step"]
    inputs += [net.weight("w_scale", scale.astype(np.float32)), "", "zero", net.weight("w_zero", zero)]
    output = net.result("/block/attention/output_0", rank=3)
    net.op("QAttention", inputs, output, "Attention_0", domain="com.microsoft", num_heads=2)
    return net.model(check=False)


@pytest.mark.parametrize("per_column", [True, False])
def test_fused_attention_of_whole_numbers_is_merged(tmp_path: Path, per_column: bool) -> None:
    weight = np.random.default_rng(5).standard_normal((16, 48)).astype(np.float32)
    base = write_model(tmp_path / "base.onnx", attention_net(weight, per_column))
    down, up = factors(16, 16, 6)
    adapter = write_peft(tmp_path / "a", {"block.attention.value": (down, up * 3)}, alpha=2)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    weight[:, 32:] += (up * 3 @ down).T
    wanted = write_model(tmp_path / "wanted.onnx", attention_net(weight, per_column))
    x = {"x": np.random.default_rng(7).standard_normal((1, 5, 16)).astype(np.float32)}
    (start,), (found,), (exact,) = (run(path, x) for path in (base, tmp_path / "merged.onnx", wanted))
    noise = 0.02 if per_column else 0.1  # One scale for all: q and k are rounded anew with v.
    assert np.linalg.norm(found - exact) < noise * np.linalg.norm(exact - start)


def test_fused_attention_with_a_measured_range_is_refused(tmp_path: Path) -> None:
    model = attention_net(np.eye(16, 48, dtype=np.float32), per_column=False)
    node = model.graph.node[1]
    node.input[3] = "w_scale"
    base = write_model(tmp_path / "base.onnx", model)
    adapter = write_peft(tmp_path / "a", {"block.attention.value": factors(16, 16, 6)}, alpha=2)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert caught.value.codes == ("LF441",)
