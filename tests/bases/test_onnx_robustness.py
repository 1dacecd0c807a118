"""What models in the wild are like: named without a folder, larger than they look, with operators that nobody knows."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import loraformat
from builders import write_peft
from graphs import Net, dyadic, dyadic_factors, linear_net, merge_model, product, run, torchscript_name, write_model

SHAPES = {"model.a": (7, 5), "model.b": (6, 4)}
FAR = (2 << 30) + 4096 + 3
"""An offset that no 32-bit number holds, and no multiple of four."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(41)


@pytest.mark.parametrize("files", ["", "one", "many"])
def test_a_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, files: str) -> None:
    """Data files are beside the model, wherever that is, when it is named without its folder."""
    weights = {name: dyadic(rng, 40, 8) for name in SHAPES}
    (tmp_path / "here").mkdir()
    write_model(tmp_path / "here" / "base.onnx", linear_net(weights).model(), files)
    factors = dyadic_factors(rng, 40, 8, 2)
    write_peft(tmp_path / "adapter", {"model.a": factors}, alpha=2.0)
    monkeypatch.chdir(tmp_path / "here")
    loraformat.merge("base.onnx", ["../adapter"], "merged.onnx")
    feeds = {f"in.{name}": dyadic(rng, 2, 8) for name in SHAPES}
    found = run(tmp_path / "here" / "merged.onnx", feeds)
    np.testing.assert_allclose(found[0], feeds["in.model.a"] @ (weights["model.a"] + product(factors)).T, rtol=1e-6)
    np.testing.assert_allclose(found[1], feeds["in.model.b"] @ weights["model.b"].T, rtol=1e-6)
    assert loraformat.verify("merged.onnx", "base.onnx", ["../adapter"]).holds


@pytest.mark.parametrize("inside", [False, True])
def test_two_tensors_of_one_name_are_refused(tmp_path: Path, rng: np.random.Generator, inside: bool) -> None:
    net = Net()
    net.feed("x")
    inner = Net() if inside else net
    for _ in range(2):
        inner.weight("w", dyadic(rng, 5, 7))
    inner.op("MatMul", ["x", "w"], inner.result("z" if inside else "y"), torchscript_name("model.a", "MatMul"))
    if inside:
        other = Net()
        other.op("Identity", ["x"], other.result("z_else"))
        branches = {"then_branch": inner.branch("then"), "else_branch": other.branch("else")}
        net.op("If", [net.feed("flag", TensorProto.BOOL, 0)], net.result("y"), "/If", **branches)
    with pytest.raises(loraformat.LoraformatError) as caught:
        merge_model(tmp_path, net.model(check=False), {"model.a": dyadic_factors(rng, 7, 5, 2)})
    assert caught.value.codes == ("LF118",)


def test_operators_that_nobody_knows_are_copied_untouched(tmp_path: Path, rng: np.random.Generator) -> None:
    """Another domain, attributes of every kind, a graph inside: the bytes of the nodes are those of the base."""
    weight = dyadic(rng, 7, 5)
    net = Net()
    inner = Net()
    inner.op("Strange", ["x", inner.weight("s", dyadic(rng, 3))], inner.result("z"), "/s/Strange", domain="acme.lab")
    net.op(
        "Unheard",
        [net.feed("x"), net.weight("u", dyadic(rng, 5))],
        "h",
        "/model/u/Unheard",
        domain="acme.lab",
        body=inner.branch("body"),
        table=helper.make_tensor("t", TensorProto.FLOAT, [2], [1.0, 2.0]),
        words=["a", "b"],
        number=3,
    )
    net.op("MatMul", ["h", net.weight("w", weight.T)], net.result("y"), torchscript_name("model.a", "MatMul"))
    model = net.model(check=False)
    factors = dyadic_factors(rng, 7, 5, 2)
    merged = onnx.load(str(merge_model(tmp_path, model, {"model.a": factors}, alpha=2.0)))
    assert [node.SerializeToString() for node in merged.graph.node] == [
        node.SerializeToString() for node in onnx.load(str(tmp_path / "base.onnx")).graph.node
    ]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in merged.graph.initializer}
    np.testing.assert_array_equal(stored["w"], (weight + product(factors)).T)
    np.testing.assert_array_equal(stored["u"], onnx.numpy_helper.to_array(model.graph.initializer[0]))


def test_a_weight_that_only_such_an_operator_reads_is_no_target(tmp_path: Path, rng: np.random.Generator) -> None:
    net = Net()
    name = torchscript_name("model.a", "Unheard")
    net.op(
        "Unheard",
        [net.feed("x"), net.weight("model.a.weight", dyadic(rng, 7, 5))],
        net.result("y"),
        name,
        domain="acme.lab",
    )
    with pytest.raises(loraformat.FindingError) as caught:
        merge_model(tmp_path, net.model(check=False), {"model.a": dyadic_factors(rng, 7, 5, 2)})
    assert caught.value.codes == ("LF401",)


def test_numbers_beyond_two_gigabytes_of_a_data_file(tmp_path: Path, rng: np.random.Generator) -> None:
    """A sparse file; the thin merge reads and writes what it touches, and no more."""
    weight = dyadic(rng, 7, 5)
    model = linear_net({"model.a": weight}).model()
    (tensor,) = model.graph.initializer
    data = tmp_path / "base.onnx.data"
    with data.open("wb") as sink:
        sink.truncate(FAR)
        sink.seek(FAR)
        sink.write(tensor.raw_data)
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", data.name), ("offset", str(FAR)), ("length", str(size))):
        tensor.external_data.add(key=key, value=text)
    base = tmp_path / "base.onnx"
    base.write_bytes(model.SerializeToString())
    factors = dyadic_factors(rng, 7, 5, 2)
    adapter = write_peft(tmp_path / "adapter", {"model.a": factors}, alpha=2.0)
    merged = tmp_path / "merged.onnx"
    loraformat.merge(base, [adapter], merged, external_data="share")
    x = dyadic(rng, 3, 5)
    np.testing.assert_allclose(run(merged, {"in.model.a": x})[0], x @ (weight + product(factors)).T, rtol=1e-6)
    assert os.stat(f"{merged}.data").st_size == size
    before = run(base, {"in.model.a": x})[0]
    np.testing.assert_allclose(before, x @ weight.T, rtol=1e-6)
