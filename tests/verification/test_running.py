"""Merged models beside their bases with the change computed apart, by onnxruntime; wrong models are found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

import loraformat
from builders import write_peft, write_tensors
from graphs import Net, dyadic, linear_net, torchscript_name, write_model

MODULE = "model.layers.1.fc"
NAME = torchscript_name(MODULE, "MatMul")
SIZES = {"in.model.a_1": 16, "in.model.b_1": 32, f"in.{MODULE}_1": 16}

HEAD: tuple[tuple[str, *tuple[int, ...]], ...] = (("weight", 7, 8), ("bias", 7))
"""Parameters of a head and their shapes."""


def factors(rng: np.random.Generator, out: int, inner: int) -> Any:
    return rng.standard_normal((3, inner)).astype(np.float32), rng.standard_normal((out, 3)).astype(np.float32)


def check(folder: Path, model: onnx.ModelProto, pairs: Any, files: str = "") -> Any:
    base = write_model(folder / "base.onnx", model, files)
    adapter = write_peft(folder / "adapter", pairs)
    loraformat.merge(base, [adapter], folder / "merged.onnx")
    return loraformat.verify(folder / "merged.onnx", base, [adapter], run=True, sizes=SIZES)


def _right(net: Net, weight: Any) -> None:
    net.op("MatMul", [net.feed("x"), net.weight("w", weight.T)], net.result("y"), NAME)


def _left(net: Net, weight: Any) -> None:
    net.op("MatMul", [net.weight(f"{MODULE}.weight", weight), net.feed("x")], net.result("y"), NAME)


def _turned(net: Net, weight: Any) -> None:
    turned = net.op("Transpose", [net.weight("w", weight)], "t", perm=[1, 0])
    net.op("MatMul", [net.feed("x"), turned], net.result("y"), NAME)


def _gemm(net: Net, weight: Any) -> None:
    bias = net.weight(f"{MODULE}.bias", dyadic(np.random.default_rng(1), weight.shape[0]))
    net.op("Gemm", [net.feed("x"), net.weight("w", weight), bias], net.result("y"), NAME, transB=1, alpha=0.5)


def _cast(net: Net, weight: Any) -> None:
    wide = net.op("Cast", [net.weight("w", weight.T.astype(ml_dtypes.bfloat16))], "wide", to=TensorProto.FLOAT)
    net.op("MatMul", [net.feed("x"), wide], net.result("y"), NAME)


@pytest.mark.parametrize("make", [_right, _left, _turned, _gemm, _cast], ids=lambda make: make.__name__)
def test_every_way_to_apply_a_matrix(tmp_path: Path, make: Callable[[Net, Any], None]) -> None:
    rng, net = np.random.default_rng(2), Net()
    make(net, dyadic(rng, 7, 8))
    found = check(tmp_path, net.model(), {MODULE: factors(rng, 7, 8)})
    assert found.holds
    (run,) = found.runs
    assert run.effect > 0.1
    assert run.difference < 1e-2 * run.effect


@pytest.mark.parametrize("files", ["", "one", "many"])
def test_wherever_the_weights_are(tmp_path: Path, files: str) -> None:
    rng = np.random.default_rng(3)
    weights = {"model.a": dyadic(rng, 24, 16), "model.b": dyadic(rng, 40, 32)}
    found = check(tmp_path, linear_net(weights).model(), {"model.a": factors(rng, 24, 16)}, files)
    assert found.holds
    assert [run.effect > 0 for run in found.runs] == [True, False]
    assert found.as_json()["runs"][0]["output"] == "out.model.a"


def test_a_model_of_half_floats(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    model = linear_net({MODULE: dyadic(rng, 24, 16).astype(np.float16)}).model()
    found = check(tmp_path, model, {MODULE: factors(rng, 24, 16)})
    assert found.holds
    assert found.runs[0].difference < 0.01 * found.runs[0].effect


def test_another_model_computes_something_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    weights = {MODULE: dyadic(rng, 24, 16)}
    check(tmp_path, linear_net(weights).model(), {MODULE: factors(rng, 24, 16)})
    merged = onnx.load(tmp_path / "merged.onnx")
    (tensor,) = merged.graph.initializer
    values = np.frombuffer(tensor.raw_data, np.float32)
    base = onnx.numpy_helper.to_array(onnx.load(tmp_path / "base.onnx").graph.initializer[0]).reshape(-1)
    tensor.raw_data = (base + 1.5 * (values - base)).astype(np.float32).tobytes()
    onnx.save(merged, tmp_path / "merged.onnx")
    found = loraformat.verify(
        tmp_path / "merged.onnx", tmp_path / "base.onnx", [tmp_path / "adapter"], run=True, sizes=SIZES
    )
    assert "LF445" in {problem.code for problem in found.problems}
    assert found.runs[0].kept == pytest.approx(1.5, rel=1e-4)


def test_what_cannot_be_computed_apart_is_named(tmp_path: Path) -> None:
    """A weight inside a branch is merged and proven byte by byte, but not run apart."""
    rng, net = np.random.default_rng(6), Net()
    branches = []
    for name, weight in (("then", dyadic(rng, 7, 8)), ("other", dyadic(rng, 7, 8))):
        inner = Net()
        module = f"{MODULE}.{name}"
        inner.op(
            "MatMul",
            ["x", inner.weight(f"w_{name}", weight.T)],
            inner.result(f"y_{name}"),
            torchscript_name(module, "MatMul"),
        )
        branches.append(inner.branch(name))
    net.feed("x")
    flag = net.weight("flag", np.array(True))
    net.op("If", [flag], net.result("y"), "If", then_branch=branches[0], else_branch=branches[1])
    found = check(tmp_path, net.model(), {f"{MODULE}.then": factors(rng, 7, 8)})
    assert {(problem.code, problem.where) for problem in found.problems} == {("LF446", "w_then")}


@pytest.mark.parametrize("form", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_saved_parameters_that_no_product_reads(tmp_path: Path, form: Any) -> None:
    """A new head: its weight and its bias, which one Add reads, take the place of the base's."""
    rng, net = np.random.default_rng(6), Net()
    product = net.op("MatMul", [net.feed("x"), net.weight("w", dyadic(rng, 8, 7).astype(np.float32))], "product", NAME)
    bias = net.weight(f"{MODULE}.bias", dyadic(rng, 7).astype(form))
    wide = bias if form is np.float32 else net.op("Cast", [bias], "wide", to=TensorProto.FLOAT)
    net.op("Add", [wide, product], net.result("y"), torchscript_name(MODULE, "Add"))
    base = write_model(tmp_path / "base.onnx", net.model())
    adapter = write_peft(tmp_path / "adapter", {}, modules_to_save=["fc"], r=4)
    saved = {f"base_model.model.{MODULE}.{name}": dyadic(rng, *shape) for name, *shape in HEAD}
    write_tensors(adapter / "adapter_model.safetensors", saved)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    found = loraformat.verify(tmp_path / "merged.onnx", base, [adapter], run=True)
    assert not found.problems
    assert found.runs[0].kept == pytest.approx(1, abs=1e-5)
    assert found.runs[0].effect > 0.1


def test_a_bias_that_differs_is_found(tmp_path: Path) -> None:
    """Which shows that the other side is computed from the adapter, not from the merged model."""
    test_saved_parameters_that_no_product_reads(tmp_path, np.float32)
    path = tmp_path / "merged.onnx"
    model = onnx.load(path)
    bias = next(each for each in model.graph.initializer if each.name == f"{MODULE}.bias")
    bias.raw_data = (onnx.numpy_helper.to_array(bias) * 3).tobytes()
    onnx.save(model, path)
    found = loraformat.verify(path, tmp_path / "base.onnx", [tmp_path / "adapter"], run=True)
    assert "LF445" in {problem.code for problem in found.problems}


def _pictures(tmp_path: Path, kernel: int) -> Any:
    """A convolution that needs pictures of more than 8 by 8, whose sizes no name tells."""
    rng, net = np.random.default_rng(8), Net()
    weight = net.weight(f"{MODULE}.weight", dyadic(rng, 5, 3, kernel, kernel))
    net.op("Conv", [net.feed("x", rank=4), weight], net.result("y", rank=4), torchscript_name(MODULE, "Conv"))
    small = dyadic(rng, 2, 3, kernel, kernel), dyadic(rng, 5, 2, 1, 1)
    base = write_model(tmp_path / "base.onnx", net.model())
    adapter = write_peft(tmp_path / "adapter", {MODULE: small})
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    return loraformat.verify(tmp_path / "merged.onnx", base, [adapter], run=True, sizes={"x_1": 3})


def test_inputs_are_made_larger_where_a_model_needs_it(tmp_path: Path) -> None:
    found = _pictures(tmp_path, 20)
    assert not found.problems
    assert found.runs[0].effect > 0


def test_sounds_are_longer_than_pictures_are_wide(tmp_path: Path) -> None:
    rng, net = np.random.default_rng(12), Net()
    weight = net.weight(f"{MODULE}.weight", dyadic(rng, 5, 1, 400))
    net.op("Unsqueeze", [net.feed("x"), net.weight("axis", np.array([1]))], "sound")
    net.op("Conv", ["sound", weight], net.result("y", rank=3), torchscript_name(MODULE, "Conv"))
    small = dyadic(rng, 2, 1, 400), dyadic(rng, 5, 2, 1)
    assert not check(tmp_path, net.model(), {MODULE: small}).problems


def test_what_runs_on_no_size_tells_how_to_give_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(loraformat.LoraformatError) as caught:
        _pictures(tmp_path, 230)
    assert caught.value.codes == ("LF446",)
    assert "--size" in str(caught.value)
    assert "The dimensions are: x_0, x_1, x_2, x_3." in str(caught.value)
    assert capfd.readouterr().err == ""


def test_outputs_with_infinities_are_compared_in_what_is_finite(tmp_path: Path) -> None:
    rng, net = np.random.default_rng(9), Net()
    made = net.op("MatMul", [net.feed("x"), net.weight("w", dyadic(rng, 8, 7))], "made", NAME)
    net.op("Log", [made], net.result("y"))
    found = check(tmp_path, net.model(), {MODULE: factors(rng, 7, 8)})
    assert not found.problems
    assert found.runs[0].effect > 0


def test_inputs_of_texts_and_of_sequences(tmp_path: Path) -> None:
    rng, net = np.random.default_rng(10), Net()
    net.op("Identity", [net.feed("words", TensorProto.STRING)], net.result("same", TensorProto.STRING))
    net.op("MatMul", [net.feed("x"), net.weight("w", dyadic(rng, 8, 7))], net.result("y"), NAME)
    assert not check(tmp_path, net.model(), {MODULE: factors(rng, 7, 8)}).problems
    net.inputs.append(onnx.helper.make_tensor_sequence_value_info("many", TensorProto.FLOAT, None))
    net.op("SequenceLength", ["many"], net.result("length", TensorProto.INT64, 0))
    with pytest.raises(loraformat.LoraformatError, match="seq"):
        check(tmp_path / "sequence", net.model(), {MODULE: factors(rng, 7, 8)})


def test_an_input_beyond_all_memory_is_not_made(tmp_path: Path) -> None:
    rng, net = np.random.default_rng(11), Net()
    net.op("MatMul", [net.feed("x"), net.weight("w", dyadic(rng, 8, 7))], net.result("y"), NAME)
    net.op("Identity", [net.feed("huge", rank=1)], net.result("z", rank=1))
    net.inputs[-1].type.tensor_type.shape.dim[0].dim_value = 1 << 50
    with pytest.raises(loraformat.LoraformatError, match="1125899906842624"):
        check(tmp_path, net.model(), {MODULE: factors(rng, 7, 8)})


def test_a_checkpoint_cannot_be_run(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(7)
    save_file({f"{MODULE}.weight": dyadic(rng, 24, 16)}, tmp_path / "base.safetensors")
    adapter = write_peft(tmp_path / "adapter", {MODULE: factors(rng, 24, 16)})
    loraformat.merge(tmp_path / "base.safetensors", [adapter], tmp_path / "merged.safetensors")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.verify(tmp_path / "merged.safetensors", tmp_path / "base.safetensors", [adapter], run=True)
    assert caught.value.codes == ("LF446",)
