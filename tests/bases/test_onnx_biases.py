"""Biases that a graph lacks and gets: what is added is all that is added, and onnxruntime computes W·x + b."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import loraformat
from builders import write_peft, write_tensors
from graphs import Array, Net, dyadic, function, run, stored_weights, torchscript_name, write_data_by_hand, write_model
from loraformat.errors import LoraformatError
from loraformat.receipt import Receipt

RNG = np.random.default_rng(8)
FC = "model.fc"
NAME = torchscript_name(FC, "MatMul")
WEIGHT, BIAS = dyadic(RNG, 6, 32), dyadic(RNG, 6)
KERNEL = dyadic(RNG, 6, 2, 2, 3)
X = dyadic(RNG, 3, 32)
PICTURES = dyadic(RNG, 2, 4, 5, 7)
MICROSOFT = {"domain": "com.microsoft"}
Builder = Callable[[Net], None]


def write_bias(folder: Path, biases: Mapping[str, Array], weights: Mapping[str, Array] | None = None) -> Path:
    """Write an adapter with biases, and weights, that were saved whole."""
    adapter = write_peft(folder, {}, r=4, modules_to_save=[name.rpartition(".")[2] for name in biases])
    saved = {f"base_model.model.{name}.bias": values for name, values in biases.items()}
    saved |= {f"base_model.model.{name}.weight": values for name, values in (weights or {}).items()}
    write_tensors(adapter / "adapter_model.safetensors", saved)
    return adapter


def strip(merged: Path, receipt: Receipt) -> onnx.GraphProto:
    """Return the merged graph without what the receipt says was added, edited by the onnx package alone."""
    model = onnx.load(str(merged))
    names = {weight.name.rpartition(":")[2] for weight in receipt.weights if weight.added}
    _strip_graph(model.graph, names)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in names]
    assert len(model.graph.initializer) == len(kept) + len(names)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model.graph


def _strip_graph(graph: onnx.GraphProto, names: set[str]) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip_graph(attribute.g, names)
        if node.op_type == "Add" and node.input[1] in names:
            assert nodes[-1].output[0] == node.input[0], "it stands directly behind"
            nodes[-1].output[0] = node.output[0]
            continue
        if node.input and node.input[-1] in names:
            node.input.pop()
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def check(base: Path, adapter: Path, output: Path, expected: Array, feeds: Mapping[str, Array], **more: Any) -> Receipt:
    """Merge, and check the numbers, the graph to the byte, and what `verify` says of both."""
    receipt = loraformat.merge(base, [adapter], output, new_biases=True, **more)
    np.testing.assert_allclose(run(output, feeds)[0], expected, rtol=0, atol=1e-5)
    onnx.checker.check_model(str(output))
    before = onnx.load(str(base)).graph
    for node in before.node:
        while node.input[-1:] == [""]:
            node.input.pop()
    assert strip(output, receipt).SerializeToString() == before.SerializeToString()
    found = loraformat.verify(output, base, [adapter], run=True, sizes={"x_1": feeds["x"].shape[1]})
    assert found.holds, [str(problem) for problem in found.problems]
    assert all(each.added and each.added in str(receipt.problems) for each in receipt.weights)
    return receipt


def gemm(net: Net, **more: Any) -> None:
    net.op("Gemm", [net.feed("x"), net.weight(f"{FC}.weight", WEIGHT)], net.result("y"), NAME, transB=1, **more)


def gemm_with_an_empty_input(net: Net) -> None:
    net.op("Gemm", [net.feed("x"), net.weight(f"{FC}.weight", WEIGHT), ""], net.result("y"), NAME, transB=1)


def matmul(net: Net) -> None:
    net.op("MatMul", [net.feed("x"), net.weight("val_7", WEIGHT.T)], net.result("y"), NAME)


def matmul_whose_result_is_read(net: Net) -> None:
    """The value is a result of the graph, read twice, and the name that would be given to it is taken."""
    y = net.op("MatMul", [net.feed("x"), net.weight("val_7", WEIGHT.T)], net.result("y"), NAME)
    net.op("Relu", [y], net.result("y_without_bias"))


def fused_matmul(net: Net) -> None:
    inputs = [net.feed("x"), net.weight(f"{FC}.weight", WEIGHT)]
    net.op("FusedMatMul", inputs, net.result("y"), NAME, transB=1, alpha=0.5, **MICROSOFT)


def fused_gemm(net: Net) -> None:
    inputs = [net.feed("x"), net.weight(f"{FC}.weight", WEIGHT)]
    net.op("FusedGemm", inputs, net.result("y"), NAME, transB=1, activation="Relu", **MICROSOFT)


def four_bits(net: Net) -> None:
    codes = net.weight(f"{FC}.weight_Q4", RNG.integers(0, 256, (6, 2, 8), np.uint8))
    inputs = [net.feed("x"), codes, net.weight("scales", np.full(12, 0.125, np.float32))]
    net.op("MatMulNBits", inputs, net.result("y"), f"{NAME}_Q4", K=32, N=6, bits=4, block_size=16, **MICROSOFT)


def whole_numbers(net: Net) -> None:
    """Dynamic quantisation: the bias goes behind the scale of the product."""
    codes = net.weight(f"{FC}.weight_quantized", RNG.integers(-9, 10, (32, 6), np.int8))
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", [net.feed("x")], ["q", "s", "z"], name="/q"))
    zero, scale = net.weight("zero", np.int8([0])), net.weight("scale", np.float32([0.125]))
    net.op("MatMulInteger", ["q", codes, "z", zero], "whole", f"{NAME}_quant")
    net.op("Cast", ["whole"], "wide", f"{NAME}_cast", to=TensorProto.FLOAT)
    net.op("Mul", ["wide", net.op("Mul", ["s", scale], "both", f"{NAME}_scales")], net.result("y"), f"{NAME}_mul")


PRODUCTS: Mapping[str, Builder] = {
    "Gemm": gemm,
    "Gemm whose bias is empty": gemm_with_an_empty_input,
    "Gemm that halves its bias": lambda net: gemm(net, beta=0.5),
    "MatMul": matmul,
    "MatMul of a result": matmul_whose_result_is_read,
    "FusedMatMul": fused_matmul,
    "MatMulNBits": four_bits,
    "MatMulInteger": whole_numbers,
}


@pytest.mark.parametrize("form", PRODUCTS)
@pytest.mark.parametrize("files", ["", "one"])
def test_a_product(tmp_path: Path, form: str, files: str) -> None:
    net = Net()
    PRODUCTS[form](net)
    base = write_model(tmp_path / "base.onnx", net.model(check=False), files)
    adapter = write_bias(tmp_path / "a", {FC: BIAS})
    receipt = check(base, adapter, tmp_path / "out.onnx", run(base, {"x": X})[0] + BIAS, {"x": X})
    assert stored_weights(tmp_path / "out.onnx")[f"{FC}.bias"].tolist() == BIAS.tolist()
    (weight,) = receipt.weights
    assert weight.added.startswith("Gemm" if form in ("Gemm", "Gemm whose bias is empty") else "Add after")


def test_an_activation_comes_after_it(tmp_path: Path) -> None:
    net = Net()
    fused_gemm(net)
    base = write_model(tmp_path / "base.onnx", net.model(check=False))
    expected = np.maximum(X @ WEIGHT.T + BIAS, 0)
    check(base, write_bias(tmp_path / "a", {FC: BIAS}), tmp_path / "out.onnx", expected, {"x": X})


@pytest.mark.parametrize("form", [np.float32, np.float16])
def test_a_convolution_of_groups(tmp_path: Path, form: type[np.floating[Any]]) -> None:
    net, name = Net(), torchscript_name(FC, "Conv")
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(form))
    kernel = net.weight(f"{FC}.weight", KERNEL.astype(form))
    net.op("Conv", [net.feed("x", kind, rank=4), kernel], net.result("y", kind, rank=4), name, group=2)
    base, feeds = write_model(tmp_path / "base.onnx", net.model()), {"x": PICTURES.astype(form)}
    expected = run(base, feeds)[0] + BIAS.astype(form)[:, None, None]
    check(base, write_bias(tmp_path / "a", {FC: BIAS}), tmp_path / "out.onnx", expected, feeds)


def test_a_norm(tmp_path: Path) -> None:
    net, name = Net(), torchscript_name("model.norm", "LayerNormalization")
    net.op("LayerNormalization", [net.feed("x"), net.weight("model.norm.weight", X[0])], net.result("y"), name)
    base, bias = write_model(tmp_path / "base.onnx", net.model()), dyadic(RNG, 32)
    expected = run(base, {"x": X})[0] + bias
    check(base, write_bias(tmp_path / "a", {"model.norm": bias}), tmp_path / "out.onnx", expected, {"x": X})


def test_a_weight_and_its_bias_of_a_module_that_runs_twice(tmp_path: Path) -> None:
    """Both are saved; the weight changes too, and both calls read one bias."""
    net, new = Net(), dyadic(RNG, 6, 6)
    w = net.weight("val_7", dyadic(RNG, 6, 6))
    first = net.op("MatMul", [net.feed("x"), w], "h", NAME)
    net.op("MatMul", [first, w], net.result("y"), NAME.replace("MatMul", "MatMul_1"))
    base, feeds = write_model(tmp_path / "base.onnx", net.model()), {"x": X[:, :6]}
    adapter = write_bias(tmp_path / "a", {FC: BIAS}, {FC: new})
    loraformat.merge(base, [adapter], tmp_path / "out.onnx", new_biases=True)
    once = feeds["x"] @ new.T + BIAS
    np.testing.assert_allclose(run(tmp_path / "out.onnx", feeds)[0], once @ new.T + BIAS, rtol=1e-6)
    assert loraformat.verify(tmp_path / "out.onnx", base, [adapter], run=True, sizes={"x_1": 6}).holds
    again = loraformat.resolve_targets(tmp_path / "out.onnx", adapter)  # A later merge knows it by its name.
    assert {each.parameter: each.weight for each in again.targets} == {"weight": "val_7", "bias": f"{FC}.bias"}


def test_nodes_in_the_branch_of_an_if(tmp_path: Path) -> None:
    net, inner, other = Net(), Net(), Net()
    inner.op("MatMul", ["x", "val_7"], inner.result("inner"), NAME)
    other.op("Identity", ["x"], other.result("plain"))
    net.feed("x")
    net.weight("val_7", WEIGHT.T)
    branches = {"then_branch": inner.branch("then"), "else_branch": other.branch("else")}
    net.inputs.append(helper.make_tensor_value_info("which", TensorProto.BOOL, []))
    net.op("If", ["which"], net.result("y"), "/If", **branches)
    base, feeds = write_model(tmp_path / "base.onnx", net.model()), {"x": X, "which": np.array(True)}
    receipt = loraformat.merge(base, [write_bias(tmp_path / "a", {FC: BIAS})], tmp_path / "out.onnx", new_biases=True)
    np.testing.assert_allclose(run(tmp_path / "out.onnx", feeds)[0], X @ WEIGHT.T + BIAS, atol=1e-5)
    assert strip(tmp_path / "out.onnx", receipt).SerializeToString() == onnx.load(str(base)).graph.SerializeToString()
    assert loraformat.verify(tmp_path / "out.onnx", base, [tmp_path / "a"]).holds


def in_a_function(net: Net) -> None:
    body = [helper.make_node("MatMul", ["a", "w"], ["b"], name=NAME)]
    net.functions.append(function("Linear", ["a", "w"], ["b"], body))
    net.op("Linear", [net.feed("x"), net.weight("val_7", WEIGHT.T)], net.result("y"), NAME, domain="own")


def with_a_nameless_bias(net: Net) -> None:
    h = net.op("MatMul", [net.feed("x"), net.weight("val_7", WEIGHT.T)], "h", NAME)
    net.op("Add", [h, net.weight("val_8", dyadic(RNG, 6))], net.result("y"), "/other")


def with_a_nameless_bias_further_on(net: Net) -> None:
    h = net.op("MatMul", [net.feed("x"), net.weight("val_7", WEIGHT.T)], "h", NAME)
    shaped = net.op("Reshape", [h, net.weight("shape", np.array([-1, 2, 3]))], "shaped")
    net.op("Add", [shaped, net.weight("val_8", dyadic(RNG, 2, 3))], net.result("y", rank=3), "/other")


def as_the_left_factor(net: Net) -> None:
    net.op("MatMul", [net.weight(f"{FC}.weight", WEIGHT), net.feed("x")], net.result("y"), NAME)


def as_a_norm_of_products(net: Net) -> None:
    net.op("Mul", [net.feed("x"), net.weight(f"{FC}.weight", dyadic(RNG, 6))], net.result("y"), NAME)


REFUSED: Mapping[str, tuple[Builder, str]] = {
    "function": (in_a_function, "inline"),
    "nameless": (with_a_nameless_bias, "val_8"),
    "nameless, further on": (with_a_nameless_bias_further_on, "val_8"),
    "left": (as_the_left_factor, "X·W"),
    "norm": (as_a_norm_of_products, "Mul"),
}


@pytest.mark.parametrize("form", REFUSED)
@pytest.mark.parametrize("values", [BIAS, np.zeros_like(BIAS)], ids=["numbers", "zeros"])
def test_what_has_no_place_for_one(tmp_path: Path, form: str, values: Array) -> None:
    """Zeros too: a bias without a name may be the module's."""
    net, (build, said) = Net(), REFUSED[form]
    build(net)
    base, adapter = write_model(tmp_path / "base.onnx", net.model()), write_bias(tmp_path / "a", {FC: values})
    for wanted in (True, False):
        with pytest.raises(LoraformatError) as caught:
            loraformat.merge(base, [adapter], tmp_path / "out.onnx", new_biases=wanted)
        assert caught.value.codes == ("LF630",)
        assert said in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()
    with pytest.raises(LoraformatError, match="all left out on request"):
        loraformat.merge(base, [adapter], tmp_path / "out.onnx", allow_unmatched=["*.bias"], new_biases=True)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    net = Net()
    matmul(net)
    return write_model(tmp_path / "base.onnx", net.model(), "one")


def test_without_being_asked_it_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(plain, [write_bias(tmp_path / "a", {FC: BIAS})], tmp_path / "out.onnx")
    assert caught.value.codes == ("LF401",)
    assert "--new-biases" in caught.value.problems[0].advice


@pytest.mark.parametrize("wanted", [True, False])
def test_zeros_are_nothing(plain: Path, tmp_path: Path, wanted: bool) -> None:
    adapter = write_bias(tmp_path / "a", {FC: np.zeros_like(BIAS)}, {FC: WEIGHT * 2})
    receipt = loraformat.merge(plain, [adapter], tmp_path / "out.onnx", new_biases=wanted)
    assert [problem.code for problem in receipt.problems] == ["LF631"]
    assert [weight.name for weight in receipt.weights] == ["val_7"]
    before, after = (onnx.load(str(each), load_external_data=False).graph for each in (plain, tmp_path / "out.onnx"))
    assert list(before.node) == list(after.node)


def test_zeros_and_another_adapters_bias_do_not_go_together(plain: Path, tmp_path: Path) -> None:
    adapters = [write_bias(tmp_path / "a", {FC: np.zeros_like(BIAS)}), write_bias(tmp_path / "b", {FC: BIAS})]
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(plain, adapters, tmp_path / "out.onnx", new_biases=True)
    assert caught.value.codes == ("LF409",)


def test_a_bias_of_another_size(plain: Path, tmp_path: Path) -> None:
    adapter = write_bias(tmp_path / "a", {FC: dyadic(RNG, 5)}, {FC: WEIGHT})
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(plain, [adapter], tmp_path / "out.onnx", new_biases=True)
    assert caught.value.codes == ("LF405",)


def test_in_place_and_undo_files_are_refused(plain: Path, tmp_path: Path) -> None:
    adapter, before = write_bias(tmp_path / "a", {FC: BIAS}), plain.read_bytes()
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge_into(plain, [adapter], new_biases=True)
    assert caught.value.codes == ("LF620",)
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(plain, [adapter], tmp_path / "out.onnx", new_biases=True, keep_undo=True)
    assert caught.value.codes == ("LF622",)
    assert plain.read_bytes() == before


def test_a_model_that_shares_the_bases_data(plain: Path, tmp_path: Path) -> None:
    adapter = write_bias(tmp_path / "a", {FC: BIAS})
    loraformat.merge(plain, [adapter], tmp_path / "thin.onnx", new_biases=True, external_data="share")
    assert not (tmp_path / "thin.onnx.data").exists()
    np.testing.assert_allclose(run(tmp_path / "thin.onnx", {"x": X})[0], X @ WEIGHT.T + BIAS, atol=1e-5)
    assert loraformat.verify(tmp_path / "thin.onnx", plain, [adapter], run=True).holds


def test_each_adapter_its_own(plain: Path, tmp_path: Path) -> None:
    adapters = [write_bias(tmp_path / name, {FC: BIAS * scale}) for name, scale in (("a", 1), ("b", 2))]
    loraformat.merge_each(plain, adapters, tmp_path / "out", new_biases=True)
    for name, scale in (("a", 1), ("b", 2)):
        found = run(tmp_path / "out" / f"{name}.onnx", {"x": X})[0]
        np.testing.assert_allclose(found, X @ WEIGHT.T + BIAS * scale, atol=1e-5)


def test_every_graph_of_a_folder(tmp_path: Path) -> None:
    """One graph has the bias, the other was optimised; both get the new one."""
    folder, base = Net(), tmp_path / "base"
    matmul(folder)
    write_model(base / "model_optimized.onnx", folder.model(), "one")
    kept = Net()
    h = kept.op("MatMul", [kept.feed("x"), kept.weight("val_7", WEIGHT.T)], "h", NAME)
    bias = kept.weight(f"{FC}.bias", np.zeros_like(BIAS))
    kept.op("Add", [h, bias], kept.result("y"), NAME.replace("MatMul", "Add"))
    write_model(base / "model.onnx", kept.model())
    adapter = write_bias(tmp_path / "a", {FC: BIAS})
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "out")
    assert caught.value.codes == ("LF401",)
    receipt = loraformat.merge(base, [adapter], tmp_path / "out", new_biases=True)
    assert {each.name: bool(each.added) for each in receipt.weights} == {
        f"model.onnx:{FC}.bias": False,
        f"model_optimized.onnx:{FC}.bias": True,
    }
    for name in ("model.onnx", "model_optimized.onnx"):
        np.testing.assert_allclose(run(tmp_path / "out" / name, {"x": X})[0], X @ WEIGHT.T + BIAS, atol=1e-5)
    assert loraformat.verify(tmp_path / "out", base, [adapter], run=True).holds


def test_a_merged_model_with_another_node_is_no_proof(plain: Path, tmp_path: Path) -> None:
    """The proof is of every byte: a second Add, or one that reads another tensor, is found."""
    adapter, output = write_bias(tmp_path / "a", {FC: BIAS}), tmp_path / "out.onnx"
    loraformat.merge(plain, [adapter], output, new_biases=True)
    model = onnx.load(str(output), load_external_data=False)
    (total,) = (node for node in model.graph.node if node.op_type == "Add")
    total.op_type = "Sub"
    output.write_bytes(model.SerializeToString())
    assert not loraformat.verify(output, plain, [adapter]).holds


def test_the_plan_names_it(plain: Path, tmp_path: Path) -> None:
    plan = loraformat.plan_merge(plain, [write_bias(tmp_path / "a", {FC: BIAS})], new_biases=True)
    (weight,) = plan.as_json()["weights"]
    assert weight["new"]["added"] == f"Add after MatMul {NAME!r} (graph node 0)"
    assert list(weight["new"]["readers"]) == [f"MatMul {NAME!r} (graph node 0, input 1)"]
    assert [(problem.code, problem.found) for problem in plan.problems] == [("LF632", weight["new"]["added"])]


def test_graphs_that_share_a_data_file(tmp_path: Path) -> None:
    """Numbers of a bias stand in the graph's own file, so that the data file stays one that both read."""
    net = Net()
    matmul(net)
    names = ("model.onnx", "model_with_past.onnx")
    for name in names:
        write_data_by_hand(tmp_path / "base" / name, net.model(), {"val_7": ("weights.bin", 0)})
    data = (tmp_path / "base" / "weights.bin").read_bytes()
    adapter = write_bias(tmp_path / "a", {FC: BIAS})
    loraformat.merge(tmp_path / "base", [adapter], tmp_path / "out", new_biases=True)
    for name in names:
        np.testing.assert_allclose(run(tmp_path / "out" / name, {"x": X})[0], X @ WEIGHT.T + BIAS, atol=1e-5)
    assert (tmp_path / "out" / "weights.bin").read_bytes() == data
    assert loraformat.verify(tmp_path / "out", tmp_path / "base", [adapter]).holds


def test_a_gemm_between_codes(tmp_path: Path) -> None:
    """QDQ: a bias in floats, once the user accepts that the ranges were measured without it."""
    net = Net()
    scale, zero = net.weight("scale", np.float32(0.5)), net.weight("zero", np.int8(0))
    quantised = net.op("QuantizeLinear", [net.feed("x"), scale, zero], "xq", "/x/QuantizeLinear")
    x = net.op("DequantizeLinear", [quantised, scale, zero], "xf", "/x/DequantizeLinear")
    codes = net.weight(f"{FC}.weight_quantized", RNG.integers(-5, 6, (6, 32), np.int8))
    w = net.op("DequantizeLinear", [codes, scale, zero], f"{FC}.weight", "/w/DequantizeLinear")
    y = net.op("Gemm", [x, w], "h", NAME, transB=1)
    rounded = net.op("QuantizeLinear", [y, scale, zero], "yq", "/y/QuantizeLinear")
    net.op("DequantizeLinear", [rounded, scale, zero], net.result("y"), "/y/DequantizeLinear")
    base, adapter = write_model(tmp_path / "base.onnx", net.model()), write_bias(tmp_path / "a", {FC: BIAS})
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "out.onnx", new_biases=True)
    assert caught.value.codes == ("LF441",)
    loraformat.merge(base, [adapter], tmp_path / "out.onnx", new_biases=True, accept_ranges=True)
    steps = np.clip(np.rint(X / 0.5), -128, 127) @ (stored_weights(base)[f"{FC}.weight_quantized"].T / 4.0)
    expected = np.clip(np.rint((steps + BIAS) / 0.5), -128, 127) * 0.5
    assert np.abs(run(tmp_path / "out.onnx", {"x": X})[0] - expected).max() <= 0.5
