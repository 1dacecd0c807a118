"""Every way in which an operator may hold a weight: merged into the right places the right way round, or refused.

The check is what onnxruntime computes from the merged model against a forward pass in numpy that knows only the
module's own `(out, in)` weight; no dimension equals another, and where shapes could hide a transposition, square
matrices are tried too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import loraformat
from builders import Factors, write_tensors
from graphs import (
    CLASSES,
    RULE,
    SCOPES,
    Array,
    Net,
    dyadic,
    dyadic_factors,
    dynamo_scopes,
    make_adapter,
    make_target,
    merge_model,
    product,
    run,
    torchscript_name,
    write_model,
)
from loraformat.adapter import SlotKind
from loraformat.bases import BASES, Site
from loraformat.bases._onnx.names import read_node_path

MODULE = "model.layers.1.fc"


def sites_of(folder: Path, net: Net | onnx.ModelProto) -> list[Site]:
    model = net.model() if isinstance(net, Net) else net
    base = BASES.find("onnx_graph")
    assert base is not None
    return list(base.open(write_model(folder / "sites.onnx", model)).sites)


def refused(folder: Path, model: onnx.ModelProto, factors: dict[str, Factors], **options: Any) -> str:
    """Return the message of a merge that must not happen and must leave no file."""
    with pytest.raises(loraformat.LoraformatError) as caught:
        merge_model(folder, model, factors, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base.onnx"]
    assert set(caught.value.codes) == {caught.value.codes[0]}
    return str(caught.value)


# --- the way from the initializer to the operator --------------------------------------------------------------------

Chain = Callable[[Net, Array], str]
"""Store what evaluates to the given matrix; return the value's name."""


def _plain(net: Net, matrix: Array) -> str:
    return net.weight("w", matrix)


def _constant(net: Net, matrix: Array) -> str:
    return net.constant("w", matrix)


def _transposed(net: Net, matrix: Array) -> str:
    return net.op("Transpose", [net.weight("w", matrix.T)], "w_t", perm=[1, 0])


def _transposed_by_default(net: Net, matrix: Array) -> str:
    return net.op("Transpose", [net.weight("w", matrix.T)], "w_t")


def _transposed_twice(net: Net, matrix: Array) -> str:
    once = net.op("Transpose", [net.weight("w", matrix)], "w_t", perm=[1, 0])
    return net.op("Transpose", [once], "w_tt")


def _kept_by_permutation(net: Net, matrix: Array) -> str:
    return net.op("Transpose", [net.weight("w", matrix)], "w_t", perm=[0, 1])


def _identity(net: Net, matrix: Array) -> str:
    return net.op("Identity", [net.weight("w", matrix)], "w_same")


def _cast_from_half(net: Net, matrix: Array) -> str:
    return net.op("Cast", [net.weight("w", matrix.astype(np.float16))], "w_wide", to=TensorProto.FLOAT)


def _all_three(net: Net, matrix: Array) -> str:
    stored = net.weight("w", matrix.T.astype(ml_dtypes.bfloat16))
    wide = net.op("Cast", [net.op("Identity", [stored], "w_1")], "w_2", to=TensorProto.FLOAT)
    return net.op("Transpose", [wide], "w_3", perm=[1, 0])


CHAINS: dict[str, Chain] = {
    "plain": _plain,
    "constant node": _constant,
    "transpose": _transposed,
    "transpose without perm": _transposed_by_default,
    "two transposes": _transposed_twice,
    "perm 0 1": _kept_by_permutation,
    "identity": _identity,
    "cast from float16": _cast_from_half,
    "identity, cast, transpose of bfloat16": _all_three,
}

Form = Callable[[Net, Chain, Array], float]
"""Apply a module's `(out, in)` weight to `x`, giving `y` or its transpose `yt`; return what y is multiplied by."""

NAME = torchscript_name(MODULE, "Op")


def _matmul(net: Net, chain: Chain, weight: Array) -> float:
    net.op("MatMul", ["x", chain(net, weight.T)], "y", NAME)
    return 1.0


def _matmul_from_left(net: Net, chain: Chain, weight: Array) -> float:
    net.op("MatMul", [chain(net, weight), "xt"], "yt", NAME)
    return 1.0


def _gemm(net: Net, chain: Chain, weight: Array, **flags: Any) -> float:
    net.op("Gemm", ["x", chain(net, weight if flags.get("transB") else weight.T)], "y", NAME, **flags)
    return float(flags.get("alpha", 1.0))


def _gemm_from_left(net: Net, chain: Chain, weight: Array, **flags: Any) -> float:
    net.op("Gemm", [chain(net, weight.T if flags.get("transA") else weight), "xt"], "yt", NAME, **flags)
    return float(flags.get("alpha", 1.0))


FORMS: dict[str, Form] = {
    "MatMul": _matmul,
    "MatMul, weight first": _matmul_from_left,
    "Gemm": _gemm,
    "Gemm transB=0": lambda *a: _gemm(*a, transB=0),
    "Gemm transB=1": lambda *a: _gemm(*a, transB=1),
    "Gemm transB=1 alpha=4": lambda *a: _gemm(*a, transB=1, alpha=4.0),
    "Gemm alpha=-0.5": lambda *a: _gemm(*a, alpha=-0.5),
    "Gemm, weight first": _gemm_from_left,
    "Gemm transA=1, weight first": lambda *a: _gemm_from_left(*a, transA=1),
    "Gemm transA=1 alpha=2, weight first": lambda *a: _gemm_from_left(*a, transA=1, alpha=2.0),
}


def linear_net(form: Form, chain: Chain, weight: Array) -> tuple[Net, float]:
    """Return a net of one module with inputs `x` and `xt` and whatever output the form makes."""
    net = Net()
    net.feed("x")
    net.feed("xt")
    alpha = form(net, chain, weight)
    made = net.nodes[-1].output[0]
    net.result(made)
    used = {name for node in net.nodes for name in node.input}
    net.inputs = [item for item in net.inputs if item.name in used]
    return net, alpha


@pytest.mark.parametrize("square", [False, True], ids=["7x5", "6x6"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("form", FORMS)
def test_the_delta_lands_the_right_way_round(tmp_path: Path, form: str, chain: str, square: bool) -> None:
    rng = np.random.default_rng(3)
    out, inner = (6, 6) if square else (7, 5)
    weight, factors = dyadic(rng, out, inner), (dyadic(rng, 2, inner, reach=2), dyadic(rng, out, 2, reach=2))
    net, alpha = linear_net(FORMS[form], CHAINS[chain], weight)
    merged = merge_model(tmp_path, net.model(), {MODULE: factors}, alpha=16.0)
    x = dyadic(rng, 3, inner)
    expected = x.astype(np.float64) @ (alpha * weight.astype(np.float64) + product(factors, 8.0)).T
    fed = net.inputs[0].name
    (found,) = run(merged, {fed: x if fed == "x" else np.ascontiguousarray(x.T)})
    np.testing.assert_allclose(found if fed == "x" else found.T, expected, rtol=1e-5, atol=1e-5)
    (before,) = run(net.model(), {fed: x if fed == "x" else np.ascontiguousarray(x.T)})
    assert np.abs(before - found).max() > 0.1


@pytest.mark.parametrize("slot", [SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED])
def test_both_linear_slots_mean_the_module_own_matrix(tmp_path: Path, slot: SlotKind) -> None:
    """A, B are `(rank, in)` and `(out, rank)` for Conv1D too: where the graph stores it decides, not the slot."""
    rng = np.random.default_rng(4)
    weight, factors = dyadic(rng, 5, 5), dyadic_factors(rng, 5, 5, 2)
    net, _ = linear_net(FORMS["Gemm transB=0"], _plain, weight)
    base = write_model(tmp_path / "base.onnx", net.model())
    merged = tmp_path / "merged.onnx"
    loraformat.merge(base, [make_adapter(make_target(MODULE, factors, slot))], merged)
    x = dyadic(rng, 2, 5)
    np.testing.assert_allclose(run(merged, {"x": x})[0], x @ (weight + product(factors)).T, rtol=1e-6)


def test_a_gemm_that_multiplies_by_zero_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    net, _ = linear_net(lambda *a: _gemm(*a, alpha=0.0), _plain, dyadic(rng, 7, 5))
    assert "LF403" in refused(tmp_path, net.model(), {MODULE: dyadic_factors(rng, 7, 5, 2)})


def test_an_attribute_that_the_caller_of_a_function_sets_is_not_taken_for_its_default(tmp_path: Path) -> None:
    """`transB` may come from the call: a square matrix would be changed transposed without a word."""
    rng = np.random.default_rng(6)
    weight, factors = dyadic(rng, 6, 6), dyadic_factors(rng, 6, 6, 2)
    inner = helper.make_node("Gemm", ["a", "w"], ["b"])
    attribute = inner.attribute.add(name="transB", ref_attr_name="turned", type=onnx.AttributeProto.INT)
    assert attribute.ref_attr_name == "turned"
    net = Net()
    opsets = [helper.make_opsetid("", 18)]
    net.functions.append(helper.make_function("own", "Linear", ["a", "w"], ["b"], [inner], opsets, ["turned"]))
    call = [net.feed("x"), net.weight("w", weight)]
    net.op("Linear", call, net.result("y"), torchscript_name(MODULE, "Linear"), domain="own", turned=1)
    x = dyadic(rng, 2, 6)
    np.testing.assert_allclose(run(net.model(), {"x": x})[0], x @ weight.T)
    assert "LF403" in refused(tmp_path, net.model(), {MODULE: factors})


# --- tables and kernels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("chain", CHAINS)
def test_embeddings(tmp_path: Path, chain: str, axis: int | None) -> None:
    rng = np.random.default_rng(7)
    vocabulary, dim, rank = 11, 4, 2
    table = dyadic(rng, vocabulary, dim)
    factors = dyadic_factors(rng, dim, vocabulary, rank)  # A (rank, vocabulary), B (dim, rank)
    net = Net()
    net.feed("ids", TensorProto.INT64, 1)
    more = {} if axis is None else {"axis": axis}
    net.op("Gather", [CHAINS[chain](net, table), "ids"], net.result("y"), torchscript_name(MODULE, "Gather"), **more)
    base = write_model(tmp_path / "base.onnx", net.model())
    merged = tmp_path / "merged.onnx"
    loraformat.merge(base, [make_adapter(make_target(MODULE, factors, SlotKind.EMBEDDING, 0.5))], merged)
    ids = np.array([0, 10, 3, 3], np.int64)
    expected = (table.astype(np.float64) + product(factors, 0.5).T)[ids]
    np.testing.assert_allclose(run(merged, {"ids": ids})[0], expected, rtol=1e-6)


def test_a_square_table_is_not_changed_transposed(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    table, factors = dyadic(rng, 6, 6), dyadic_factors(rng, 6, 6, 2)
    net = Net()
    net.feed("ids", TensorProto.INT64, 1)
    net.op("Gather", [net.weight("w", table), "ids"], net.result("y"), torchscript_name(MODULE, "Gather"))
    base = write_model(tmp_path / "base.onnx", net.model())
    merged = tmp_path / "merged.onnx"
    loraformat.merge(base, [make_adapter(make_target(MODULE, factors, SlotKind.EMBEDDING))], merged)
    found = run(merged, {"ids": np.arange(6)})[0]
    np.testing.assert_allclose(found, table + product(factors).T, rtol=1e-6)


def test_a_lookup_of_columns_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    net = Net()
    net.feed("ids", TensorProto.INT64, 1)
    name = torchscript_name(MODULE, "Gather")
    net.op("Gather", [net.weight("w", dyadic(rng, 6, 6)), "ids"], net.result("y"), name, axis=1)
    base = write_model(tmp_path / "base.onnx", net.model())
    adapter = make_adapter(make_target(MODULE, dyadic_factors(rng, 6, 6, 2), SlotKind.EMBEDDING))
    with pytest.raises(loraformat.FindingError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert caught.value.codes == ("LF403",)


def _convolve(x: Array, kernel: Array) -> Array:
    """Return the valid cross-correlation, summed directly."""
    sizes = tuple(size - width + 1 for size, width in zip(x.shape[2:], kernel.shape[2:], strict=True))
    out = np.zeros((x.shape[0], kernel.shape[0], *sizes))
    for place in np.ndindex(sizes):
        window = x[(slice(None), slice(None), *(slice(p, p + w) for p, w in zip(place, kernel.shape[2:], strict=True)))]
        out[(slice(None), slice(None), *place)] = np.tensordot(
            window.reshape(len(x), -1), kernel.reshape(len(kernel), -1), (1, 1)
        )
    return out


def conv_net(kernel: Array, weight_name: str = f"{MODULE}.weight", **more: Any) -> Net:
    net = Net()
    rank = kernel.ndim
    weight = net.weight(weight_name, kernel)
    name = torchscript_name(MODULE, "Conv")
    net.op("Conv", [net.feed("x", rank=rank), weight], net.result("y", rank=rank), name, **more)
    return net


@pytest.mark.parametrize("width", [(3,), (2, 3), (1, 1), (2, 1, 3)], ids=str)
def test_convolutions(tmp_path: Path, width: tuple[int, ...]) -> None:
    rng = np.random.default_rng(10)
    out, inner, rank = 5, 4, 2
    kernel = dyadic(rng, out, inner, *width)
    factors = dyadic(rng, rank, inner, *width), dyadic(rng, out, rank, *(1 for _ in width))
    merged = merge_model(tmp_path, conv_net(kernel).model(), {MODULE: factors}, alpha=4.0)
    x = dyadic(rng, 2, inner, *(size + 3 for size in width))
    changed = kernel.astype(np.float64) + product(factors, 2.0).reshape(kernel.shape)
    np.testing.assert_allclose(run(merged, {"x": x})[0], _convolve(x, changed), rtol=1e-5, atol=1e-5)


def test_a_cube_behind_a_transpose_that_reverses_all_axes_is_refused(tmp_path: Path) -> None:
    """Without a permutation Transpose reverses every axis; a kernel of equal sizes shows nothing of it."""
    rng = np.random.default_rng(11)
    net = Net()
    turned = net.op("Transpose", [net.weight("w", dyadic(rng, 3, 3, 3))], "w_t")
    net.op("Conv", [net.feed("x", rank=3), turned], net.result("y", rank=3), torchscript_name(MODULE, "Conv"))
    factors = dyadic(rng, 2, 3, 3), dyadic(rng, 3, 2, 1)
    assert "LF403" in refused(tmp_path, net.model(), {MODULE: factors})


@pytest.mark.parametrize("groups", [2, 4], ids=["grouped", "depthwise"])
def test_grouped_convolutions(tmp_path: Path, groups: int) -> None:
    """The change has the kernel's shape, `(out, in / groups, *kernel)`; trainers of full-width A are refused by it."""
    rng = np.random.default_rng(12)
    kernel = dyadic(rng, 8, 4 // groups, 3)
    factors = dyadic(rng, 2, 4 // groups, 3), dyadic(rng, 8, 2, 1)
    merged = merge_model(tmp_path, conv_net(kernel, group=groups).model(), {MODULE: factors}, alpha=4.0)
    x = dyadic(rng, 2, 4, 6)
    changed = kernel.astype(np.float64) + product(factors, 2.0).reshape(kernel.shape)
    parts = zip(np.split(x, groups, axis=1), np.split(changed, groups), strict=True)
    expected = np.concatenate([_convolve(part, own) for part, own in parts], axis=1)
    np.testing.assert_allclose(run(merged, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)
    whole = dyadic(rng, 2, 4, 3), dyadic(rng, 8, 2, 1)
    assert "LF405" in refused(tmp_path / "whole", conv_net(kernel, group=groups).model(), {MODULE: whole})


def test_an_empty_weight_is_refused(tmp_path: Path) -> None:
    net = Net()
    empty = net.weight("w", np.zeros((5, 0), np.float32))
    net.op("MatMul", [net.feed("x"), empty], net.result("y"), NAME)
    factors = np.ones((2, 5), np.float32), np.ones((0, 2), np.float32)
    base = write_model(tmp_path / "base.onnx", net.model())
    with pytest.raises(loraformat.LoraformatError):
        loraformat.merge(base, [make_adapter(make_target(MODULE, factors))], tmp_path / "merged.onnx")


# --- operators that hold weights in forms of their own ---------------------------------------------------------------


def _quantised_matmul(net: Net, rng: np.random.Generator) -> None:
    codes = rng.integers(-9, 9, (5, 7)).astype(np.int8)
    x = net.op("Cast", [net.feed("x")], "x8", to=TensorProto.INT8)
    y = net.op("MatMulInteger", [x, net.weight(f"{MODULE}.weight_quantized", codes)], "y32", NAME)
    net.op("Cast", [y], net.result("y"), to=TensorProto.FLOAT)


def _joined(net: Net, rng: np.random.Generator) -> None:
    parts = [net.weight("w", dyadic(rng, 5, 3)), net.weight("v", dyadic(rng, 5, 4))]
    matrix = net.op("Concat", parts, "matrix", axis=1)
    net.op("MatMul", [net.feed("x"), matrix], net.result("y"), NAME)


def _transposed_convolution(net: Net, rng: np.random.Generator) -> None:
    inputs = [net.feed("x", rank=3), net.weight(f"{MODULE}.weight", dyadic(rng, 5, 7, 3))]
    net.op("ConvTranspose", inputs, net.result("y", rank=3), torchscript_name(MODULE, "ConvTranspose"))


def _recurrent(net: Net, rng: np.random.Generator) -> None:
    steps = net.weight("onnx::LSTM_1", dyadic(rng, 1, 28, 5)), net.weight("onnx::LSTM_2", dyadic(rng, 1, 28, 7))
    net.op("LSTM", [net.feed("x", rank=3), *steps], net.result("y", rank=4), f"/{MODULE}/LSTM", hidden_size=7)


def _summed(net: Net, rng: np.random.Generator) -> None:
    inputs = [net.feed("x"), net.weight("w", dyadic(rng, 7, 5))]
    net.op("Einsum", inputs, net.result("y"), torchscript_name(MODULE, "Einsum"), equation="bi,oi->bo")


def _sparse(net: Net, rng: np.random.Generator) -> None:
    net.op("MatMul", [net.feed("x"), "sparse_w"], net.result("y"), NAME)


FORMS_OF_THEIR_OWN = {
    _quantised_matmul: "",
    _joined: "behind Concat",
    _transposed_convolution: "operator ConvTranspose",
    _recurrent: "operator LSTM",
    _summed: "operator Einsum",
    _sparse: "sparse",
}


@pytest.mark.parametrize("make", FORMS_OF_THEIR_OWN, ids=lambda f: f.__name__)
def test_weights_in_other_forms_are_refused_by_name(
    tmp_path: Path, make: Callable[[Net, np.random.Generator], None]
) -> None:
    rng = np.random.default_rng(13)
    net = Net()
    make(net, rng)
    model = net.model(check=False)
    if make is _sparse:
        values = helper.make_tensor("sparse_w", TensorProto.FLOAT, [2], [1.0, 2.0])
        places = helper.make_tensor("places", TensorProto.INT64, [2], [3, 8])
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [5, 7]))
    message = refused(tmp_path, model, {MODULE: dyadic_factors(rng, 7, 5, 2)})
    assert message.startswith("LF403")
    assert MODULE in message
    assert FORMS_OF_THEIR_OWN[make] in message


def test_what_cannot_be_read_hides_no_weight_of_its_module(tmp_path: Path) -> None:
    rng = np.random.default_rng(17)
    weight, factors, x = dyadic(rng, 7, 5), dyadic_factors(rng, 7, 5, 2), dyadic(rng, 3, 5)
    net = Net()
    y = net.op("MatMul", [net.feed("x"), net.weight(f"{MODULE}.weight", weight.T)], "product", NAME)
    inputs = [y, net.weight("mixer", np.eye(7, dtype=np.float32))]
    net.op("Einsum", inputs, net.result("y"), torchscript_name(MODULE, "Einsum"), equation="bi,oi->bo")
    merged = merge_model(tmp_path, net.model(), {MODULE: factors}, alpha=2.0)
    np.testing.assert_allclose(run(merged, {"x": x})[0], x @ (weight + product(factors)).T, rtol=1e-6)


def test_a_weight_in_an_integer_form_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(14)
    net = Net()
    wide = net.op("Cast", [net.weight("w", rng.integers(-9, 9, (5, 7)).astype(np.int8))], "wide", to=TensorProto.FLOAT)
    net.op("MatMul", [net.feed("x"), wide], net.result("y"), NAME)
    assert "int8" in refused(tmp_path, net.model(), {MODULE: dyadic_factors(rng, 7, 5, 2)})


def test_numbers_outside_raw_data_are_merged_or_refused_never_lost(tmp_path: Path) -> None:
    """Packed float_data is the same run of bytes as raw_data."""
    rng = np.random.default_rng(15)
    weight, factors = dyadic(rng, 7, 5), dyadic_factors(rng, 7, 5, 2)
    net, _ = linear_net(FORMS["Gemm transB=1"], _plain, weight)
    net.initializers[:] = [helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.ravel())]
    assert net.initializers[0].float_data
    merged = merge_model(tmp_path, net.model(), {MODULE: factors}, alpha=2.0)
    x = dyadic(rng, 2, 5)
    np.testing.assert_allclose(run(merged, {"x": x})[0], x @ (weight + product(factors)).T, rtol=1e-6)


def test_the_line_of_a_refusal_makes_numbers_that_can_be_merged(tmp_path: Path) -> None:
    """float16 of `make_tensor` stands in int32_data; the mend is carried out as it is printed."""
    rng = np.random.default_rng(16)
    weight, factors, x = dyadic(rng, 7, 5), dyadic_factors(rng, 7, 5, 2), dyadic(rng, 2, 5)
    net = Net()
    net.initializers.append(helper.make_tensor("w", TensorProto.FLOAT16, [5, 7], weight.T.ravel()))
    inputs = [net.feed("x", TensorProto.FLOAT16), "w"]
    net.op("MatMul", inputs, net.result("y", TensorProto.FLOAT16), NAME)
    message = refused(tmp_path, net.model(), {MODULE: factors})
    line = message[message.index("m = onnx.load(P)") : message.index(", with onnx.numpy_helper")]
    base, mended = str(tmp_path / "base.onnx"), tmp_path / "mended.onnx"
    exec(line, {"onnx": onnx, "numpy_helper": onnx.numpy_helper, "P": base, "P2": str(mended)})
    merged = merge_model(tmp_path, mended, {MODULE: factors}, alpha=2.0)
    expected = x @ (weight + product(factors)).T
    np.testing.assert_allclose(run(merged, {"x": x.astype(np.float16)})[0], expected, rtol=1e-2)


# --- whose weight it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("/model/layers.0/self_attn/q_proj/MatMul", "model.layers.0.self_attn.q_proj"),
        ("/classifier/classifier.1/Gemm", "classifier.1"),
        ("/block/block.0/Conv", "block.0"),
        (
            "/resnet/encoder/stages.0/layers.0/layer/layer.0/convolution/Conv",
            "resnet.encoder.stages.0.layers.0.layer.0.convolution",
        ),
        ("/a/a.0/a.0.1/Conv", "a.0.1"),
        ("/layer/layer_1/MatMul", "layer.layer_1"),
        ("/layer/layer.norm/MatMul", "layer.layer.norm"),
        ("/layers.1/layers.11/MatMul", "layers.1.layers.11"),
        ("/MatMul", ""),
        ("node_MatMul_58/MatMulAddFusion/", ""),
        ("model/q_proj/MatMul", ""),
        ("", ""),
        ("/", ""),
    ],
)
def test_paths_in_node_names(name: str, module: str) -> None:
    assert read_node_path(name) == module


@pytest.mark.parametrize(
    ("node", "tensor", "module"),
    [
        (
            "tf_bert/encoder/layer_._0/query/Tensordot/MatMul",
            "Tensordot/ReadVariableOp:0",
            "tf_bert.encoder.layer.0.query",
        ),
        ("bert/encoder/layer_11/query/MatMul", "kernel/read__7:0", "bert.encoder.layer.11.query"),
        ("net/dense_1/MatMul", "MatMul/ReadVariableOp:0", "net.dense_1"),
        ("net/dense/Gelu", "MatMul/ReadVariableOp:0", ""),
        ("MatMul", "ReadVariableOp:0", ""),
    ],
)
def test_layers_of_tensorflow(tmp_path: Path, node: str, tensor: str, module: str) -> None:
    """Both names must say the layer: tf2onnx stores equal tensors under the name of one, and folds others."""
    weight = dyadic(np.random.default_rng(16), 7, 5)
    layer = node.rpartition("/")[0].removesuffix("/Tensordot")
    for name, found in ((f"{layer}/{tensor}", module), (f"other/{tensor}", ""), ("const_fold_opt__9", "")):
        net = Net()
        net.op("MatMul", [net.feed("x"), net.weight(name, weight)], net.result("y"), node)
        (site,) = sites_of(tmp_path, net)
        assert (site.module, site.evidence) == (found, "node name" if found else "")


@pytest.mark.parametrize(("bias", "code"), [("", ""), ("net/stem/BiasAdd/ReadVariableOp:0", ""), ("fused_bn", "LF407")])
def test_convolutions_of_tensorflow(tmp_path: Path, bias: str, code: str) -> None:
    net = Net()
    kernel = net.weight("net/stem/Conv2D/ReadVariableOp:0", dyadic(np.random.default_rng(16), 5, 3, 2, 2))
    biases = [net.weight(bias, np.zeros(5, np.float32))] if bias else []
    net.op("Conv", [net.feed("x", rank=4), kernel, *biases], net.result("y", rank=4), "net/stem/Conv2D")
    (site,) = [site for site in sites_of(tmp_path, net) if site.module == "net.stem"]
    assert (site.obstacle.code if site.obstacle else "") == code


def test_scopes_at_the_node_beat_the_name_of_the_tensor(tmp_path: Path) -> None:
    """torch's exporter keeps one of two equal tensors, under the name of either owner; here the names are swapped."""
    rng = np.random.default_rng(16)
    one, other = dyadic(rng, 7, 5), dyadic(rng, 7, 5)
    factors = dyadic_factors(rng, 7, 5, 2)
    net = Net()
    net.feed("x")
    net.op("Gemm", ["x", net.weight("b.weight", one)], net.result("ya"), "node_1", dynamo_scopes("a"), transB=1)
    net.op("Gemm", ["x", net.weight("a.weight", other)], net.result("yb"), "node_2", dynamo_scopes("b"), transB=1)
    assert [(site.module, site.evidence) for site in sites_of(tmp_path / "s", net)] == [
        ("a", "name scopes"),
        ("b", "name scopes"),
    ]
    (tmp_path / "m").mkdir()
    merged = merge_model(tmp_path / "m", net.model(), {"b": factors}, alpha=2.0)
    x = dyadic(rng, 2, 5)
    ya, yb = run(merged, {"x": x})
    np.testing.assert_allclose(ya, x @ one.T, rtol=1e-6)
    np.testing.assert_allclose(yb, x @ (other + product(factors)).T, rtol=1e-6)


def test_a_node_path_beats_the_name_of_the_tensor(tmp_path: Path) -> None:
    net = Net()
    net.op("Gemm", [net.feed("x"), net.weight("b.weight", np.ones((7, 5), np.float32))], net.result("y"), "/a/Gemm")
    assert [(site.module, site.evidence) for site in sites_of(tmp_path, net)] == [("a", "node name")]


def test_scopes_beat_a_node_path(tmp_path: Path) -> None:
    net = Net()
    weight = net.weight("w", np.ones((5, 7), np.float32))
    net.op("MatMul", [net.feed("x"), weight], net.result("y"), "/b/MatMul", dynamo_scopes("a"))
    assert [site.module for site in sites_of(tmp_path, net)] == ["a"]


def test_evidence_at_the_transpose_before_the_weight_counts(tmp_path: Path) -> None:
    net = Net()
    weight = net.weight("b.weight", np.ones((7, 5), np.float32))
    turned = net.op("Transpose", [weight], "w_t", "node_9", dynamo_scopes("a"), perm=[1, 0])
    net.op("MatMul", [net.feed("x"), turned], net.result("y"), "node_10")
    assert [(site.module, site.evidence) for site in sites_of(tmp_path, net)] == [("a", "name scopes")]


def test_the_tensor_name_serves_where_the_node_says_nothing(tmp_path: Path) -> None:
    net = Net()
    net.op("Gemm", [net.feed("x"), net.weight("a.0.weight", np.ones((5, 7), np.float32))], net.result("y"), "Gemm_3")
    assert [(site.module, site.evidence) for site in sites_of(tmp_path, net)] == [("a.0", "initializer name")]


@pytest.mark.parametrize("bias_first", [False, True])
def test_the_bias_beside_it_serves_last(tmp_path: Path, bias_first: bool) -> None:
    net = Net()
    weight = net.weight("onnx::MatMul_9", np.ones((5, 7), np.float32))
    product_name = net.op("MatMul", [net.feed("x"), weight], "product", "MatMul_4")
    bias = net.op("Identity", [net.weight("a.dense.bias", np.ones(7, np.float32))], "bias_again")
    net.op("Add", [bias, product_name] if bias_first else [product_name, bias], net.result("y"))
    assert [(site.module, site.evidence) for site in sites_of(tmp_path, net)] == [("a.dense", "bias name")]


@pytest.mark.parametrize(("place", "other", "found"), [(0, "x", True), (1, "x", True), (1, "MatMul", False)])
def test_the_bias_in_a_norm_of_a_sum(tmp_path: Path, place: int, other: str, found: bool) -> None:
    """onnxruntime puts the bias of either addend there; where both are products, it may be either's."""
    net = Net()
    products = [net.op("MatMul", [net.feed("x"), net.weight("m1", np.ones((5, 5), np.float32))], "v1")]
    if other == "MatMul":
        products.append(net.op("MatMul", ["x", net.weight("m2", np.ones((5, 5), np.float32))], "v2"))
    addends = [*products, "x"][:2][::-1] if place else [*products, "x"][:2]
    vectors = [net.weight(name, np.ones(5, np.float32)) for name in ("norm.weight", "norm.bias", "a.dense.bias")]
    skip = helper.make_node("SkipLayerNormalization", [*addends, *vectors], ["y"], "skip", domain="com.microsoft")
    net.nodes.append(skip)
    net.result("y")
    named = {site.module for site in sites_of(tmp_path, net) if site.parameter == "weight" and site.weight is not None}
    assert ("a.dense" in named) == found


def test_the_bias_of_a_gemm_serves_too(tmp_path: Path) -> None:
    net = Net()
    inputs = [
        net.feed("x"),
        net.weight("v_117", np.ones((5, 7), np.float32)),
        net.weight("a.bias", np.ones(7, np.float32)),
    ]
    net.op("Gemm", inputs, net.result("y"), "Gemm_3")
    assert [(site.module, site.evidence) for site in sites_of(tmp_path, net)] == [("a", "bias name")]


def test_an_added_matrix_is_no_bias(tmp_path: Path) -> None:
    net = Net()
    product_name = net.op("MatMul", [net.feed("x"), net.weight("w", np.ones((5, 7), np.float32))], "product")
    net.op("Add", [product_name, net.weight("position.bias", np.ones((3, 7), np.float32))], net.result("y"))
    assert [site.module for site in sites_of(tmp_path, net)] == [""]


def _two_nodes(names: tuple[str, str], weights: tuple[str, str]) -> Net:
    net = Net()
    net.feed("x")
    for position, (name, weight) in enumerate(zip(names, weights, strict=True)):
        array = np.full((7, 5), position + 1, np.float32)
        net.op("Gemm", ["x", net.weight(weight, array)], net.result(f"y{position}"), name, transB=1)
    return net


@pytest.mark.parametrize(
    ("names", "weights", "modules"),
    [
        (("/fc/Gemm", "/fc_1/Gemm"), ("fc.weight", "inner.fc.weight"), ["fc", "inner.fc"]),
        (("/a/b/fc/Gemm", "/a/b_1/fc/Gemm"), ("a.b.fc.weight", "a.c.b.fc.weight"), ["a.b.fc", "a.c.b.fc"]),
        (("/a/Gemm", "/b/Gemm"), ("x.a.weight", "tied.weight"), ["x.a", "b"]),
        (("/a.1/Gemm", "/a.11/Gemm"), ("m.a.11.weight", "m.a.1.weight"), ["a.1", "a.11"]),
    ],
    ids=["called by another", "in the middle", "a tied name", "numbers at a dot"],
)
def test_the_weight_s_own_name_completes_a_path_that_it_holds(
    tmp_path: Path, names: tuple[str, str], weights: tuple[str, str], modules: list[str]
) -> None:
    """The TorchScript exporter leaves out modules that are never called themselves."""
    found = [site.module for site in sites_of(tmp_path, _two_nodes(names, weights))]
    assert found == modules


@pytest.mark.parametrize("target", ["fc", "fc_1", "inner.fc"])
def test_paths_that_the_exporter_numbered_are_not_guessed(tmp_path: Path, target: str) -> None:
    """`fc_1` may be a module of that name or the second of two `fc`; nothing here tells."""
    rng = np.random.default_rng(19)
    model = _two_nodes(("/fc/Gemm", "/fc_1/Gemm"), ("onnx::Gemm_7", "onnx::Gemm_8")).model()
    with pytest.raises(loraformat.FindingError) as caught:
        merge_model(tmp_path, model, {target: dyadic_factors(rng, 7, 5, 2)})
    assert caught.value.codes == ("LF404",)
    assert "dynamo=True" in str(caught.value)


@pytest.mark.parametrize(
    "scopes",
    ["", "['a']", "not a list", "['', 'a'", "[1, 2]", "('', 'a', 'b')", "[" * 5000, "['_empty_nn_module_stack', 'x']"],
    ids=lambda text: text[:20],
)
def test_scopes_that_say_nothing_are_no_evidence(tmp_path: Path, scopes: str) -> None:
    net = Net()
    weight = net.weight("a.weight", np.ones((5, 7), np.float32))
    net.op("Gemm", [net.feed("x"), weight], net.result("y"), "node_1", {SCOPES: scopes})
    assert [site.evidence for site in sites_of(tmp_path, net)] == ["initializer name"]


def test_matmuls_without_a_constant_are_no_sites(tmp_path: Path) -> None:
    net = Net()
    net.op("MatMul", [net.feed("q"), net.feed("k")], net.result("y"), "/layers.0/attn/MatMul")
    assert sites_of(tmp_path, net) == []


# --- BatchNorm folded into a weight ----------------------------------------------------------------------------------

NORM = "torch.nn.modules.batchnorm.BatchNorm2d"


def _torchscript_conv(rng: np.random.Generator) -> Net:
    return conv_net(dyadic(rng, 7, 5, 3), "onnx::Conv_71")


def _dynamo(op: str, kernel: Array, notes: dict[str, str]) -> Net:
    """Return an operator at which the norm's path stands, while the tensor keeps the layer's name."""
    net = Net()
    more = {"transB": 1} if op == "Gemm" else {}
    x, y = net.feed("x", rank=kernel.ndim), net.result("y", rank=kernel.ndim)
    scopes = dynamo_scopes("model.norm", "_native_batch_norm_legit_no_training", NORM)
    net.op(op, [x, net.weight(f"{MODULE}.weight", kernel)], y, f"node_{op}_3", scopes | notes, **more)
    return net


def _dynamo_conv(rng: np.random.Generator) -> Net:
    return _dynamo("Conv", dyadic(rng, 7, 5, 3), {RULE: "FuseBatchNormIntoConv, RemoveOptionalBiasFromConv"})


def _dynamo_gemm(rng: np.random.Generator) -> Net:
    return _dynamo("Gemm", dyadic(rng, 7, 5), {RULE: "FuseBatchNormIntoGemm"})


def _dynamo_class_alone(rng: np.random.Generator) -> Net:
    return _dynamo("Conv", dyadic(rng, 7, 5, 3), {})


def _dynamo_rule_alone(rng: np.random.Generator) -> Net:
    return _dynamo("Gemm", dyadic(rng, 7, 5), {RULE: "FuseBatchNormIntoGemm", CLASSES: "", SCOPES: ""})


@pytest.mark.parametrize(
    "make",
    [_torchscript_conv, _dynamo_conv, _dynamo_gemm, _dynamo_class_alone, _dynamo_rule_alone],
    ids=lambda f: f.__name__,
)
def test_folded_batchnorm_is_refused(tmp_path: Path, make: Callable[[np.random.Generator], Net]) -> None:
    rng = np.random.default_rng(17)
    net = make(rng)
    conv = net.nodes[0].op_type == "Conv"
    factors = (dyadic(rng, 2, 5, 3), dyadic(rng, 7, 2, 1)) if conv else dyadic_factors(rng, 7, 5, 2)
    message = refused(tmp_path, net.model(), {MODULE: factors})
    assert message.startswith("LF407")
    assert "BatchNorm" in message


def test_a_conv_that_keeps_its_name_is_not_folded(tmp_path: Path) -> None:
    rng = np.random.default_rng(18)
    (site,) = sites_of(tmp_path, conv_net(dyadic(rng, 7, 5, 3)))
    assert site.obstacle is None


@pytest.mark.parametrize(
    ("weight", "folded"),
    [("bank", False), ("forward_basis_buffer", False), ("weight_fused", True), ("onnx::Conv_7", True)],
)
def test_a_filter_bank_of_the_module_is_not_folded(tmp_path: Path, weight: str, folded: bool) -> None:
    """Silero's detector convolves with a parameter not called `weight`; a name that a tool gave tells nothing."""
    name = weight if "::" in weight else f"{MODULE}.{weight}"
    sites = sites_of(tmp_path, conv_net(dyadic(np.random.default_rng(18), 7, 5, 3), name))
    assert {site.obstacle.code if site.obstacle else "" for site in sites} == {"LF407" if folded else ""}


def test_an_anonymous_matmul_is_not_folded(tmp_path: Path) -> None:
    """Only a Conv is renamed because of folding; a MatMul is because of its transposition."""
    net = Net()
    weight = net.weight("onnx::MatMul_71", np.ones((5, 7), np.float32))
    net.op("MatMul", [net.feed("x"), weight], net.result("y"), NAME)
    (site,) = sites_of(tmp_path, net)
    assert site.obstacle is None


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_the_output_layer_of_torch_attention_is_a_module_of_its_own(tmp_path: Path, exporter: str) -> None:
    """MultiheadAttention applies `out_proj.weight` itself: the node stands in its parent's scope."""
    rng, net = np.random.default_rng(19), Net()
    for index, name in enumerate(("in_proj_weight", "out_proj.weight")):
        inner = f"{MODULE}.{name}" if index else "onnx::MatMul_7"
        notes = dynamo_scopes(MODULE) if exporter == "dynamo" else {}
        node = torchscript_name(MODULE, f"Gemm_{index}") if exporter == "torchscript" else f"node_Gemm_{index}"
        weight = net.weight(inner, dyadic(rng, 15, 5 + index))
        net.op("Gemm", [net.feed(f"x{index}"), weight], net.result(f"y{index}"), node, notes, transB=1)
    assert [site.module for site in sites_of(tmp_path, net)] == [MODULE, f"{MODULE}.out_proj"]


# --- damage ----------------------------------------------------------------------------------------------------------


def _hostile(kind: str) -> onnx.ModelProto:
    net = Net()
    weight = net.weight("w", np.ones((5, 7), np.float32))
    if kind == "operators without inputs":
        for op in ("MatMul", "Gemm", "Conv", "Gather", "Transpose", "Identity", "Cast", "Add", "Shape"):
            net.nodes.append(helper.make_node(op, [], [f"o_{op}"]))
        net.op("MatMul", ["x", "o_Identity"], "y1")
        net.op("MatMul", ["x", "o_Transpose"], "y2")
        net.op("MatMul", ["x", "o_Cast"], "y3")
    elif kind == "operators without outputs":
        net.nodes.append(helper.make_node("MatMul", ["x", weight], []))
        net.nodes.append(helper.make_node("Identity", [weight], []))
    elif kind == "an Add with one input, and with three":
        product_name = net.op("MatMul", ["x", weight], "p")
        net.nodes.append(helper.make_node("Add", [product_name], ["s1"]))
        net.nodes.append(helper.make_node("Add", ["w", "w", product_name], ["s2"]))
    elif kind == "values that make each other":
        net.op("Identity", ["b"], "a")
        net.op("Transpose", ["a"], "b")
        net.op("MatMul", ["x", "b"], "y")
        net.op("Reshape", ["c", "c"], "c")
        net.op("MatMul", ["x", "c"], "y2")
    elif kind == "a permutation of nonsense":
        for index, order in enumerate(([0], [5, 7], [0, 0], [-1, 0], [2, 1, 0])):
            turned = net.op("Transpose", [weight], f"t{index}", perm=order)
            net.op("MatMul", ["x", turned], f"y{index}", "/a/MatMul")
    elif kind == "a function that calls itself":
        call = helper.make_node("Self", ["a"], ["b"], domain="own")
        net.functions.append(helper.make_function("own", "Self", ["a"], ["b"], [call], [helper.make_opsetid("own", 1)]))
        net.op("Self", [weight], "y", domain="own")
    elif kind == "a call with too few and too many inputs":
        inner = helper.make_node("MatMul", ["a", "b"], ["c"])
        opsets = [helper.make_opsetid("", 18)]
        net.functions.append(helper.make_function("own", "F", ["a", "b"], ["c"], [inner], opsets))
        net.op("F", ["x"], "y1", domain="own")
        net.op("F", ["x", weight, weight, weight], "y2", domain="own")
        net.op("F", ["x", ""], "y3", domain="own")
    return net.model(check=False)


@pytest.mark.parametrize(
    "kind",
    [
        "operators without inputs",
        "operators without outputs",
        "an Add with one input, and with three",
        "values that make each other",
        "a permutation of nonsense",
        "a function that calls itself",
        "a call with too few and too many inputs",
    ],
)
def test_a_graph_of_nonsense_is_an_index_or_an_error(tmp_path: Path, kind: str) -> None:
    path = write_model(tmp_path / "hostile.onnx", _hostile(kind))
    base = BASES.find("onnx_graph")
    assert base is not None
    if kind == "a function that calls itself":
        with pytest.raises(loraformat.RefusedError):
            base.open(path)
        return
    for site in base.open(path).sites:
        assert (site.weight is None) == (site.obstacle is not None)


def test_a_model_is_refused_as_an_adapter_of_itself(tmp_path: Path) -> None:
    """The other way round from `test_resolve`: names of a base never pass for targets."""
    path = write_tensors(tmp_path / "base.safetensors", {"a.weight": np.ones((3, 2), np.float32)})
    with pytest.raises(loraformat.LoraformatError):
        loraformat.merge(path, [path], tmp_path / "out.safetensors", alpha=1.0)
