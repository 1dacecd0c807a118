"""Experts in one tensor: each is merged into its own matrix, the right way round, however the graph picks it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import loraformat
from builders import write_peft
from graphs import (
    Array,
    Net,
    dyadic,
    dyadic_factors,
    dynamo_scopes,
    merge_model,
    product,
    run,
    torchscript_name,
    write_model,
)
from loraformat.bases.onnx_graph import OnnxGraph

EXPERTS, WIDE, HIDDEN, RANK = 3, 10, 6, 2
"""Gate and up have 10 rows together, 5 each."""
MODULE = "model.layers.0.mlp.experts"
GATE_UP, DOWN = f"{MODULE}.gate_up_proj", f"{MODULE}.down_proj"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(31)


@pytest.fixture
def packed(rng: np.random.Generator) -> Array:
    return dyadic(rng, EXPERTS, WIDE, HIDDEN)


def at(op: str) -> str:
    return torchscript_name(MODULE, op)


# --- how a graph picks -----------------------------------------------------------------------------------------------


def _each_by_number(net: Net, packed: Array) -> None:
    """A loop that the exporter unrolled: each expert has nodes of its own."""
    net.weight(GATE_UP, packed)
    for expert in range(EXPERTS):
        number = f"number_{expert}"
        net.initializers.append(onnx.numpy_helper.from_array(np.array(expert - EXPERTS if expert else 0), number))
        picked = net.op("Gather", [GATE_UP, number], f"picked_{expert}", at(f"Gather_{expert}"))
        turned = net.op("Transpose", [picked], f"turned_{expert}", at(f"Transpose_{expert}"), perm=[1, 0])
        net.op("MatMul", ["x", turned], net.result(f"y{expert}"), at(f"MatMul_{expert}"))


def _each_by_slice(net: Net, packed: Array) -> None:
    net.weight(GATE_UP, packed)
    axis = net.weight("axis", np.array([0]))
    for expert in range(EXPERTS):
        ends = [net.weight(f"{end}_{expert}", np.array([expert + end])) for end in (0, 1)]
        piece = net.op("Slice", [GATE_UP, *ends, axis], f"piece_{expert}", at(f"Slice_{expert}"))
        picked = net.op("Squeeze", [piece, axis], f"picked_{expert}", at(f"Squeeze_{expert}"))
        net.op("Gemm", ["x", picked], net.result(f"y{expert}"), at(f"Gemm_{expert}"), transB=1)


def _batched(net: Net, picked: str) -> None:
    """Multiply a matrix for each token with the token; one result for each expert."""
    columns = net.op("Unsqueeze", ["x", net.weight("last", np.array([-1]))], "columns")
    products = net.op("MatMul", [picked, columns], "products", at("MatMul"))
    _part_tokens(net, net.op("Squeeze", [products, net.weight("two", np.array([2]))], "flat", at("Squeeze")))


def _part_tokens(net: Net, flat: str) -> None:
    for expert in range(EXPERTS):
        rows = net.weight(f"rows_{expert}", np.arange(2) + 2 * expert)
        net.op("Gather", [flat, rows], net.result(f"y{expert}"), f"/part/Gather_{expert}")


def _tokens(net: Net) -> str:
    return net.weight("experts_of_tokens", np.repeat(np.arange(EXPERTS), 2))


def _by_tokens(net: Net, packed: Array) -> None:
    _batched(net, net.op("Gather", [net.weight(GATE_UP, packed), _tokens(net)], "picked", at("Gather")))


def _by_tokens_nd(net: Net, packed: Array) -> None:
    """The newer exporter: transpositions that change nothing, and GatherND."""
    last = net.weight("minus", np.array([-1]))
    same = net.op("Transpose", [net.weight(GATE_UP, packed)], "same", at("Transpose"), perm=[0, 1, 2])
    indices = net.op("Unsqueeze", [_tokens(net), last], "indices")
    _batched(net, net.op("GatherND", [same, indices], "picked", at("GatherND")))


def _stored_turned(net: Net, packed: Array) -> None:
    """Experts `(in, out)`, as GPT-OSS has them."""
    picked = net.op("Gather", [net.weight(GATE_UP, packed.transpose(0, 2, 1)), _tokens(net)], "picked", at("Gather"))
    rows = net.op("Unsqueeze", ["x", net.weight("one", np.array([1]))], "lines")
    products = net.op("MatMul", [rows, picked], "products", at("MatMul"))
    _part_tokens(net, net.op("Squeeze", [products, "one"], "flat", at("Squeeze")))


def _turned_before(net: Net, packed: Array) -> None:
    stored = net.weight(GATE_UP, packed.transpose(0, 2, 1))
    turned = net.op("Transpose", [stored], "turned", at("Transpose"), perm=[0, 2, 1])
    _batched(net, net.op("Gather", [turned, _tokens(net)], "picked", at("Gather")))


def _all_at_once(net: Net, packed: Array) -> None:
    """A product in batches of all experts, with nothing picked."""
    stored = net.weight(GATE_UP, packed.transpose(0, 2, 1))
    shape = net.weight("shape", np.array([EXPERTS, 2, HIDDEN]))
    tokens = net.op("Reshape", ["x", shape], "tokens")
    products = net.op("MatMul", [tokens, stored], "products", at("MatMul"))
    flat = net.op("Reshape", [products, net.weight("flat_shape", np.array([EXPERTS * 2, WIDE]))], "flat")
    _part_tokens(net, flat)


PICKS: Mapping[str, Callable[[Net, Array], None]] = {
    "Gather of a number": _each_by_number,
    "Slice": _each_by_slice,
    "Gather of tokens": _by_tokens,
    "GatherND": _by_tokens_nd,
    "stored (in, out)": _stored_turned,
    "Transpose before the pick": _turned_before,
    "in batches": _all_at_once,
}


def check(found: list[Array], packed: Array, tokens: Array) -> None:
    """Check what each expert makes of its two tokens, or of all where each has nodes of its own."""
    for expert in range(EXPERTS):
        own = tokens @ packed[expert].T
        own = own[2 * expert : 2 * expert + 2] if len(found[expert]) == 2 else own
        np.testing.assert_allclose(found[expert], own, rtol=1e-6)


@pytest.mark.parametrize("case", PICKS)
def test_one_expert_changes_and_the_others_do_not(
    tmp_path: Path, packed: Array, rng: np.random.Generator, case: str
) -> None:
    net = Net()
    net.feed("x")
    PICKS[case](net, packed)
    factors = {f"{GATE_UP.replace('gate', '1.gate')}": dyadic_factors(rng, WIDE, HIDDEN, RANK)}
    x = dyadic(rng, 2 * EXPERTS, HIDDEN)
    expected = packed.astype(np.float64)
    check(run(net.model(), {"x": x}), expected, x)
    merged = merge_model(tmp_path, net.model(), factors, alpha=float(RANK))
    expected[1] += product(next(iter(factors.values())))
    check(run(merged, {"x": x}), expected, x)


# --- without names ---------------------------------------------------------------------------------------------------


def _chosen(rng: np.random.Generator, router: str, chosen_by: str = "TopK") -> Net:
    """Experts whose tensors and nodes have names that say nothing, chosen by a layer that has one."""
    net = Net()
    scores = net.op("Gemm", [net.feed("x"), net.weight(router, dyadic(rng, EXPERTS, HIDDEN))], "v0", "n0", transB=1)
    if chosen_by == "TopK":
        net.op("TopK", [scores, net.weight("c0", np.array([1]))], "v1", "n1")
        net.nodes[-1].output.append("chosen")
    else:
        net.op("ArgMax", [scores], "chosen", "n1", axis=1, keepdims=1)
    last = net.weight("c1", np.array([-1]))
    picked = net.op("GatherND", [net.weight("val_1", dyadic(rng, EXPERTS, WIDE, HIDDEN)), "chosen"], "v2", "n2")
    flat = net.op("MatMul", [picked, net.op("Unsqueeze", ["x", last], "v3", "n3")], "v4", "n4")
    net.op("Split", [net.op("Squeeze", [flat, last], "v5", "n5")], "gate", "n6", axis=-1, num_outputs=2)
    net.nodes[-1].output.append("up")
    inner = net.op("Unsqueeze", [net.op("Mul", ["gate", "up"], "v6", "n7"), last], "v7", "n8")
    picked = net.op("GatherND", [net.weight("val_2", dyadic(rng, EXPERTS, HIDDEN, WIDE // 2)), "chosen"], "v8", "n9")
    net.op("MatMul", [picked, inner], net.result("y", rank=3), "n10")
    return net


@pytest.mark.parametrize(
    ("router", "chosen_by", "found"),
    [
        ("model.layers.0.mlp.gate.weight", "TopK", True),
        ("model.layers.0.mlp.router.weight", "TopK", True),
        ("model.layers.0.mlp.proj.weight", "TopK", False),
        ("model.layers.0.mlp.gate.weight", "ArgMax", False),
        ("val_0", "TopK", False),
    ],
)
def test_the_router_has_a_name(
    tmp_path: Path, rng: np.random.Generator, router: str, chosen_by: str, found: bool
) -> None:
    net = _chosen(rng, router, chosen_by)
    base = OnnxGraph(write_model(tmp_path / "base.onnx", net.model()))
    stored = {s.module: s.weight.name for s in base.sites if s.weight is not None and s.module.startswith(MODULE)}
    wanted = {f"{MODULE}.{expert}.gate_up_proj": "val_1" for expert in range(EXPERTS)}
    wanted |= {f"{MODULE}.{expert}.down_proj": "val_2" for expert in range(EXPERTS)}
    assert {name: stored.get(name) for name in wanted} == (wanted if found else dict.fromkeys(wanted))


# --- gate and up -----------------------------------------------------------------------------------------------------


def _divide(net: Net, flat: str, how: str) -> None:
    """Divide the products into gate and up."""
    if how == "Split":
        net.op("Split", [flat], "gate", at("Split"), axis=-1, num_outputs=2)
        net.nodes[-1].output.append("up")
    else:
        step, end = net.weight("step", np.array([2])), net.weight("end", np.array([WIDE]))
        axis = net.weight("minus_one", np.array([-1]))
        for name, start in (("gate", 0), ("up", 1)):
            ends = [net.weight(f"start_{name}", np.array([start])), end]
            net.op("Slice", [flat, *ends, axis, step], name, at(f"Slice_{name}"))
    for name in ("gate", "up"):
        net.op("Identity", [name], net.result(f"out.{name}"))


@pytest.mark.parametrize(("how", "rows"), [("Split", slice(5, 10)), ("Slice", slice(1, 10, 2))])
@pytest.mark.parametrize("spelling", ["mlp.experts.2.up_proj", "block_sparse_moe.experts.2.w3"])
def test_up_alone_has_its_rows(
    tmp_path: Path, packed: Array, rng: np.random.Generator, how: str, rows: slice, spelling: str
) -> None:
    """What divides the product says which rows are gate's and which up's."""
    net = Net()
    net.feed("x")
    picked = net.op("Gather", [net.weight(GATE_UP, packed), _tokens(net)], "picked", at("Gather"))
    columns = net.op("Unsqueeze", ["x", net.weight("last", np.array([-1]))], "columns")
    products = net.op("MatMul", [picked, columns], "products", at("MatMul"))
    flat = net.op("Squeeze", [products, "last"], "flat", at("Squeeze"))
    _divide(net, flat, how)
    factors = dyadic_factors(rng, 5, HIDDEN, RANK)
    merged = merge_model(tmp_path, net.model(), {f"model.layers.0.{spelling}": factors}, alpha=float(RANK))
    expected = packed.astype(np.float64)
    expected[2, rows] += product(factors)
    (stored,) = [tensor for tensor in onnx.load(str(merged)).graph.initializer if tensor.name == GATE_UP]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored), expected)


def test_what_nothing_divides_is_offered_whole_alone(tmp_path: Path, packed: Array, rng: np.random.Generator) -> None:
    net = Net()
    net.feed("x")
    _by_tokens(net, packed)
    with pytest.raises(loraformat.FindingError) as caught:
        merge_model(tmp_path, net.model(), {f"{MODULE}.0.gate_proj": dyadic_factors(rng, 5, HIDDEN, RANK)})
    assert caught.value.codes == ("LF401",)


# --- names -----------------------------------------------------------------------------------------------------------


def _nameless(first: Array, second: Array) -> Net:
    """Two tensors without names, as optimisation leaves them: only the scopes tell the module."""
    net = Net()
    net.feed("x")
    net.feed("h")
    tokens = net.feed("experts", TensorProto.INT64, 1)
    for place, (source, stored) in enumerate((("x", first), ("h", second))):
        notes = dynamo_scopes(MODULE, f"index_{place}")
        picked = net.op("Gather", [net.weight(f"val_{place}", stored), tokens], f"picked_{place}", "", notes)
        columns = net.op("Unsqueeze", [source, net.weight(f"last_{place}", np.array([-1]))], f"columns_{place}")
        net.op("MatMul", [picked, columns], net.result(f"y{place}", rank=3), f"node_bmm_{place}", notes)
    return net


def test_the_shapes_of_a_gated_mixture_tell_which_is_which(
    tmp_path: Path, packed: Array, rng: np.random.Generator
) -> None:
    down = dyadic(rng, EXPERTS, HIDDEN, WIDE // 2)
    net = _nameless(down, packed)
    factors = {
        f"{MODULE}.1.gate_up_proj": dyadic_factors(rng, WIDE, HIDDEN, RANK),
        f"{MODULE}.0.down_proj": dyadic_factors(rng, HIDDEN, WIDE // 2, RANK),
    }
    merged = merge_model(tmp_path, net.model(), factors, alpha=float(RANK))
    wide, narrow = packed.astype(np.float64), down.astype(np.float64)
    wide[1] += product(factors[f"{MODULE}.1.gate_up_proj"])
    narrow[0] += product(factors[f"{MODULE}.0.down_proj"])
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(merged)).graph.initializer}
    np.testing.assert_array_equal(stored["val_1"], wide)
    np.testing.assert_array_equal(stored["val_0"], narrow)


def test_other_shapes_tell_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    net = _nameless(dyadic(rng, EXPERTS, 5, HIDDEN), dyadic(rng, EXPERTS, HIDDEN, 5))
    with pytest.raises(loraformat.FindingError) as caught:
        merge_model(tmp_path, net.model(), {f"{MODULE}.0.down_proj": dyadic_factors(rng, HIDDEN, 5, RANK)})
    assert caught.value.codes == ("LF401",)


def test_two_modules_that_share_one_tensor_part(tmp_path: Path, packed: Array, rng: np.random.Generator) -> None:
    """Exporters store equal tensors once: the node says whose expert it is, and the other module keeps its own."""
    net = Net()
    net.feed("x")
    _by_tokens(net, packed)
    other = torchscript_name("model.layers.1.mlp.experts", "Gather")
    net.op("Gather", [GATE_UP, "experts_of_tokens"], "other", other)
    net.op("MatMul", ["other", "columns"], net.result("z", rank=3), other.replace("Gather", "MatMul"))
    factors = {f"{MODULE}.{expert}.gate_up_proj": dyadic_factors(rng, WIDE, HIDDEN, RANK) for expert in (0, 2)}
    x = dyadic(rng, 2 * EXPERTS, HIDDEN)
    before = run(net.model(), {"x": x})
    found = run(merge_model(tmp_path, net.model(), factors, alpha=float(RANK)), {"x": x})
    expected = packed.astype(np.float64)
    for expert in (0, 2):
        expected[expert] += product(factors[f"{MODULE}.{expert}.gate_up_proj"])
    check(found, expected, x)
    np.testing.assert_array_equal(found[-1], before[-1])


def test_what_resolve_prints_of_experts_is_a_map(tmp_path: Path, packed: Array, rng: np.random.Generator) -> None:
    net = Net()
    net.feed("x")
    _stored_turned(net, packed)
    base = write_model(tmp_path / "base.onnx", net.model())
    factors = {f"{MODULE}.{expert}.gate_up_proj": dyadic_factors(rng, WIDE, HIDDEN, RANK) for expert in (0, 2)}
    adapter = write_peft(tmp_path / "adapter", factors)
    found = loraformat.resolve_targets(base, adapter)
    assert [(each.expert, each.rows, each.weight) for each in found.targets] == [
        (expert, (0, WIDE), GATE_UP) for expert in (0, 2)
    ]
    (tmp_path / "map.json").write_text(json.dumps(found.as_json()))
    loraformat.merge(base, [adapter], tmp_path / "a.onnx")
    loraformat.merge(base, [adapter], tmp_path / "b.onnx", map=tmp_path / "map.json")
    one, other = (onnx.load(str(tmp_path / f"{name}.onnx")).graph.initializer for name in "ab")
    assert [tensor.raw_data for tensor in one] == [tensor.raw_data for tensor in other]
    text = json.dumps({"targets": [each.as_json() | {"expert": "first"} for each in found.targets]})
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "c.onnx", map=tmp_path / "map.json")
    assert caught.value.codes == ("LF422",)


# --- the operator MoE ------------------------------------------------------------------------------------------------

HALF = WIDE // 2


def mixture(first: Array, second: Array, name: str = "model.layers.0.moe", **attributes: object) -> onnx.ModelProto:
    net = Net()
    inputs = [net.feed("x"), net.feed("router"), net.weight(f"{name}.experts.gate_up_proj.weight", first), ""]
    inputs += [net.weight(f"{name}.experts.down_proj.weight", second), ""]
    node = torchscript_name(name, "MoE")
    net.op("MoE", inputs, net.result("y"), node, domain="com.microsoft", k=1, **attributes)
    model = net.model(check=False)
    model.producer_name = "onnxruntime-genai"
    return model


def interleave(packed: Array) -> Array:
    return np.stack([packed[:, :HALF], packed[:, HALF:]], axis=2).reshape(packed.shape)


def swiglu(packed: Array, down: Array, x: Array, chosen: Array, *, added: float) -> Array:
    """Return what experts compute, gate's rows before up's: `down (gate sigmoid(gate) (up + added))`."""
    products = np.einsum("toi,ti->to", packed[chosen], x)
    gate, up = products[:, :HALF], products[:, HALF:]
    return np.asarray(np.einsum("toi,ti->to", down[chosen], gate / (1 + np.exp(-gate)) * (up + added)))


@pytest.mark.parametrize("added", [0.0, 1.0])
def test_the_operator_s_turns_are_the_builder_s_or_the_model_s(
    tmp_path: Path, packed: Array, rng: np.random.Generator, added: float
) -> None:
    """GPT-OSS, whose activation adds one to up, has gate and up in turns itself; the builder gives others turns."""
    down = dyadic(rng, EXPERTS, HIDDEN, HALF)
    swiglu_attributes = {"activation_alpha": 1.0, "activation_beta": added, "swiglu_fusion": 1}
    model = mixture(
        interleave(packed), down, activation_type="swiglu", normalize_routing_weights=1, **swiglu_attributes
    )
    factors = {
        "model.layers.0.mlp.experts.1.gate_up_proj": dyadic_factors(rng, WIDE, HIDDEN, RANK),
        "model.layers.0.mlp.experts.0.down_proj": dyadic_factors(rng, HIDDEN, HALF, RANK),
        "model.layers.0.mlp.experts.2.up_proj": dyadic_factors(rng, HALF, HIDDEN, RANK),
    }
    chosen = np.repeat(np.arange(EXPERTS), 2)
    feeds = {"x": dyadic(rng, 6, HIDDEN), "router": np.eye(EXPERTS, dtype=np.float32)[chosen]}
    plain = swiglu(packed, down, feeds["x"], chosen, added=added)
    np.testing.assert_allclose(run(model, feeds)[0], plain, rtol=1e-4, atol=1e-4)
    merged = merge_model(tmp_path, model, factors, alpha=float(RANK))
    wide, narrow = packed.astype(np.float64), down.astype(np.float64)
    delta = product(factors["model.layers.0.mlp.experts.1.gate_up_proj"])
    wide[1] += np.concatenate([delta[::2], delta[1::2]]) if added else delta
    wide[2, HALF:] += product(factors["model.layers.0.mlp.experts.2.up_proj"])
    narrow[0] += product(factors["model.layers.0.mlp.experts.0.down_proj"])
    expected = swiglu(wide, narrow, feeds["x"], chosen, added=added)
    np.testing.assert_allclose(run(merged, feeds)[0], expected, rtol=1e-4, atol=1e-4)


def test_square_experts_of_an_operator_that_changed_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    """onnxruntime before 1.23 had `(experts, in, out)`: of a square, nothing tells."""
    model = mixture(dyadic(rng, EXPERTS, HIDDEN, HIDDEN), dyadic(rng, EXPERTS, HIDDEN, HIDDEN), activation_type="relu")
    with pytest.raises(loraformat.FindingError) as caught:
        merge_model(tmp_path, model, {"model.layers.0.mlp.experts.0.down_proj": dyadic_factors(rng, HIDDEN, HIDDEN, 2)})
    assert caught.value.codes == ("LF447",)


def test_oblong_experts_of_either_layout_fit_one_reading(tmp_path: Path, rng: np.random.Generator) -> None:
    down = dyadic(rng, EXPERTS, HIDDEN, HALF)
    model = mixture(dyadic(rng, EXPERTS, HALF, HIDDEN), down, activation_type="relu")
    factors = dyadic_factors(rng, HIDDEN, HALF, RANK)
    merged = merge_model(tmp_path, model, {"model.layers.0.mlp.experts.0.down_proj": factors}, alpha=float(RANK))
    expected = down.astype(np.float64)
    expected[0] += product(factors)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(onnx.load(str(merged)).graph.initializer[1]), expected)


def test_a_scale_that_the_builder_multiplied_in_is_refused(
    tmp_path: Path, packed: Array, rng: np.random.Generator
) -> None:
    """Gemma 4: each expert's down has a scale, which the builder folds into it."""
    model = mixture(packed, dyadic(rng, EXPERTS, HIDDEN, HALF), activation_type="geglu", swiglu_fusion=1)
    with pytest.raises(loraformat.FindingError) as caught:
        merge_model(tmp_path, model, {"model.layers.0.mlp.experts.0.down_proj": dyadic_factors(rng, HIDDEN, HALF, 2)})
    assert caught.value.codes == ("LF407",)


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ({}, "LF440"),
        ({"quant_type": "nvfp4"}, "LF403"),
        ({"expert_weight_bits": 2}, "LF403"),
        ({"weights_prepacked": 1}, "LF447"),
        ({"block_size": 4}, "LF403"),
    ],
    ids=str,
)
def test_experts_in_codes_are_refused_by_name(
    tmp_path: Path, rng: np.random.Generator, attributes: dict[str, object], code: str
) -> None:
    """QMoE, with names of the builder for Phi-3.5: the operator says which weight is which."""
    net = Net()
    names = [f"model.layers.0.moe.weight_{number}" for number in (1, 2, 3)]
    codes = [net.weight(name, rng.integers(0, 255, (EXPERTS, HIDDEN, HALF)).astype(np.uint8)) for name in names]
    scales = [net.weight(name.replace("weight", "scales"), dyadic(rng, EXPERTS, HIDDEN)) for name in names]
    inputs = [net.feed("x"), net.feed("router")]
    for coded, scale in zip(codes, scales, strict=True):
        inputs += [coded, scale, ""]
    net.op("QMoE", inputs, net.result("y"), "/model/layers.0/moe", domain="com.microsoft", k=1, **attributes)
    columns = HALF if code == "LF403" and "block_size" not in attributes else WIDE
    for name in ("w1", "w2", "w3"):
        model = net.model(check=False)
        model.producer_name = "onnxruntime-genai"
        target = f"model.layers.0.block_sparse_moe.experts.1.{name}"
        with pytest.raises(loraformat.FindingError) as caught:
            merge_model(tmp_path, model, {target: dyadic_factors(rng, HIDDEN, columns, 2)})
        assert caught.value.codes == (code,)
