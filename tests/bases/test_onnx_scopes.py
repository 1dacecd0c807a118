"""Who reads a weight, through subgraphs and function calls: of a shared one the adapted reader gets a copy.

Where it cannot have one, the merge is refused and the other reader named.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import loraformat
from builders import Factors, write_peft
from graphs import (
    Array,
    ArrayFactor,
    Net,
    dyadic,
    dyadic_factors,
    dynamo_scopes,
    function,
    make_adapter,
    merge_model,
    product,
    run,
    stored_weights,
    torchscript_name,
    write_data_by_hand,
    write_model,
)
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.bases import BASES, BaseModel

OUT, IN, RANK = 7, 5, 2


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(21)


@pytest.fixture
def weight(rng: np.random.Generator) -> Array:
    return dyadic(rng, OUT, IN)


@pytest.fixture
def factors(rng: np.random.Generator) -> Factors:
    return dyadic_factors(rng, OUT, IN, RANK)


def open_model(folder: Path, model: onnx.ModelProto) -> BaseModel:
    base = BASES.find("onnx_graph")
    assert base is not None
    return base.open(write_model(folder / "opened.onnx", model))


def assert_shared(folder: Path, model: onnx.ModelProto | Path, factors: Mapping[str, Factors], *words: str) -> None:
    """Check that the merge is refused because of another reader, which the message names."""
    with pytest.raises(loraformat.FindingError) as caught:
        merge_model(folder, model, factors)
    assert set(caught.value.codes) == {"LF402"}
    for word in words:
        assert word in str(caught.value)
    assert not (folder / "merged.onnx").exists()


def assert_copied(folder: Path, model: onnx.ModelProto | Path, factors: Factors, *words: str) -> onnx.ModelProto:
    """Check that module `a`, which makes the first output, alone changes, by a copy of its weight; return the model."""
    base = model if isinstance(model, Path) else write_model(folder / "base.onnx", model)
    adapter = write_peft(folder / "adapter", {"a": factors}, alpha=float(RANK))
    receipt = loraformat.merge(base, [adapter], folder / "merged.onnx")
    notes = [problem for problem in receipt.problems if problem.code == "LF417"]
    assert all(word in str(notes) for word in words)
    before, after = onnx.load(base), onnx.load(folder / "merged.onnx")
    onnx.checker.check_model(after)
    known = {tensor.name: tensor.raw_data for tensor in before.graph.initializer}
    (copy,) = (tensor for tensor in after.graph.initializer if tensor.name not in known)
    assert [(w.name, w.copied_from) for w in receipt.weights] == [(copy.name, _name_of_source(before))]
    assert {t.name: t.raw_data for t in after.graph.initializer if t is not copy} == known
    feeds = {each.name: _feed(each) for each in before.graph.input}
    (old, *others), (new, *rest) = run(base, feeds), run(folder / "merged.onnx", feeds)
    np.testing.assert_allclose(new - old, feeds["x"] @ product(factors).T, rtol=1e-5, atol=1e-5)
    for one, other in zip(others, rest, strict=True):
        np.testing.assert_array_equal(one, other)
    assert loraformat.verify(folder / "merged.onnx", base, [adapter]).holds
    return after


def _name_of_source(model: onnx.ModelProto) -> str:
    return next(tensor.name for tensor in model.graph.initializer if tensor.name in ("w", "p"))


def _feed(described: onnx.ValueInfoProto) -> Array:
    kind = described.type.tensor_type.elem_type
    if kind == TensorProto.FLOAT:
        return dyadic(np.random.default_rng(3), 2, IN)
    return np.array([1, 3]) if kind == TensorProto.INT64 else np.array(True)


def assert_merged(
    folder: Path, model: onnx.ModelProto, factors: Factors, module: str, feeds: Mapping[str, Array], expected: Array
) -> None:
    """Check that the merge changes the first output to `expected`."""
    merged = merge_model(folder, model, {module: factors}, alpha=float(RANK))
    np.testing.assert_allclose(run(merged, feeds)[0], expected, rtol=1e-5, atol=1e-5)


def module_op(net: Net, module: str, x: str, value: str, y: str) -> str:
    """Apply a Linear as the TorchScript exporter names it."""
    return net.op("MatMul", [x, value], y, torchscript_name(module, "MatMul"))


# --- shared weights --------------------------------------------------------------------------------------------------


def _second_matmul(net: Net) -> None:
    module_op(net, "b", "x", "w", net.result("z"))


def _through_identity(net: Net) -> None:
    module_op(net, "b", "x", net.op("Identity", ["w"], "w_again"), net.result("z"))


def _through_transpose_and_cast(net: Net) -> None:
    turned = net.op("Transpose", [net.op("Cast", ["w"], "w_cast", to=TensorProto.FLOAT)], "w_t")
    ids = net.feed("ids", TensorProto.INT64, 1)
    net.op("Gather", [turned, ids], net.result("z"), torchscript_name("b", "Gather"))


def _graph_output(net: Net) -> None:
    net.result("w")


def _graph_output_through_transpose(net: Net) -> None:
    net.op("Transpose", ["w"], net.result("z"), perm=[1, 0])


def _norm_of_the_weight(net: Net) -> None:
    net.op("ReduceSumSquare", ["w"], net.result("z"), torchscript_name("b", "Norm"))


def _reader_in_a_branch(net: Net) -> None:
    inner = Net()
    module_op(inner, "b", "x", "w", inner.result("z_then"))
    other = Net()
    other.op("MatMul", ["x", "zeros"], other.result("z_else"))
    net.weight("zeros", np.zeros((IN, OUT), np.float32))
    flag = net.feed("flag", TensorProto.BOOL, 0)
    net.op("If", [flag], net.result("z"), "/If", then_branch=inner.branch("then"), else_branch=other.branch("else"))


def _result_of_a_branch(net: Net) -> None:
    inner, other = Net(), Net()
    inner.op("Identity", ["w"], inner.result("z_then"))
    other.op("Identity", ["zeros"], other.result("z_else"))
    net.weight("zeros", np.zeros((IN, OUT), np.float32))
    flag = net.feed("flag", TensorProto.BOOL, 0)
    net.op("If", [flag], net.result("z"), "/If", then_branch=inner.branch("then"), else_branch=other.branch("else"))


def _reader_in_a_function(net: Net) -> None:
    net.functions.append(function("Use", ["a", "b"], ["c"], [helper.make_node("MatMul", ["a", "b"], ["c"])]))
    net.op("Use", ["x", "w"], net.result("z"), torchscript_name("b", "Use"), domain="own")


def _through_a_function(net: Net) -> None:
    """The function hands the weight back, and another module reads what it returns."""
    net.functions.append(function("Pass", ["a"], ["c"], [helper.make_node("Identity", ["a"], ["c"])]))
    module_op(net, "b", "x", net.op("Pass", ["w"], "w_back", "pass", domain="own"), net.result("z"))


SHARED = {
    "second MatMul": (_second_matmul, "'/b/MatMul'"),
    "through Identity": (_through_identity, "'/b/MatMul'"),
    "through Transpose and Cast": (_through_transpose_and_cast, "'/b/Gather'"),
    "graph output": (_graph_output, "output 'w'"),
    "graph output through Transpose": (_graph_output_through_transpose, "output 'z'"),
    "any other operator": (_norm_of_the_weight, "'/b/Norm'"),
    "a branch": (_reader_in_a_branch, "'/b/MatMul'"),
    "result of a branch": (_result_of_a_branch, "then_branch"),
    "a function": (_reader_in_a_function, "Use"),
    "handed back by a function": (_through_a_function, "pass"),
}


@pytest.mark.parametrize("case", SHARED)
def test_a_weight_that_others_read_is_copied(tmp_path: Path, weight: Array, factors: Factors, case: str) -> None:
    add_reader, word = SHARED[case]
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    add_reader(net)
    merged = assert_copied(tmp_path, net.model(), factors, word)
    assert len(merged.graph.node) == len(net.nodes)


@pytest.mark.parametrize("steps", [("Transpose",), ("Identity", "Transpose"), ("Cast", "Transpose", "Identity")])
@pytest.mark.parametrize("shared", [0, 1, 2, 3])
def test_a_value_between_that_others_read_is_left_to_them(
    tmp_path: Path, weight: Array, factors: Factors, steps: tuple[str, ...], shared: int
) -> None:
    """The other reader takes the tensor itself, or what one of the steps after it makes of it."""
    net = Net()
    net.feed("x")
    values = [net.weight("w", weight)]
    for index, step in enumerate(steps):
        more = {"to": TensorProto.FLOAT} if step == "Cast" else {"perm": [1, 0]} if step == "Transpose" else {}
        values.append(net.op(step, [values[-1]], f"s{index}", **more))
    module_op(net, "a", "x", values[-1], net.result("y"))
    net.op("ReduceSumSquare", [values[min(shared, len(steps))]], net.result("z"), torchscript_name("b", "Norm"))
    merged = assert_copied(tmp_path, net.model(), factors, "'/b/Norm'")
    doubled = sum(step != "Identity" for step in steps[: min(shared, len(steps))])
    assert len(merged.graph.node) == len(net.nodes) + doubled


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("third", [False, True])
def test_both_readers_are_adapted_each_its_own_way(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator, adapters: int, third: bool
) -> None:
    """By one adapter or by two; where a third reader has none, the weight stays for it."""
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    _second_matmul(net)
    if third:
        _norm_of_the_weight(net)
        net.nodes[-1].output[0] = net.result("norm")
        net.outputs.pop(-2)
    own = {"a": factors, "b": dyadic_factors(rng, OUT, IN, RANK)}
    base = write_model(tmp_path / "base.onnx", net.model())
    parts = [own] if adapters == 1 else [{name: pair} for name, pair in own.items()]
    folders = [write_peft(tmp_path / f"{i}", part, alpha=float(RANK)) for i, part in enumerate(parts)]
    merged = tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, folders, merged)
    assert len(receipt.weights) == 2
    assert len(onnx.load(merged).graph.initializer) == (3 if third else 2)
    assert loraformat.verify(merged, base, folders).holds
    x = dyadic(rng, 2, IN)
    before, after = run(base, {"x": x}), run(merged, {"x": x})
    for module, old, new in zip("ab", before, after, strict=False):
        np.testing.assert_allclose(new - old, x @ product(own[module]).T, rtol=1e-5, atol=1e-5)
    assert not third or after[2] == before[2]
    if not third:
        return
    again = tmp_path / "again.onnx"  # Of a model with copies, each reader has a weight that is its own.
    loraformat.merge(merged, folders, again)
    assert len(onnx.load(again).graph.initializer) == 3
    for module, old, new in zip("ab", before, run(again, {"x": x}), strict=False):
        np.testing.assert_allclose(new - old, 2 * x @ product(own[module]).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("files", ["one", "many"])
@pytest.mark.parametrize("external_data", ["copy", "share"])
def test_a_copy_stands_where_its_source_does(
    tmp_path: Path, weight: Array, factors: Factors, files: str, external_data: str
) -> None:
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    _second_matmul(net)
    base = write_model(tmp_path / "base.onnx", net.model(), files)
    adapter = write_peft(tmp_path / "adapter", {"a": factors}, alpha=float(RANK))
    merged = tmp_path / "merged.onnx"
    loraformat.merge(base, [adapter], merged, external_data=external_data)
    tensors = {
        t.name: {e.key: e.value for e in t.external_data}
        for t in onnx.load(merged, load_external_data=False).graph.initializer
    }
    sources = {path.name for path in tmp_path.iterdir()} - {"base.onnx", "merged.onnx", "adapter"}
    assert tensors["w"]["location"] in sources
    assert (tensors["a.weight"]["location"] == tensors["w"]["location"]) == (external_data == "copy")
    assert int(tensors["a.weight"]["offset"]) % 64 == 0
    x = dyadic(np.random.default_rng(4), 2, IN)
    (old, other), (new, same) = run(base, {"x": x}), run(merged, {"x": x})
    np.testing.assert_allclose(new - old, x @ product(factors).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(other, same)
    assert loraformat.verify(merged, base, [adapter]).holds
    data = tmp_path / tensors["a.weight"]["location"]
    spoilt = bytearray(data.read_bytes())
    spoilt[int(tensors["a.weight"]["offset"]) + 1] ^= 1
    data.write_bytes(spoilt)
    (problem,) = loraformat.verify(merged, base, [adapter]).problems
    assert (problem.code, problem.where.rpartition(": ")[2]) == ("LF802", "a.weight")


def test_what_a_copy_does_not_go_with(
    tmp_path: Path, weight: Array, factors: Factors, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    _second_matmul(net)
    base = write_model(tmp_path / "base.onnx", net.model())
    adapter, merged = write_peft(tmp_path / "adapter", {"a": factors}), tmp_path / "merged.onnx"
    before = base.read_bytes()

    def code_of(act: Callable[[], object]) -> str:
        with pytest.raises(loraformat.LoraformatError) as caught:
            act()
        assert base.read_bytes() == before
        assert not merged.exists()
        (code,) = caught.value.codes
        return code

    assert code_of(lambda: loraformat.merge_into(base, [adapter])) == "LF620"
    assert code_of(lambda: loraformat.merge(base, [adapter], merged, keep_undo=True)) == "LF622"
    with monkeypatch.context() as patch:
        patch.setattr("loraformat.containers._onnx.images.MAX_PROTOBUF_BYTES", len(before))
        assert code_of(lambda: loraformat.merge(base, [adapter], merged)) == "LF419"
    old = make_old(net.model())
    write_model(base, old, "one")
    before = base.read_bytes()
    assert code_of(lambda: loraformat.merge(base, [adapter], merged)) == "LF402"


def make_old(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model of a version in which every initializer is an input of the model too."""
    model.ir_version = 3
    declared = {entry.name for entry in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in declared:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def test_in_an_old_model_a_copy_is_a_constant(tmp_path: Path, weight: Array, factors: Factors) -> None:
    """An initializer would have to be an input, which those who run the model would see."""
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    _second_matmul(net)
    model = make_old(net.model())
    model.opset_import[0].version = 13
    base = write_model(tmp_path / "base.onnx", model)
    adapter = write_peft(tmp_path / "adapter", {"a": factors}, alpha=float(RANK))
    receipt = loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert [(each.name, each.copied_from) for each in receipt.weights] == [("a.weight", "w")]
    merged = onnx.load(tmp_path / "merged.onnx")
    onnx.checker.check_model(merged)
    assert [node.op_type for node in merged.graph.node] == ["Constant", *(node.op_type for node in net.nodes)]
    assert merged.graph.input == model.graph.input
    assert merged.graph.initializer == model.graph.initializer
    feeds = {"x": dyadic(np.random.default_rng(3), 2, IN)}
    (old, other), (new, rest) = run(base, feeds), run(tmp_path / "merged.onnx", feeds)
    np.testing.assert_allclose(new - old, feeds["x"] @ product(factors).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(other, rest)
    assert loraformat.verify(tmp_path / "merged.onnx", base, [adapter], run=True, sizes={"x_1": IN}).holds
    again = loraformat.merge(tmp_path / "merged.onnx", [adapter], tmp_path / "twice.onnx")
    assert [each.copied_from for each in again.weights] == [""]


def test_a_shared_bias_is_copied_too(tmp_path: Path, weight: Array, rng: np.random.Generator) -> None:
    net = Net()
    net.weight("a.bias", dyadic(rng, OUT))
    for index, module in enumerate("ab"):
        inputs = [net.feed(f"x{index}"), net.weight(f"{module}.weight", weight + index), "a.bias"]
        net.op("Gemm", inputs, net.result(f"y{index}"), torchscript_name(module, "Gemm"), transB=1)
    base = write_model(tmp_path / "base.onnx", net.model())
    values = dyadic(rng, OUT)
    factors = {"bias": ArrayFactor("b.bias", values)}
    target = Target("b", "replace", SlotKind.PARAMETER, factors, 0, Scaling(ScalingRule.MULTIPLIER, 1.0))
    receipt = loraformat.merge(base, [make_adapter(target)], tmp_path / "merged.onnx")
    assert [(each.name, each.copied_from) for each in receipt.weights] == [("b.bias", "a.bias")]
    before, after = stored_weights(base), stored_weights(tmp_path / "merged.onnx")
    np.testing.assert_array_equal(after.pop("b.bias"), values)
    assert all((after[name] == before[name]).all() for name in before)
    assert onnx.load(tmp_path / "merged.onnx").graph.node[1].input[2] == "b.bias"


def test_running_both_models_proves_a_copy_too(tmp_path: Path, weight: Array, factors: Factors) -> None:
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    _second_matmul(net)
    base = write_model(tmp_path / "base.onnx", net.model())
    adapter = write_peft(tmp_path / "adapter", {"a": factors}, alpha=float(RANK))
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    found = loraformat.verify(tmp_path / "merged.onnx", base, [adapter], run=True, sizes={"x_1": IN})
    assert found.holds
    changed, other = found.runs
    assert changed.effect > 0.01
    assert changed.kept == pytest.approx(1, abs=1e-5)
    assert other.effect == other.difference == 0


@pytest.mark.parametrize("op", ["Shape", "Size"])
def test_what_asks_for_the_shape_alone_does_not_count(
    tmp_path: Path, weight: Array, factors: Factors, op: str, rng: np.random.Generator
) -> None:
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    net.op(op, ["w"], net.result("z", TensorProto.INT64, 1 if op == "Shape" else 0))
    x = dyadic(rng, 2, IN)
    assert_merged(tmp_path, net.model(), factors, "a", {"x": x}, x @ (weight + product(factors)).T)


def test_a_module_called_twice_is_one_module(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator
) -> None:
    net = Net()
    net.weight("w", weight.T)
    one = module_op(net, "a", net.feed("x"), "w", "y1")
    two = module_op(net, "a", net.feed("z"), "w", "y2")
    net.nodes[-1].name = "/a/MatMul_1"
    net.op("Sub", [one, two], net.result("y"))
    x, z = dyadic(rng, 2, IN), dyadic(rng, 2, IN)
    assert_merged(tmp_path, net.model(), factors, "a", {"x": x, "z": z}, (x - z) @ (weight + product(factors)).T)


@pytest.mark.parametrize("equal", [True, False])
def test_a_module_whose_weight_was_written_once_for_each_call(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator, equal: bool
) -> None:
    """Copies that are equal to the last bit all change; others are two weights, of which none is chosen."""
    net = Net()
    other = weight.copy()
    other[-1, -1] += 0 if equal else 2.0**-10
    one = module_op(net, "a", net.feed("x"), net.weight("v", weight.T), "y1")
    two = module_op(net, "a", net.feed("z"), net.weight("w", other.T), "y2")
    net.nodes[-1].name = "/a/MatMul_1"
    net.op("Sub", [one, two], net.result("y"))
    if not equal:
        with pytest.raises(loraformat.FindingError) as caught:
            merge_model(tmp_path, net.model(), {"a": factors})
        assert caught.value.codes == ("LF404",)
        return
    x, z = dyadic(rng, 2, IN), dyadic(rng, 2, IN)
    assert_merged(tmp_path, net.model(), factors, "a", {"x": x, "z": z}, (x - z) @ (weight + product(factors)).T)


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_a_tensors_name_does_not_tell_one_reader_from_another(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator, op: str
) -> None:
    """Two modules of equal weights, stored once under the name of one; tools have dropped the names of the nodes."""
    net = Net()
    net.weight("a.weight", weight.T)
    for index, x in enumerate(("x", "z")):
        y = net.op(op, [net.feed(x), "a.weight"], f"h{index}", f"n{index}")
        net.op("Add", [y, net.weight(f"{'ab'[index]}.bias", dyadic(rng, OUT))], net.result(f"y{index}"), f"m{index}")
    base = write_model(tmp_path / "base.onnx", net.model())
    adapter = write_peft(tmp_path / "adapter", {"a": factors}, alpha=float(RANK))
    with pytest.raises(loraformat.FindingError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert caught.value.codes == ("LF404",)
    site = f"{op} 'n1' (graph node 2, input 1)"
    entry = {"target": "a", "weight": "a.weight", "sites": [site]}
    (tmp_path / "map.json").write_text(json.dumps({"targets": [entry]}))
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", map=tmp_path / "map.json")
    feeds = {"x": dyadic(rng, 2, IN), "z": dyadic(rng, 2, IN)}
    before, after = run(base, feeds), run(tmp_path / "merged.onnx", feeds)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_allclose(after[1] - before[1], feeds["z"] @ product(factors).T, rtol=1e-5, atol=1e-5)


def test_a_module_called_twice_in_two_manners_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    """One call multiplies its weight by two: no single change of it is right for both."""
    net = Net()
    net.weight("w", dyadic(rng, 6, 6))
    net.op("Gemm", [net.feed("x"), "w"], net.result("y"), "/a/Gemm")
    net.op("Gemm", ["x", "w"], net.result("z"), "/a/Gemm_1", alpha=2.0)
    with pytest.raises(loraformat.FindingError) as caught:
        merge_model(tmp_path, net.model(), {"a": dyadic_factors(rng, 6, 6, 2)})
    assert caught.value.codes == ("LF404",)


@pytest.mark.parametrize("same_name", [False, True])
@pytest.mark.parametrize("shift", [0, 4])
def test_initializers_whose_bytes_overlap_are_parted(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator, shift: int, same_name: bool
) -> None:
    """Two tensors on the same bytes of a data file, or four bytes apart."""
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    module_op(net, "b", "x", net.weight("v", weight.T), net.result("z"))
    files = ("all.bin", "./all.bin") if same_name else ("all.bin", "all.bin")
    path = write_data_by_hand(tmp_path / "base.onnx", net.model(), {"w": (files[0], 0), "v": (files[1], shift)})
    assert_copied(tmp_path, path, factors, "'v'", "overlap")


def test_data_files_of_one_name_in_two_folders_are_two_files(
    tmp_path: Path, rng: np.random.Generator, factors: Factors
) -> None:
    one, other = dyadic(rng, OUT, IN), dyadic(rng, OUT, IN)
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", one.T), net.result("y"))
    module_op(net, "b", "x", net.weight("v", other.T), net.result("z"))
    places = {"w": ("one/data.bin", 0), "v": ("two/data.bin", 0)}
    path = write_data_by_hand(tmp_path / "base.onnx", net.model(), places)
    merged = merge_model(tmp_path, path, {"a": factors}, alpha=float(RANK))
    x = dyadic(rng, 2, IN)
    y, z = run(merged, {"x": x})
    np.testing.assert_allclose(y, x @ (one + product(factors)).T, rtol=1e-6)
    np.testing.assert_allclose(z, x @ other.T, rtol=1e-6)


# --- subgraphs -------------------------------------------------------------------------------------------------------


def choice(weight: Array, *, module_of_else: str = "a") -> Net:
    """Return an If whose branches both apply the outer weight `w`, the second to the doubled input."""
    net = Net()
    net.feed("x")
    net.weight("w", weight.T)
    then, other = Net(), Net()
    module_op(then, "a", "x", "w", then.result("y_then"))
    doubled = other.op("Add", ["x", "x"], "doubled")
    module_op(other, module_of_else, doubled, "w", other.result("y_else"))
    flag = net.feed("flag", TensorProto.BOOL, 0)
    branches = {"then_branch": then.branch("then"), "else_branch": other.branch("else")}
    net.op("If", [flag], net.result("y"), "/If", **branches)
    return net


@pytest.mark.parametrize("flag", [True, False])
def test_both_branches_of_one_module_are_one_module(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator, flag: bool
) -> None:
    """A merged decoder of Optimum: the weight lies in the outer graph, each branch reads it."""
    x = dyadic(rng, 2, IN)
    expected = (1 if flag else 2) * x @ (weight + product(factors)).T
    assert_merged(tmp_path, choice(weight).model(), factors, "a", {"x": x, "flag": np.array(flag)}, expected)


def test_branches_of_two_modules_share_it(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator
) -> None:
    model = choice(weight, module_of_else="b").model()
    assert_copied(tmp_path, model, factors, "'/b/MatMul'", "else_branch")
    x = dyadic(rng, 2, IN)
    one, other = (run(tmp_path / name, {"x": x, "flag": np.array(False)}) for name in ("base.onnx", "merged.onnx"))
    np.testing.assert_array_equal(one[0], other[0])


@pytest.mark.parametrize("constant", [False, True])
def test_a_weight_inside_a_branch(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator, constant: bool
) -> None:
    net, then, other = Net(), Net(), Net()
    net.feed("x")
    inner = then.constant("w", weight.T) if constant else then.weight("w", weight.T)
    module_op(then, "a", "x", inner, then.result("y_then"))
    other.op("MatMul", ["x", other.weight("w", np.zeros((IN, OUT), np.float32))], other.result("y_else"))
    flag = net.feed("flag", TensorProto.BOOL, 0)
    branches = {"then_branch": then.branch("then"), "else_branch": other.branch("else")}
    net.op("If", [flag], net.result("y"), "/If", **branches)
    x = dyadic(rng, 2, IN)
    merged = merge_model(tmp_path, net.model(), {"a": factors}, alpha=float(RANK))
    expected = x @ (weight + product(factors)).T
    np.testing.assert_allclose(run(merged, {"x": x, "flag": np.array(True)})[0], expected, rtol=1e-6)
    assert not run(merged, {"x": x, "flag": np.array(False)})[0].any()


def test_a_name_inside_a_branch_hides_the_outer_one(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator
) -> None:
    """ONNX forbids it, onnxruntime may run it; the inner tensor is another one and the outer keeps its one reader."""
    net, then, other = Net(), Net(), Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    module_op(then, "b", "x", then.weight("w", 2 * weight.T), then.result("z_then"))
    other.op("Identity", ["y"], other.result("z_else"))
    flag = net.feed("flag", TensorProto.BOOL, 0)
    branches = {"then_branch": then.branch("then"), "else_branch": other.branch("else")}
    net.op("If", [flag], net.result("z"), "/If", **branches)
    base = open_model(tmp_path, net.model(check=False))
    by_module = {site.module: site for site in base.sites}
    assert by_module["a"].weight is not None
    assert by_module["b"].weight is not None
    assert by_module["a"].weight.key != by_module["b"].weight.key
    assert by_module["a"].weight.consumers == {by_module["a"].id}


def test_a_loop_that_reads_an_outer_weight(tmp_path: Path, rng: np.random.Generator) -> None:
    weight, factors = dyadic(rng, 4, 4), dyadic_factors(rng, 4, 4, RANK)
    body = Net()
    body.op("Identity", ["go_in"], body.result("go_out", TensorProto.BOOL, 0))
    module_op(body, "a", "state", "w", body.result("state_out"))
    graph = body.branch("body")
    for name, kind, rank in (("step", TensorProto.INT64, 0), ("go_in", TensorProto.BOOL, 0), ("state", 1, 2)):
        graph.input.append(helper.make_tensor_value_info(name, kind, [f"{name}_{i}" for i in range(rank)]))
    net = Net()
    net.weight("w", weight.T)
    net.weight("times", np.array(2))
    net.op("Loop", ["times", "", net.feed("x")], net.result("y"), "/Loop", body=graph)
    x = dyadic(rng, 2, 4)
    changed = (weight + product(factors)).T
    assert_merged(tmp_path, net.model(), factors, "a", {"x": x}, x @ changed @ changed)


# --- functions -------------------------------------------------------------------------------------------------------


def held(weight: Array) -> onnx.FunctionProto:
    """Return a function that holds its weight as a Constant."""
    tensor = numpy_helper.from_array(np.ascontiguousarray(weight.T))
    nodes = [
        helper.make_node("Constant", [], ["w"], value=tensor),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
    ]
    return function("Held", ["a"], ["b"], nodes)


def handed() -> onnx.FunctionProto:
    """Return a function that applies a weight in the layout of torch that its caller hands in."""
    nodes = [
        helper.make_node("Transpose", ["w"], ["w_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["a", "w_t"], ["b"]),
    ]
    return function("Handed", ["a", "w"], ["b"], nodes)


def test_a_weight_held_by_a_function(tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator) -> None:
    net = Net(functions=[held(weight)])
    net.op("Held", [net.feed("x")], net.result("y"), torchscript_name("a", "Held"), domain="own")
    x = dyadic(rng, 2, IN)
    assert_merged(tmp_path, net.model(), factors, "a", {"x": x}, x @ (weight + product(factors)).T)


@pytest.mark.parametrize("named", [True, False], ids=["named calls", "unnamed calls"])
def test_a_function_that_holds_a_weight_and_is_called_by_two_modules_shares_it(
    tmp_path: Path, weight: Array, factors: Factors, named: bool
) -> None:
    net = Net(functions=[held(weight)])
    net.feed("x")
    for module, result in (("a", "y"), ("b", "z")):
        name = torchscript_name(module, "Held") if named else ""
        net.op("Held", ["x"], net.result(result), name, dynamo_scopes(module), domain="own")
    assert_shared(tmp_path, net.model(), {"a": factors}, "MatMul")


def test_a_function_called_twice_for_one_module_is_one_module(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator
) -> None:
    net = Net(functions=[held(weight)])
    once = net.op("Held", [net.feed("x")], "once", torchscript_name("a", "Held"), domain="own")
    twice = net.op("Held", [net.feed("z")], "twice", torchscript_name("a", "Held_1"), domain="own")
    net.op("Sub", [once, twice], net.result("y"))
    x, z = dyadic(rng, 2, IN), dyadic(rng, 2, IN)
    assert_merged(tmp_path, net.model(), factors, "a", {"x": x, "z": z}, (x - z) @ (weight + product(factors)).T)


def test_a_function_that_is_handed_its_weights_serves_each_module_alone(
    tmp_path: Path, rng: np.random.Generator, factors: Factors
) -> None:
    one, other = dyadic(rng, OUT, IN), dyadic(rng, OUT, IN)
    net = Net(functions=[handed()])
    net.feed("x")
    for module, result, matrix in (("a", "y", one), ("b", "z", other)):
        call = ["x", net.weight(f"p_{module}", matrix)]
        net.op("Handed", call, net.result(result), torchscript_name(module, "Handed"), domain="own")
    merged = merge_model(tmp_path, net.model(), {"a": factors}, alpha=float(RANK))
    x = dyadic(rng, 2, IN)
    y, z = run(merged, {"x": x})
    np.testing.assert_allclose(y, x @ (one + product(factors)).T, rtol=1e-6)
    np.testing.assert_allclose(z, x @ other.T, rtol=1e-6)


@pytest.mark.parametrize("named", [True, False], ids=["named calls", "unnamed calls"])
@pytest.mark.parametrize("way", ["", "Identity", "Cast", "Outer"])
def test_a_weight_handed_to_two_calls_is_copied_for_one(
    tmp_path: Path, weight: Array, factors: Factors, named: bool, way: str
) -> None:
    """Handed as it is, through a node that both calls read, or through a function around."""
    outer = function("Outer", ["p", "q"], ["r"], [helper.make_node("Handed", ["p", "q"], ["r"], domain="own")])
    net = Net(functions=[handed(), outer])
    net.feed("x")
    value = net.weight("w", weight)
    if way in ("Identity", "Cast"):
        value = net.op(way, [value], "between", **({"to": TensorProto.FLOAT} if way == "Cast" else {}))
    for module, result in (("a", "y"), ("b", "z")):
        name = torchscript_name(module, "Handed") if named else ""
        called = "Outer" if way == "Outer" else "Handed"
        net.op(called, ["x", value], net.result(result), name, dynamo_scopes(module), domain="own")
    assert_copied(tmp_path, net.model(), factors, "MatMul")


SUM = [
    helper.make_node("MatMul", ["a", "w"], ["m"]),
    helper.make_node("ReduceSum", ["w"], ["s"], keepdims=0),
    helper.make_node("Add", ["m", "s"], ["b"]),
]
HANDED = {
    "twice": (["x", "w", "w"], ["b"], [helper.make_node("MatMul", ["a", "v"], ["b"])]),
    "handed back": (["x", "w", "v"], ["b", "w"], [helper.make_node("MatMul", ["a", "w"], ["b"])]),
    "to another node too": (["x", "w", "v"], ["b"], SUM),
}
"""What a call hands to a function, what this returns, and its nodes."""


@pytest.mark.parametrize("case", HANDED)
def test_what_a_function_makes_more_of_is_not_copied(
    tmp_path: Path, weight: Array, factors: Factors, case: str
) -> None:
    given, returned, nodes = HANDED[case]
    net = Net(functions=[function("Own", ["a", "w", "v"], returned, nodes)])
    for name, array in (("w", weight.T), ("v", np.zeros_like(weight.T))):
        net.weight(name, array)
    results = ["y", "back"][: len(returned)]
    node = helper.make_node("Own", given, results, torchscript_name("a", "Own"), domain="own")
    net.nodes.append(node)
    net.op("MatMul", [net.feed("x"), "w"], net.result("z"), torchscript_name("b", "MatMul"))
    net.result("y")
    assert_shared(tmp_path, net.model(), {"a": factors}, "MatMul")


def test_unnamed_ifs_are_told_apart(tmp_path: Path, weight: Array, factors: Factors) -> None:
    """Two nodes without names, in branches without names: each reader of the weight still counts on its own."""
    net = Net()
    net.feed("x")
    net.weight("w", weight.T)
    flag = net.feed("flag", TensorProto.BOOL, 0)
    for module in ("a", "b"):
        branches = {}
        for which in ("then_branch", "else_branch"):
            inner = Net()
            inner.op("MatMul", ["x", "w"], inner.result(f"y_{module}_{which}"), "", dynamo_scopes(module))
            branches[which] = inner.branch(which)
        net.op("If", [flag], net.result(f"y_{module}"), "", **branches)
    base = open_model(tmp_path, net.model())
    assert len({site.id for site in base.sites}) == len(base.sites) == 4
    assert_copied(tmp_path, net.model(), factors, "MatMul")


def test_functions_inside_functions(tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator) -> None:
    """The evidence stands at the outermost call; the weight goes through two sets of formal names."""
    outer = function("Outer", ["p", "q"], ["r"], [helper.make_node("Handed", ["p", "q"], ["r"], domain="own")])
    net = Net(functions=[handed(), outer])
    call = [net.feed("x"), net.weight("w", weight)]
    net.op("Outer", call, net.result("y"), torchscript_name("a", "Outer"), domain="own")
    x = dyadic(rng, 2, IN)
    assert_merged(tmp_path, net.model(), factors, "a", {"x": x}, x @ (weight + product(factors)).T)


def test_a_branch_inside_a_function_sees_its_inputs(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator
) -> None:
    then, other = Net(), Net()
    then.op("MatMul", ["a", "w"], then.result("t"))
    other.op("MatMul", ["a", "w"], other.result("e"))
    branches = {"then_branch": then.branch("then"), "else_branch": other.branch("else")}
    choose = function("Choose", ["a", "w", "c"], ["b"], [helper.make_node("If", ["c"], ["b"], **branches)])
    net = Net(functions=[choose])
    call = [net.feed("x"), net.weight("w", weight.T), net.feed("flag", TensorProto.BOOL, 0)]
    net.op("Choose", call, net.result("y"), torchscript_name("a", "Choose"), domain="own")
    x = dyadic(rng, 2, IN)
    feeds = {"x": x, "flag": np.array(False)}
    assert_merged(tmp_path, net.model(), factors, "a", feeds, x @ (weight + product(factors)).T)


def test_two_initializers_of_one_name_are_refused(tmp_path: Path, weight: Array) -> None:
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    net.weight("w", 2 * weight.T)
    with pytest.raises(loraformat.InputError) as caught:
        open_model(tmp_path, net.model(check=False))
    assert caught.value.codes == ("LF118",)


def test_nested_branches_are_walked_to_their_end(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator
) -> None:
    graph = Net()
    module_op(graph, "a", "x", "w", graph.result("y0"))
    body = graph.branch("level0")
    for level in range(1, 6):
        around = Net()
        other = Net()
        module_op(other, "a", "x", "w", other.result(f"e{level}"))
        around.op("If", ["flag"], around.result(f"y{level}"), then_branch=body, else_branch=other.branch("else"))
        body = around.branch(f"level{level}")
    net = Net()
    net.feed("x")
    net.weight("w", weight.T)
    net.feed("flag", TensorProto.BOOL, 0)
    net.nodes, net.outputs = list(body.node), list(body.output)
    x = dyadic(rng, 2, IN)
    feeds = {"x": x, "flag": np.array(True)}
    assert_merged(tmp_path, net.model(), factors, "a", feeds, x @ (weight + product(factors)).T)
