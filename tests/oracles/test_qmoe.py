"""Experts in codes of onnxruntime's operator QMoE, merged and run by its kernel for processors.

Codes, scales and zero points are made by the functions behind `MatMulNBitsQuantizer`, as onnxruntime-genai's builder
makes them; what experts compute is told by numpy.
"""

import json
from collections.abc import Mapping, Sequence
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
_state = pytest.importorskip("onnxruntime.capi._pybind_state")
if not hasattr(_state, "quantize_matmul_8bits"):
    pytest.skip("this onnxruntime has no quantiser for 8 bits", allow_module_level=True)

Array = NDArray[Any]
EXPERTS, HIDDEN, INNER, BLOCK = 3, 64, 32, 32
MODULE = "model.layers.0.mlp.experts"
BUILT = "model.layers.0.moe.experts"
TARGETS = {
    "1.gate_up_proj": (2 * INNER, HIDDEN),
    "2.up_proj": (INNER, HIDDEN),
    "0.down_proj": (HIDDEN, INNER),
}
CHOSEN = np.repeat(np.arange(EXPERTS), 2)
X = np.random.default_rng(5).standard_normal((len(CHOSEN), HIDDEN)).astype(np.float32)
ROUTER = np.where(np.eye(EXPERTS, dtype=bool)[CHOSEN], 8, -8).astype(np.float32)


def _quantise(weight: Array, bits: int, *, symmetric: bool, whole: bool) -> list[Array]:
    """Return codes, scales and zero points of `(out, in)`, in blocks of a row, or with one scale for a row."""
    rows, columns = weight.shape
    block = columns if whole else BLOCK
    blocks = columns // block
    codes, scales = np.zeros((rows, blocks, block * bits // 8), np.uint8), np.zeros((rows, blocks), np.float32)
    zeros = np.zeros((rows, -(-blocks * bits // 8)), np.uint8)
    quantise = {4: _state.quantize_matmul_4bits, 8: _state.quantize_matmul_8bits}[bits]
    quantise(codes, np.ascontiguousarray(weight.T), scales, zeros, block, rows, columns, symmetric)
    made = [codes.reshape(rows, -1), scales, zeros]
    return [made[0], made[1][:, 0], made[2][:, 0]] if whole else made


def _take_turns(gate_up: Array) -> Array:
    return np.stack([gate_up[:, :INNER], gate_up[:, INNER:]], axis=2).reshape(gate_up.shape)


def _make(path: Path, weights: Sequence[Array], bits: int, **options: Any) -> Path:
    """Write a QMoE of gate and up in turns, and down, named as the builder does."""
    symmetric, whole = options.pop("symmetric", True), options.pop("whole", False)
    held = {}
    for name, weight in zip(("gate_up_proj", "down_proj"), (_take_turns(weights[0]), weights[1]), strict=True):
        parts = zip(*(_quantise(each, bits, symmetric=symmetric, whole=whole) for each in weight), strict=True)
        for part, arrays in zip(("qweight", "scales", "zero_points"), parts, strict=True):
            held[f"{BUILT}.{name}.{part}"] = np.stack(arrays)
    inputs = ["x", "router"]
    for name in ("gate_up_proj", "down_proj"):
        inputs += [f"{BUILT}.{name}.qweight", f"{BUILT}.{name}.scales", ""]
    if symmetric:
        held = {name: array for name, array in held.items() if not name.endswith("zero_points")}
    else:
        inputs += ["", "", "", *(f"{BUILT}.{name}.zero_points" for name in ("gate_up_proj", "down_proj"))]
    attributes = {"activation_type": "swiglu", "activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_fusion": 1}
    sizes = {
        "k": 1,
        "expert_weight_bits": bits,
        "normalize_routing_weights": 1,
        **({} if whole else {"block_size": BLOCK}),
    }
    node = helper.make_node(
        "QMoE", inputs, ["y"], "/model/layers.0/moe/QMoE", domain="com.microsoft", **attributes, **sizes, **options
    )
    value = helper.make_tensor_value_info
    ends = [value("x", TensorProto.FLOAT, ["n", HIDDEN]), value("router", TensorProto.FLOAT, ["n", EXPERTS])]
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph([node], "g", ends, [value("y", TensorProto.FLOAT, ["n", HIDDEN])], tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, producer_name="onnxruntime-genai", opset_imports=opsets, ir_version=10), path)
    return path


def _run(path: Path) -> Array:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X, "router": ROUTER})[0], np.float64)


def _tell(weights: Sequence[Array]) -> Array:
    """Return what experts compute: `down (gate sigmoid(gate) up)`."""
    products = np.einsum("toi,ti->to", weights[0][CHOSEN].astype(np.float64), X)
    gate, up = products[:, :INNER], products[:, INNER:]
    return np.asarray(np.einsum("toi,ti->to", weights[1][CHOSEN], gate / (1 + np.exp(-gate)) * up))


@pytest.fixture(scope="module")
def weights() -> tuple[Array, Array]:
    rng = np.random.default_rng(7)
    shapes = ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))
    first, second = (rng.standard_normal(shape).astype(np.float32) / 8 for shape in shapes)
    return first, second


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, weights: tuple[Array, Array]) -> tuple[Path, tuple[Array, Array]]:
    """Return an adapter of some experts, and the weights with it merged."""
    rng, factors = np.random.default_rng(8), {}
    merged = (weights[0].copy(), weights[1].copy())
    places = {"1.gate_up_proj": merged[0][1], "2.up_proj": merged[0][2, INNER:], "0.down_proj": merged[1][0]}
    for target, (rows, columns) in TARGETS.items():
        down, up = rng.standard_normal((2, columns)) * 0.2, rng.standard_normal((rows, 2)) * 0.1
        factors[f"{MODULE}.{target}"] = (down.astype(np.float32), up.astype(np.float32))
        places[target] += (up @ down).astype(np.float32)
    folder = tmp_path_factory.mktemp("qmoe") / "adapter"
    return write_peft(folder, factors, r=2, alpha=2), merged


def _write_checkpoint(folder: Path, weights: Sequence[Array], form: str) -> Path:
    arrays: Mapping[str, Array] = {f"{MODULE}.gate_up_proj": weights[0], f"{MODULE}.down_proj": weights[1]}
    if form == "apart":
        names = {"gate_proj": weights[0][:, :INNER], "up_proj": weights[0][:, INNER:], "down_proj": weights[1]}
        arrays = {f"{MODULE}.{n}.{k}.weight": w[n].copy() for k, w in names.items() for n in range(EXPERTS)}
    folder.mkdir()
    write_tensors(folder / "model.safetensors", dict(arrays))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    return folder


def _apart(one: Array, other: Array) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def _check_run(found: Any) -> None:
    """QMoE rounds its factors; MoE, which is run apart, has the floats of the same codes."""
    assert found.holds
    (run,) = found.runs
    assert run.effect > 0.1
    assert abs(run.kept - 1) < 0.05


@pytest.mark.parametrize(
    "options",
    [{}, {"weights_prepacked": 0}, {"symmetric": False}, {"whole": True}, {"whole": True, "symmetric": False}],
    ids=str,
)
def test_experts_of_8_bits(tmp_path: Path, weights: tuple[Array, Array], adapted: Any, options: dict[str, Any]) -> None:
    base = _make(tmp_path / "base.onnx", weights, 8, **options)
    usual = _apart(_run(base), _tell(weights))
    adapter, merged = adapted
    receipt = loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert all(weight.retained > 0.99 for weight in receipt.weights)
    effect = _apart(_tell(weights), _tell(merged))
    assert _apart(_run(tmp_path / "merged.onnx"), _tell(merged)) <= 1.25 * usual + 1e-3 < effect / 5
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (base, tmp_path / "merged.onnx")
    )
    for name, expert in (("down_proj", 1), ("down_proj", 2), ("gate_up_proj", 0)):
        for part in ("qweight", "scales"):
            key = f"{BUILT}.{name}.{part}"
            np.testing.assert_array_equal(before[key][expert], after[key][expert])
    own = after[f"{BUILT}.gate_up_proj.qweight"][2]
    np.testing.assert_array_equal(own[::2], before[f"{BUILT}.gate_up_proj.qweight"][2][::2])  # Gate is not adapted.
    _check_run(loraformat.verify(tmp_path / "merged.onnx", base, [adapter], run=True))


@pytest.mark.parametrize("form", ["packed", "apart"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_experts_of_4_bits_from_the_checkpoint(
    tmp_path: Path, weights: tuple[Array, Array], adapted: Any, form: str, symmetric: bool
) -> None:
    base = _make(tmp_path / "base.onnx", weights, 4, symmetric=symmetric)
    checkpoint = _write_checkpoint(tmp_path / "checkpoint", weights, form)
    adapter, merged = adapted
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    afresh = _make(tmp_path / "afresh.onnx", merged, 4, symmetric=symmetric)
    found, wanted = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (tmp_path / "merged.onnx", afresh)
    )
    for name, array in wanted.items():
        if array.dtype == np.uint8:
            assert (found[name] == array).mean() > 0.999, name
        else:
            np.testing.assert_allclose(found[name], array, rtol=1e-6)
    assert _apart(_run(tmp_path / "merged.onnx"), _run(afresh)) < 1e-2
    found = loraformat.verify(tmp_path / "merged.onnx", base, [adapter], base_checkpoint=checkpoint, run=True)
    _check_run(found)
    assert found.runs[0].difference < 1e-5  # The noise of rounding is computed apart as well.


@pytest.mark.parametrize("prepacked", [-1, 1])
def test_codes_that_may_be_laid_out_for_cuda_are_refused(
    tmp_path: Path, weights: tuple[Array, Array], adapted: Any, prepacked: int
) -> None:
    """With scales of float16 the operator's default may mean either layout."""
    model = onnx.load(_make(tmp_path / "base.onnx", weights, 8, weights_prepacked=prepacked))
    for tensor in model.graph.initializer:
        if tensor.name.endswith("scales"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    onnx.save(model, tmp_path / "half.onnx")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(tmp_path / "half.onnx", [adapted[0]], tmp_path / "merged.onnx")
    assert set(caught.value.codes) == {"LF447"}


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"whole": True}], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_floats_of_all_experts_in_the_place_of_codes(
    tmp_path: Path, weights: tuple[Array, Array], adapted: Any, bits: int, options: dict[str, Any]
) -> None:
    """What MoE then computes is told by numpy, of the floats that stand in the file."""
    base, merged = _make(tmp_path / "base.onnx", weights, bits, **options), tmp_path / "merged.onnx"
    adapter, exact = adapted
    receipt = loraformat.merge(base, [adapter], merged, on_quantized="dequantize")
    assert sum(bool(weight.targets) for weight in receipt.weights) == 2
    model = onnx.load(merged)
    onnx.checker.check_model(model)
    (node,) = model.graph.node
    assert (node.op_type, node.domain) == ("MoE", "com.microsoft")
    held = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    assert set(held) == {f"{BUILT}.gate_up_proj.weight", f"{BUILT}.down_proj.weight"}
    turns, down = held[f"{BUILT}.gate_up_proj.weight"], held[f"{BUILT}.down_proj.weight"]
    whole = np.concatenate([turns[:, ::2], turns[:, 1::2]], axis=1)
    for found, wanted, before in ((whole, exact[0], weights[0]), (down, exact[1], weights[1])):
        noise = _decode(base, found is down) - before
        np.testing.assert_allclose(found, wanted + noise, atol=1e-6)
    assert _apart(_run(merged), _tell((whole, down))) < 1e-5
    found = loraformat.verify(merged, base, [adapter], run=True)
    assert found.holds
    assert found.runs[0].difference < 1e-4 * found.runs[0].effect


def _decode(path: Path, is_down: bool) -> Array:
    """Return what the codes of gate and up, or of down, stand for."""
    graph = onnx.load(path).graph
    held = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    bits = next(each.i for each in graph.node[0].attribute if each.name == "expert_weight_bits")
    name = f"{BUILT}.{'down' if is_down else 'gate_up'}_proj"
    codes, scales = held[f"{name}.qweight"], held[f"{name}.scales"]

    def unpack(array: Array) -> Array:
        return array if bits == 8 else np.stack([array & 15, array >> 4], axis=-1).reshape(*array.shape[:-1], -1)

    codes, scales = unpack(codes).astype(np.float64), scales.reshape(*codes.shape[:2], -1).astype(np.float64)
    size = codes.shape[2] // scales.shape[2]
    zeros: Any = 1 << (bits - 1)
    if f"{name}.zero_points" in held:
        stored = held[f"{name}.zero_points"]
        apart = stored.reshape(*scales.shape[:2], 1) & 15 if scales.shape[2] == 1 and bits == 4 else unpack(stored)
        zeros = np.repeat(apart[..., : scales.shape[2]].astype(np.float64), size, axis=2)
    values = (codes - zeros) * np.repeat(scales, size, axis=2)
    return values if is_down else np.concatenate([values[:, ::2], values[:, 1::2]], axis=1)


def test_what_moe_does_not_read_keeps_its_codes(tmp_path: Path, weights: tuple[Array, Array], adapted: Any) -> None:
    """Weights of the router apart from its scores, and codes that may be laid out for CUDA's kernels."""
    model = onnx.load(_make(tmp_path / "base.onnx", weights, 4))
    node = model.graph.node[0]
    node.input.extend(["" for _ in range(14 - len(node.input))] + ["router"])
    onnx.save(model, tmp_path / "weighed.onnx")
    _make(tmp_path / "packed.onnx", weights, 4, weights_prepacked=1)
    for name, why in (("weighed", "router_weights"), ("packed", "CUDA")):
        with pytest.raises(loraformat.LoraformatError, match=why) as caught:
            loraformat.merge(
                tmp_path / f"{name}.onnx", [adapted[0]], tmp_path / "merged.onnx", on_quantized="dequantize"
            )
        assert set(caught.value.codes) <= {"LF619", "LF447"}
