"""Who reads a weight, through subgraphs and function calls: a shared one is refused and the other reader named."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import loraformat
from builders import Factors
from graphs import (
    Array,
    Net,
    dyadic,
    dyadic_factors,
    dynamo_scopes,
    function,
    merge_model,
    product,
    run,
    torchscript_name,
    write_data_by_hand,
    write_model,
)
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
def test_a_weight_that_others_read_is_refused(tmp_path: Path, weight: Array, factors: Factors, case: str) -> None:
    add_reader, word = SHARED[case]
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    add_reader(net)
    assert_shared(tmp_path, net.model(), {"a": factors}, word)


def test_two_adapters_targets_on_the_two_readers_are_refused_too(
    tmp_path: Path, weight: Array, factors: Factors
) -> None:
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    _second_matmul(net)
    other = (factors[0], -factors[1])  # Equal ones would be one change, made once.
    assert_shared(tmp_path, net.model(), {"a": factors, "b": other}, "'/b/MatMul'", "'/a/MatMul'")


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
def test_initializers_whose_bytes_overlap_are_shared(
    tmp_path: Path, weight: Array, factors: Factors, rng: np.random.Generator, shift: int, same_name: bool
) -> None:
    """Two tensors on the same bytes of a data file, or four bytes apart."""
    net = Net()
    module_op(net, "a", net.feed("x"), net.weight("w", weight.T), net.result("y"))
    module_op(net, "b", "x", net.weight("v", weight.T), net.result("z"))
    files = ("all.bin", "./all.bin") if same_name else ("all.bin", "all.bin")
    path = write_data_by_hand(tmp_path / "base.onnx", net.model(), {"w": (files[0], 0), "v": (files[1], shift)})
    assert_shared(tmp_path, path, {"a": factors}, "'v'", "overlap")


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


def test_branches_of_two_modules_share_it(tmp_path: Path, weight: Array, factors: Factors) -> None:
    assert_shared(tmp_path, choice(weight, module_of_else="b").model(), {"a": factors}, "'/b/MatMul'", "else_branch")


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
def test_a_weight_handed_to_two_calls_is_shared(tmp_path: Path, weight: Array, factors: Factors, named: bool) -> None:
    net = Net(functions=[handed()])
    net.feed("x")
    net.weight("w", weight)
    for module, result in (("a", "y"), ("b", "z")):
        name = torchscript_name(module, "Handed") if named else ""
        net.op("Handed", ["x", "w"], net.result(result), name, dynamo_scopes(module), domain="own")
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
    assert_shared(tmp_path, net.model(), {"a": factors}, "MatMul")


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
