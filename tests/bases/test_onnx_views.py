"""Weights that are given another shape on their way to the operator: merged in place where the order of numbers stays.

The check is onnxruntime on the merged model against a forward pass in numpy from the module's own weight.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import loraformat
from builders import write_peft
from graphs import Array, Net, dyadic, dyadic_factors, merge_model, product, run, torchscript_name, write_model

MODULE = "model.layers.1.fc"
OUT, IN, RANK = 7, 5, 2
INTS = np.int64


def reshape(net: Net, value: str, *sizes: int) -> str:
    return net.op("Reshape", [value, net.weight(f"{value}_to", np.array(sizes, INTS))], f"{value}_r")


def squeeze(net: Net, value: str, *axes: int) -> str:
    inputs = [value, net.constant(f"{value}_axes", np.array(axes, INTS))] if axes else [value]
    return net.op("Squeeze", inputs, f"{value}_s")


def flatten(net: Net, value: str, axis: int) -> str:
    return net.op("Flatten", [value], f"{value}_f", axis=axis)


def turn(net: Net, value: str) -> str:
    return net.op("Transpose", [value], f"{value}_t", perm=[1, 0])


WAYS: dict[str, tuple[Callable[[Array], Array], Callable[[Net, str], str]]] = {
    "kernel squeezed": (lambda w: w.reshape(OUT, IN, 1, 1), lambda n, v: turn(n, squeeze(n, v, 2, -1))),
    "all ones squeezed": (lambda w: w.T.reshape(1, IN, 1, OUT), squeeze),
    "reshaped, 0 and -1": (lambda w: w.T.reshape(IN, OUT, 1, 1), lambda n, v: reshape(n, v, 0, -1)),
    "flattened": (lambda w: w.reshape(OUT, 1, IN), lambda n, v: turn(n, flatten(n, v, 1))),
    "flattened behind a one": (lambda w: w.T.reshape(1, IN, OUT), lambda n, v: flatten(n, v, 2)),
    "from one dimension": (lambda w: w.T.reshape(-1), lambda n, v: reshape(n, v, IN, OUT)),
    "there and back": (
        lambda w: w.reshape(OUT, IN),
        lambda n, v: turn(n, squeeze(n, n.op("Unsqueeze", [v, n.weight("at", np.array([0, 3], INTS))], "u"))),
    ),
    "behind two turns": (lambda w: w.reshape(OUT, IN), lambda n, v: reshape(n, turn(n, turn(n, turn(n, v))), IN, OUT)),
}
TURNED = "behind two turns"
"""Three of them, and then a shape: the numbers have another order there."""


def net_of(way: str, weight: Array) -> onnx.ModelProto:
    """Return y = x·Wᵀ with the weight stored and read in this way."""
    store, read = WAYS[way]
    net = Net()
    value = read(net, net.weight("w", store(weight)))
    net.op("MatMul", [net.feed("x"), value], net.result("y"), torchscript_name(MODULE, "MatMul"))
    return net.model()


@pytest.mark.parametrize("way", [way for way in WAYS if way != TURNED])
def test_a_matrix_in_another_shape(tmp_path: Path, way: str) -> None:
    rng = np.random.default_rng(31)
    weight, factors, x = dyadic(rng, OUT, IN), dyadic_factors(rng, OUT, IN, RANK), dyadic(rng, 3, IN)
    merged = merge_model(tmp_path, net_of(way, weight), {MODULE: factors}, alpha=float(RANK))
    np.testing.assert_allclose(run(merged, {"x": x})[0], x @ (weight + product(factors)).T, rtol=1e-6)
    (before, *_), (after, *_) = (onnx.load(tmp_path / f"{name}.onnx").graph.initializer for name in ("base", "merged"))
    assert before.dims == after.dims
    verdict = loraformat.verify(merged, tmp_path / "base.onnx", [tmp_path / "adapter"], run=True, sizes={"x_1": IN})
    assert not verdict.problems
    assert [result.output for result in verdict.runs] == ["y"]


def test_a_kernel_of_a_stored_matrix(tmp_path: Path) -> None:
    rng = np.random.default_rng(32)
    weight, factors, x = dyadic(rng, OUT, IN), dyadic_factors(rng, OUT, IN, RANK), dyadic(rng, 2, IN, 3, 4)
    net = Net()
    kernel = reshape(net, net.weight(f"{MODULE}.weight", weight), OUT, IN, 1, 1)
    net.op("Conv", [net.feed("x", rank=4), kernel], net.result("y", rank=4), torchscript_name(MODULE, "Conv"))
    a, b = factors
    kernels = a.reshape(RANK, IN, 1, 1), b.reshape(OUT, RANK, 1, 1)
    merged = merge_model(tmp_path, net.model(), {MODULE: kernels}, alpha=float(RANK))
    expected = np.einsum("oi,bihw->bohw", weight + product(factors), x)
    np.testing.assert_allclose(run(merged, {"x": x})[0], expected, rtol=1e-5)


def refuse(folder: Path, model: onnx.ModelProto) -> str:
    factors = dyadic_factors(np.random.default_rng(33), OUT, IN, RANK)
    base, adapter = write_model(folder / "base.onnx", model), write_peft(folder / "adapter", {MODULE: factors})
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], folder / "merged.onnx")
    assert caught.value.codes == ("LF403",)
    return str(caught.value)


def test_numbers_in_another_order_are_refused(tmp_path: Path) -> None:
    assert "Reshape" in refuse(tmp_path, net_of(TURNED, dyadic(np.random.default_rng(34), OUT, IN)))


def test_one_tensor_in_two_shapes_is_refused(tmp_path: Path) -> None:
    """Both operators are targets' homes; a change of one shape would be placed in the other."""
    weight, net = dyadic(np.random.default_rng(35), OUT, IN), Net()
    stored = net.weight("w", weight.T.reshape(1, IN, OUT))
    net.op("MatMul", [net.feed("x"), squeeze(net, stored)], net.result("y"), torchscript_name(MODULE, "MatMul"))
    wide = net.op("Reshape", [stored, net.weight("wide", np.array([OUT, IN], INTS))], "wide_w")
    net.op("MatMul", [net.feed("z"), wide], net.result("v"), torchscript_name("model.other", "MatMul"))
    assert "another one" in refuse(tmp_path, net.model())


def test_the_other_reader_behind_a_shape_is_named(tmp_path: Path) -> None:
    """A shape between does not hide a reader: the adapted one gets a copy, in the stored shape."""
    rng = np.random.default_rng(36)
    weight, factors, x = dyadic(rng, OUT, IN), dyadic_factors(rng, OUT, IN, RANK), dyadic(rng, 3, IN)
    net, read = Net(), squeeze
    value = read(net, net.weight("w", weight.T.reshape(1, IN, OUT)))
    for name, output in ((MODULE, "y"), ("model.other", "v")):
        net.op("MatMul", [net.feed(f"x_{output}"), value], net.result(output), torchscript_name(name, "MatMul"))
    merged = merge_model(tmp_path, net.model(), {MODULE: factors}, alpha=float(RANK))
    onnx.checker.check_model(onnx.load(merged), full_check=True)
    y, v = run(merged, {"x_y": x, "x_v": x})
    np.testing.assert_allclose(y, x @ (weight + product(factors)).T, rtol=1e-6)
    np.testing.assert_allclose(v, x @ weight.T, rtol=1e-6)
