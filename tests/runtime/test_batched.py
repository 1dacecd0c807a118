"""Batches whose rows have adapters of their own: each row is what a run of its adapter alone gives."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import loraformat
from graphs import Array, Net, dyadic, dyadic_factors, make_adapter, make_target, run, write_model
from loraformat import runtime
from loraformat.adapter import Adapter, SlotKind

FIRST, SECOND = "model.a", "model.b"
IN, MIDDLE, OUT, VOCABULARY = 6, 9, 5, 11
INDEX = runtime.ADAPTER_INDEX


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def through(net: Net, x: str, rank: int) -> onnx.ModelProto:
    """Return a model of two layers after `x`, so that one row of a batch that leaks into another is seen twice."""
    weights = [net.weight("w", dyadic(rng(2), IN, MIDDLE)), net.weight("v", dyadic(rng(4), MIDDLE, OUT))]
    made = net.op("MatMul", [x, weights[0]], "made", "/model/a/MatMul")
    biased = net.op("Add", [made, net.weight("b", dyadic(rng(3), MIDDLE))], "biased", "/add")
    bent = net.op("Relu", [biased], "bent", "/relu")
    net.op("MatMul", [bent, weights[1]], net.result("y", rank=rank), "/model/b/MatMul")
    return net.model()


def make_rows() -> tuple[onnx.ModelProto, Array]:
    net = Net()
    return through(net, net.feed("x"), 2), dyadic(rng(), 4, IN)


def make_sequences() -> tuple[onnx.ModelProto, Array]:
    net = Net()
    return through(net, net.feed("x", rank=3), 3), dyadic(rng(), 4, 7, IN)


def make_flattened() -> tuple[onnx.ModelProto, Array]:
    """`(batch · length, in)`, as exporters leave it before a Gemm; shapes do not tell what its rows are."""
    net = Net()
    flat = net.op("Reshape", [net.feed("x", rank=3), net.weight("flat", np.array([-1, IN]))], "flat_x", "/flatten")
    model = through(net, flat, 2)
    model.graph.output[0].name = "y"
    return model, dyadic(rng(), 4, 7, IN)


def make_embedded() -> tuple[onnx.ModelProto, Array]:
    net = Net()
    table = net.weight("model.table.weight", dyadic(rng(5), VOCABULARY, IN))
    rows = net.op("Gather", [table, net.feed("x", TensorProto.INT32)], "rows", "/model/table/Gather")
    return through(net, rows, 3), rng().integers(-VOCABULARY, VOCABULARY, (4, 7)).astype(np.int32)


MODELS: dict[str, Callable[[], tuple[onnx.ModelProto, Array]]] = {
    "rows": make_rows,
    "sequences": make_sequences,
    "flattened": make_flattened,
    "embedded": make_embedded,
}


def adapters(*, embedded: bool) -> list[Adapter]:
    """Return three of different ranks and targets; the last has none but the second layer."""
    made = []
    for seed, rank in ((6, 1), (7, 3), (8, 2)):
        targets = [make_target(SECOND, dyadic_factors(rng(seed), OUT, MIDDLE, rank), scale=0.5)]
        if rank > 1 or not embedded:
            targets.append(make_target(FIRST, dyadic_factors(rng(seed + 9), MIDDLE, IN, rank + 1)))
        if rank < 3 and embedded:
            factors = dyadic(rng(seed), rank, VOCABULARY), dyadic(rng(seed), IN, rank)
            targets.append(make_target("model.table", factors, SlotKind.EMBEDDING))
        made.append(make_adapter(*targets))
    return made


@pytest.mark.parametrize("form", MODELS)
def test_each_row_is_that_of_its_adapter_alone(tmp_path: Path, form: str) -> None:
    model, x = MODELS[form]()
    base, every = write_model(tmp_path / "base.onnx", model), adapters(embedded=form == "embedded")
    single, batched = tmp_path / "single.onnx", tmp_path / "batched.onnx"
    runtime.export_runtime(base, every, single)
    done = runtime.export_runtime(base, every, batched, batched=4)
    onnx.checker.check_model(str(batched))
    assert [problem.code for problem in done.problems] == (["LF825"] if form == "flattened" else [])
    stack = runtime.adapter_feeds(batched, every)
    assert {array.shape[0] for array in stack.values()} == {5}
    alone = [run(single, {"x": x} | runtime.adapter_feeds(single, [each]))[0] for each in every]
    alone += [run(base, {"x": x})[0]] * 2  # A slot that is not filled, and the last, which never is.
    for index in ([2, 0, 4, 1], [1, 1, 1, 1], [3, -1, 2, 0]):
        (found,) = run(batched, {"x": x, INDEX: np.array(index)} | stack)
        rows = found.reshape(4, -1)
        for row, slot in enumerate(index):
            np.testing.assert_allclose(rows[row], alone[slot].reshape(4, -1)[row], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(run(batched, {"x": x})[0], alone[-1])
    np.testing.assert_array_equal(run(batched, {"x": x} | stack)[0], alone[-1])


@pytest.mark.parametrize("form", ["sequences", "flattened"])
def test_one_number_stands_for_all_rows(tmp_path: Path, form: str) -> None:
    model, x = MODELS[form]()
    base, every = write_model(tmp_path / "base.onnx", model), adapters(embedded=False)
    runtime.export_runtime(base, every, tmp_path / "batched.onnx", batched=3)
    stack = runtime.adapter_feeds(tmp_path / "batched.onnx", every)
    short, long = ({"x": x, INDEX: np.array(index)} | stack for index in ([1], [1, 1, 1, 1]))
    np.testing.assert_allclose(*(run(tmp_path / "batched.onnx", each)[0] for each in (short, long)), atol=1e-5)


def test_sequences_are_not_taken_apart(tmp_path: Path) -> None:
    """Where shapes tell that rows come first, a branch is as few nodes as can be."""
    counts = {}
    for form in ("sequences", "flattened"):
        base = write_model(tmp_path / f"{form}.onnx", MODELS[form]()[0])
        runtime.export_runtime(base, adapters(embedded=False), tmp_path / "m.onnx", batched=3, force=True)
        ops = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node if "/lora" in node.name]
        counts[form] = (len(ops), ops.count("Reshape"))
    assert counts == {"sequences": (10, 0), "flattened": (18, 6)}


def test_more_adapters_than_slots_are_refused(tmp_path: Path) -> None:
    base, every = write_model(tmp_path / "base.onnx", make_rows()[0]), adapters(embedded=False)
    runtime.export_runtime(base, every, tmp_path / "m.onnx", batched=2)
    with pytest.raises(loraformat.FindingError, match="LF829"):
        runtime.adapter_feeds(tmp_path / "m.onnx", every)
    with pytest.raises(loraformat.FindingError, match="LF829"):
        runtime.export_runtime(base, every, tmp_path / "n.onnx", batched=2, adapters_out=tmp_path)
    assert not (tmp_path / "n.onnx").exists()


def test_rows_that_do_not_come_first_are_refused_by_name(tmp_path: Path) -> None:
    net = Net()
    turned = net.op("Transpose", [net.feed("x", rank=3)], "turned", "/turn", perm=[1, 0, 2])
    base = write_model(tmp_path / "base.onnx", through(net, turned, 3))
    every = adapters(embedded=False)
    with pytest.raises(loraformat.FindingError) as caught:
        runtime.export_runtime(base, every, tmp_path / "m.onnx", batched=3)
    assert set(caught.value.codes) == {"LF825"}
    assert FIRST in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()
    runtime.export_runtime(base, every, tmp_path / "m.onnx")


def test_convolutions_are_refused_by_name(tmp_path: Path) -> None:
    net = Net()
    inputs = [net.feed("x", rank=4), net.weight("conv.weight", dyadic(rng(), 5, 3, 3, 2))]
    net.op("Conv", inputs, net.result("y", rank=4), "/conv/Conv")
    base = write_model(tmp_path / "base.onnx", net.model())
    factors = dyadic(rng(), 2, 3, 3, 2), dyadic(rng(), 5, 2, 1, 1)
    adapter = make_adapter(make_target("conv", factors, SlotKind.CONV))
    with pytest.raises(loraformat.FindingError) as caught:
        runtime.export_runtime(base, [adapter], tmp_path / "m.onnx", batched=3)
    assert caught.value.codes == ("LF825",)
