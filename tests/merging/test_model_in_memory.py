"""ONNX models in memory: the merged one is what a merge of the same model in a file writes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import loraformat
import loraformat.merging.model_in_memory as room
from builders import write_peft
from graphs import dyadic, dyadic_factors, linear_net, run, write_model
from loraformat.errors import LoraformatError
from models import IN, MODULES, OUT, make_weights, merged_weight, write_adapter


@pytest.fixture
def model() -> onnx.ModelProto:
    net = linear_net(make_weights())
    net.weight("table", dyadic(np.random.default_rng(3), 300, 4))
    return net.model()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "style")


def codes(call: Any) -> tuple[str, ...]:
    with pytest.raises(LoraformatError) as caught:
        call()
    return caught.value.codes


def without_receipt(model: onnx.ModelProto) -> bytes:
    bare = onnx.ModelProto.FromString(model.SerializeToString())
    kept = [entry for entry in bare.metadata_props if entry.key != "loraformat.receipt"]
    del bare.metadata_props[:]
    bare.metadata_props.extend(kept)
    return bare.SerializeToString(deterministic=True)


def test_it_is_what_a_file_becomes_and_what_was_given_stays(
    tmp_path: Path, model: onnx.ModelProto, adapter: Path
) -> None:
    before = model.SerializeToString()
    merged = loraformat.merge_model(model, [(adapter, 0.5)])
    assert model.SerializeToString() == before
    base = write_model(tmp_path / "base.onnx", model)
    receipt = loraformat.merge(base, [(adapter, 0.5)], tmp_path / "merged.onnx")
    assert without_receipt(merged.model) == without_receipt(onnx.load(tmp_path / "merged.onnx"))
    assert merged.receipt.weights == receipt.weights
    assert "loraformat.receipt" in {entry.key for entry in merged.model.metadata_props}
    again = loraformat.merge_model(before, [(adapter, 0.5)])
    assert without_receipt(again.model) == without_receipt(merged.model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.onnx", "merged.onnx", "style"]


def test_onnxruntime_runs_it(model: onnx.ModelProto, adapter: Path) -> None:
    """Its outputs are those of the graph with weights that numpy merged."""
    merged = loraformat.merge_model(model, adapter).model
    expected = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in expected.graph.initializer:
        for module in MODULES[:2]:
            array = numpy_helper.to_array(tensor)
            if np.array_equal(array, make_weights()[module].T):
                tensor.CopyFrom(numpy_helper.from_array(merged_weight(module, (1, 1.0)).T.copy(), tensor.name))
    feeds = {each.name: dyadic(np.random.default_rng(8), 3, IN) for each in model.graph.input}
    found, wanted, old = (run(each, feeds) for each in (merged, expected, model))
    assert [np.array_equal(one, other) for one, other in zip(found, wanted, strict=True)] == [True] * 3
    assert [np.array_equal(one, other) for one, other in zip(found, old, strict=True)] == [False, False, True]


@pytest.mark.parametrize("files", ["one", "many"])
def test_external_data_end_up_in_the_model(tmp_path: Path, model: onnx.ModelProto, adapter: Path, files: str) -> None:
    path = write_model(tmp_path / "in" / "base.onnx", model, files)
    outside = onnx.load(path, load_external_data=False)
    before = {each: each.read_bytes() for each in (tmp_path / "in").iterdir()}
    assert codes(lambda: loraformat.merge_model(outside, adapter)) == ("LF452",)
    assert codes(lambda: loraformat.merge_model(outside, adapter, base_dir=tmp_path)) == ("LF100",)
    merged = loraformat.merge_model(outside, adapter, base_dir=path.parent).model
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in merged.graph.initializer)
    whole = loraformat.merge_model(model, adapter).model
    found, expected = (
        {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in each.graph.initializer}
        for each in (merged, whole)
    )
    assert found == expected
    assert {each: each.read_bytes() for each in (tmp_path / "in").iterdir()} == before


def test_a_location_that_leads_outside_is_refused(tmp_path: Path, model: onnx.ModelProto, adapter: Path) -> None:
    path = write_model(tmp_path / "in" / "base.onnx", model, "one")
    outside = onnx.load(path, load_external_data=False)
    for tensor in outside.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../in/base.onnx.data"
    assert codes(lambda: loraformat.merge_model(outside, adapter, base_dir=path.parent)) == ("LF903",)


def test_a_shared_weight_is_copied_for_one_of_its_readers(tmp_path: Path) -> None:
    """What changes in the graph, and not only in numbers, is in the model as well."""
    weight = dyadic(np.random.default_rng(2), IN, OUT)
    nodes = [
        helper.make_node("MatMul", ["x", "shared"], [f"y{index}"], name=f"/m/{name}/MatMul")
        for index, name in enumerate(("one", "two"))
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [None, IN])],
        [value(f"y{index}", TensorProto.FLOAT, [None, OUT]) for index in range(2)],
        [numpy_helper.from_array(weight, "shared")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    down, up = dyadic_factors(np.random.default_rng(4), OUT, IN, 2)
    folder = write_peft(tmp_path / "one", {"m.one": (down, up)}, alpha=2)
    merged = loraformat.merge_model(model, folder).model
    feeds = {"x": dyadic(np.random.default_rng(5), 3, IN)}
    first, second = run(merged, feeds)
    np.testing.assert_array_equal(first, feeds["x"] @ (weight + (up @ down).T))
    np.testing.assert_array_equal(second, feeds["x"] @ weight)


def test_too_large_for_protobuf(model: onnx.ModelProto, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_PROTOBUF_BYTES", 1000)
    assert codes(lambda: loraformat.merge_model(model, adapter)) == ("LF452",)


@pytest.mark.parametrize("data", [b"", b"\x08\x08", b"not a model"])
def test_what_is_no_model(data: bytes, adapter: Path) -> None:
    assert codes(lambda: loraformat.merge_model(data, adapter)) == ("LF118",)


def test_it_prints_as_one_line(model: onnx.ModelProto, adapter: Path) -> None:
    text = repr(loraformat.merge_model(model, adapter))
    assert text.startswith("<MergedModel: ")
    assert "\n" not in text
