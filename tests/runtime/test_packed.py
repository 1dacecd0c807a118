"""Modules that share a node, and modules whose tensor others share: each has its own columns, or its own node."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import loraformat
from graphs import Array, Net, dyadic, dyadic_factors, make_adapter, make_target, product, run, write_model
from loraformat import runtime
from loraformat.adapter import Adapter, SlotKind

HEADS, GROUPS, SIZE, IN = 4, 2, 8, 6
COLUMNS = {"q_proj": HEADS * SIZE, "k_proj": GROUPS * SIZE, "v_proj": GROUPS * SIZE}
STARTS = {"q_proj": 0, "k_proj": HEADS * SIZE, "v_proj": (HEADS + GROUPS) * SIZE}
LAYER = "model.layers.0"


def write_built(path: Path, weight: Array, *, bits: bool = False) -> Path:
    """Write a layer as onnxruntime-genai's builder does: q, k and v in one product, which the attention takes apart."""
    net, name = Net(), f"/{LAYER.replace('.layers.', '/layers.')}/attn/qkv_proj/MatMul"
    x = net.feed("x", rank=3)
    if bits:
        scales = np.full(weight.shape[1], 0.125, np.float32)
        codes = (weight.T / 0.125 + 8).astype(np.uint8).reshape(weight.shape[1], 1, -1)
        packed = np.pad(codes, ((0, 0), (0, 0), (0, 16 - IN)), constant_values=8)
        packed = packed[..., ::2] | packed[..., 1::2] << 4
        more = {"K": IN, "N": weight.shape[1], "bits": 4, "block_size": 16, "domain": "com.microsoft"}
        inputs = [x, net.weight("w_Q4", packed), net.weight("w_scales", scales)]
        net.op("MatMulNBits", inputs, "qkv", f"{name}_Q4", **more)
    else:
        net.op("MatMul", [x, net.weight(f"{LAYER}.attn.qkv_proj.MatMul.weight", weight)], "qkv", name)
    past = [net.feed(f"past_{name}", rank=4) for name in ("key", "value")]
    lengths = [net.feed("lengths", TensorProto.INT32, 1), net.feed("total", TensorProto.INT32, 1)]
    results = [net.result("y", rank=3), net.result("key", rank=4), net.result("value", rank=4)]
    sizes = {"num_heads": HEADS, "kv_num_heads": GROUPS}
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        ["qkv", "", "", *past, *lengths],
        results,
        name=f"/{LAYER}/attn",
        domain="com.microsoft",
        **sizes,
    )
    net.nodes.append(node)
    model = net.model(check=False)
    model.producer_name = "onnxruntime-genai"
    return write_model(path, model)


def feeds() -> dict[str, Array]:
    past = np.zeros((2, GROUPS, 0, SIZE), np.float32)
    numbers = {"lengths": np.array([2, 2], np.int32), "total": np.array([3], np.int32)}
    return {"x": dyadic(np.random.default_rng(1), 2, 3, IN), "past_key": past, "past_value": past, **numbers}


def adapter(seed: int, **ranks: int) -> Adapter:
    rng = np.random.default_rng(seed)
    factors = {name: dyadic_factors(rng, COLUMNS[name], IN, rank) for name, rank in ranks.items()}
    return make_adapter(*(make_target(f"{LAYER}.self_attn.{n}", each, scale=0.5) for n, each in factors.items()))


def change(adapters: list[Adapter]) -> Array:
    """Return what adapters add to the packed weight `(in, q + k + v)`."""
    whole = np.zeros((IN, sum(COLUMNS.values())))
    for target in (target for each in adapters for target in each.targets):
        name = target.name.rpartition(".")[2]
        down, up = (target.factors[role].read() for role in ("lora_A.weight", "lora_B.weight"))
        whole[:, STARTS[name] : STARTS[name] + COLUMNS[name]] += product((down, up), target.scale).T
    return whole


@pytest.mark.parametrize("bits", [False, True])
def test_packed_modules_have_one_pair_of_inputs_and_their_own_columns(tmp_path: Path, bits: bool) -> None:
    weight = dyadic(np.random.default_rng(2), IN, sum(COLUMNS.values()), reach=7)
    base, model = write_built(tmp_path / "base.onnx", weight, bits=bits), tmp_path / "base.lora.onnx"
    one, other = adapter(3, q_proj=2, v_proj=3), adapter(4, k_proj=1)
    done = runtime.export_runtime(base, [one, other], model)
    assert [(each.name, each.out) for each in done.inputs.layouts] == [(f"{LAYER}.attn.qkv_proj", 64)]
    for found, before in zip(run(model, feeds()), run(base, feeds()), strict=True):
        np.testing.assert_array_equal(found, before)
    for chosen in ([one], [other], [one, other]):
        arrays = runtime.adapter_feeds(model, chosen)
        assert len(arrays) == 2
        changed = write_built(tmp_path / "changed.onnx", (weight + change(chosen)).astype(np.float32))
        for found, wanted in zip(run(model, feeds() | arrays), run(changed, feeds()), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def write_fused(path: Path, weight: Array, **attributes: Any) -> Path:
    """Write a layer as onnxruntime's optimiser does: product, bias and attention in one, q, k and v of two sizes."""
    net = Net()
    bias = net.weight("qkv_bias", dyadic(np.random.default_rng(8), 56))
    inputs = [net.feed("x", rank=3), net.weight("qkv_weight", weight), bias, net.feed("mask", TensorProto.INT32)]
    output = net.result("/model/layers.0/self/Reshape_3_output_0", rank=3)
    own = {"domain": "com.microsoft", "num_heads": 2, "qkv_hidden_sizes": [16, 16, 24]}
    net.op("Attention", inputs, output, "Attention_0", **own, **attributes)
    return write_model(path, net.model(check=False))


FUSED = {"query": (0, 16), "key": (16, 32), "value": (32, 56)}


def test_a_fused_attention_is_taken_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    weight = dyadic(rng, IN, 56)
    base, model = write_fused(tmp_path / "base.onnx", weight), tmp_path / "base.lora.onnx"
    factors = {name: dyadic_factors(rng, stop - start, IN, 2) for name, (start, stop) in FUSED.items()}
    targets = (make_target(f"model.layers.0.self.{name}", factors[name], scale=0.25) for name in ("query", "value"))
    chosen = make_adapter(*targets)
    done = runtime.export_runtime(base, [chosen], model)
    assert [(each.name, each.out) for each in done.inputs.layouts] == [("model.layers.0.self.qkv_proj", 56)]
    for name, (start, stop) in FUSED.items():
        assert done.inputs.layouts[0].members[f"model.layers.0.self.{name}"] == (start, stop)
    mask = np.array([[1, 1, 1], [1, 1, 0]], np.int32)
    given = {"x": dyadic(rng, 2, 3, IN), "mask": mask}
    np.testing.assert_allclose(run(model, given)[0], run(base, given)[0], rtol=0, atol=1e-6)
    changed = weight.astype(np.float64)
    for name in ("query", "value"):
        changed[:, slice(*FUSED[name])] += product(factors[name], 0.25).T
    wanted = run(write_fused(tmp_path / "changed.onnx", changed.astype(np.float32)), given)[0]
    (found,) = run(model, given | runtime.adapter_feeds(model, [chosen]))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert np.abs(found - run(base, given)[0]).max() > 0.1


def test_an_attention_that_turns_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    base = write_fused(tmp_path / "base.onnx", dyadic(rng, IN, 56), do_rotary=1)
    chosen = make_adapter(make_target("model.layers.0.self.key", dyadic_factors(rng, 16, IN, 2)))
    with pytest.raises(loraformat.FindingError) as caught:
        runtime.export_runtime(base, [chosen], tmp_path / "m.onnx")
    assert [(each.code, "do_rotary" in each.found) for each in caught.value.problems] == [("LF820", True)]


def test_slots_for_packed_modules(tmp_path: Path) -> None:
    """What slots put after the product hides from later adapters how it is divided: the model remembers."""
    weight = dyadic(np.random.default_rng(2), IN, sum(COLUMNS.values()), reach=7)
    base, model = write_built(tmp_path / "base.onnx", weight), tmp_path / "batched.onnx"
    one, other = adapter(3, q_proj=2, v_proj=3), adapter(4, k_proj=1)
    runtime.export_runtime(base, [one], model, batched=2)
    stack = runtime.adapter_feeds(model, [one, other])
    found = run(model, feeds() | stack | {runtime.ADAPTER_INDEX: np.array([1, 0])})
    for row, chosen in ((0, other), (1, one)):
        changed = write_built(tmp_path / "changed.onnx", (weight + change([chosen])).astype(np.float32))
        for values, wanted in zip(found, run(changed, feeds()), strict=True):
            np.testing.assert_allclose(values[row], wanted[row], rtol=0, atol=1e-4)


def test_a_tensor_that_other_modules_read_is_no_obstacle(tmp_path: Path) -> None:
    """Exporters store equal tensors once, and tied ones too: a branch stands beside one node only."""
    rng, net = np.random.default_rng(5), Net()
    table = net.weight("model.embed.weight", dyadic(rng, 9, IN))
    rows = net.op("Gather", [table, net.feed("ids", TensorProto.INT64)], "rows", "/model/embed/Gather")
    turned = net.op("Transpose", [table], "turned", "/head/Transpose", perm=[1, 0])
    net.op("MatMul", [rows, turned], net.result("y", rank=3), "/head/MatMul")
    base, model = write_model(tmp_path / "base.onnx", net.model()), tmp_path / "base.lora.onnx"
    head, embed = dyadic_factors(rng, 9, IN, 2), (dyadic(rng, 3, 9), dyadic(rng, IN, 3))
    ids, weight = np.array([[1, 2, 8]]), onnx.numpy_helper.to_array(onnx.load(base).graph.initializer[0])
    only = make_adapter(make_target("head", head))
    both = make_adapter(*only.targets, make_target("model.embed", embed, SlotKind.EMBEDDING))
    runtime.export_runtime(base, [both], model)
    for chosen, table_change in ((only, 0), (both, product(embed).T)):
        (found,) = run(model, {"ids": ids} | runtime.adapter_feeds(model, [chosen]))
        wanted = (weight + table_change)[ids] @ (weight + product(head)).T
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
