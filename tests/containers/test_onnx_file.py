import contextlib
import json
import os
import tracemalloc
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import loraformat
from laws.container_laws import ContainerLaws, rewrite
from loraformat.containers.onnx_file import CONTAINER, OnnxFile, open_onnx
from loraformat.errors import LoraformatError
from loraformat.images import Blank, Copy, NewOutput
from loraformat.limits import KEEP_INLINE_BYTES
from loraformat.problems import Problem
from loraformat.receipt import RECEIPT_KEY
from loraformat.spans import Span, StoredTensor
from models import files_below, write_adapter, write_base

DICE = [np.random.default_rng(7)]
FRESH = "0a1b2c3d"
PAYLOADS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def numbers(*shape, dtype=np.float32):
    return (DICE[0].standard_normal(shape) * 0.1).astype(dtype)


def raw(name, array):
    return numpy_helper.from_array(array, name)


def typed(name, array):
    """Return a tensor in float_data, int32_data and so on."""
    return helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array.reshape(-1))


def value(name, *shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def branch(name, weight):
    node = helper.make_node("MatMul", ["h", weight.name], [f"{name}_y"], name=f"{name}_mm")
    constant = helper.make_node("Constant", [], [f"{name}_c"], value=raw("inner", numbers(5)))
    add = helper.make_node("Add", [f"{name}_y", f"{name}_c"], [f"{name}_z"])
    return helper.make_graph([node, constant, add], name, [], [value(f"{name}_z", "n", 5)], [weight])


def make_model(seed=7):
    """Return a model with tensors in every place and form: 40 → 60 → 6 → 5."""
    DICE[0] = np.random.default_rng(seed)
    function = helper.make_function(
        "own",
        "Scaled",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["k"], value=raw("in_function", numbers(1, 5))),
            helper.make_node("Mul", ["a", "k"], ["b"]),
        ],
        [helper.make_opsetid("", 18)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w.raw"], ["u"], name="first"),
        helper.make_node("Constant", [], ["bias"], name="const", value=typed("constant", numbers(60))),
        helper.make_node("Add", ["u", "bias"], ["ub"]),
        helper.make_node("MatMul", ["ub", "w.float"], ["h"], name="second"),
        helper.make_node(
            "If",
            ["flag"],
            ["z"],
            name="choose",
            then_branch=branch("then", raw("w.then", numbers(6, 5))),
            else_branch=branch("else", typed("w.else", numbers(6, 5))),
        ),
        helper.make_node("Scaled", ["z"], ["s"], domain="own"),
        helper.make_node("Constant", [], ["one"], value_float=1.5),
        helper.make_node("Mul", ["s", "one"], ["y"]),
    ]
    initializers = [
        raw("w.raw", numbers(40, 60)),
        typed("w.float", numbers(60, 6)),
        raw("small", numbers(2, 3)),
        typed("half", numbers(3, 4, dtype=np.float16)),
        typed("long", np.arange(1000, dtype=np.int64).reshape(20, 50)),
        typed("double", numbers(30, 20, dtype=np.float64)),
        raw("brain", numbers(70, 40).astype(ml_dtypes.bfloat16)),
        raw("empty", np.zeros((0, 3), np.float32)),
        raw("scalar", np.array(2.5, np.float32)),
        typed("words", np.array(["a", "b" * 6000], object)),
    ]
    graph = helper.make_graph(
        nodes,
        "main",
        [value("x", "n", 40), value("flag", kind=TensorProto.BOOL)],
        [value("y", "n", 5)],
        initializers,
    )
    graph.value_info.append(value("u", "n", 60))
    for node in graph.node:
        node.metadata_props.add(key="namespace", value=": Model/" + "layers.0: " * 30)
        node.metadata_props.add(key="note", value="Größe " + node.op_type)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9)


def save(path, model, **external):
    onnx.save(model, path, **external)
    return path


def run(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.linspace(-1, 1, 3 * 40, dtype=np.float32).reshape(3, 40)
    return [session.run(None, {"x": x, "flag": np.array(flag)})[0] for flag in (True, False)]


def pairs(ours, theirs):
    """Yield every tensor of two equal structures, found by protobuf reflection."""
    if isinstance(ours, TensorProto):
        yield ours, theirs
        return
    for field in ours.DESCRIPTOR.fields:
        if field.message_type is None or field.message_type.name == "StringStringEntryProto":
            continue
        left, right = getattr(ours, field.name), getattr(theirs, field.name)
        if field.is_repeated:
            assert len(left) == len(right)
            for one, other in zip(left, right, strict=True):
                yield from pairs(one, other)
        elif ours.HasField(field.name):
            yield from pairs(left, right)


def payload_bytes(tensor):
    if tensor.raw_data:
        return len(tensor.raw_data)
    return TensorProto(**{field: getattr(tensor, field) for field in PAYLOADS[1:]}).ByteSize()


def assert_same_structure(file, original):
    """Check that the skeleton is the model with large payloads cleared."""
    skeleton, expected = onnx.ModelProto(), onnx.ModelProto()
    skeleton.CopyFrom(file.model)
    expected.CopyFrom(original)
    for ours, theirs in pairs(skeleton, expected):
        ours.ClearField("segment")
        if payload_bytes(theirs) > KEEP_INLINE_BYTES + 16 or (
            payload_bytes(theirs) > KEEP_INLINE_BYTES and not any(getattr(ours, name) for name in PAYLOADS)
        ):
            for name in PAYLOADS:
                theirs.ClearField(name)
    assert skeleton == expected


def assert_same_numbers(file, original):
    """Check every tensor against onnx; return how many had a byte range."""
    found = 0
    for ours, theirs in pairs(file.model, original):
        stored = file.stored_tensor(ours)
        if isinstance(stored, Problem):
            assert not theirs.HasField("raw_data")
            continue
        expected = numpy_helper.to_array(theirs)
        np.testing.assert_array_equal(stored.read(), expected, strict=True)
        found += 1
    return found


def write(images):
    """Write images to disk, blanks as spaces."""
    for image in images:
        image.path.parent.mkdir(parents=True, exist_ok=True)
        with open(image.path, "wb") as sink:
            for offset, piece in image.placed():
                assert sink.tell() == offset
                if isinstance(piece, Copy):
                    sink.write(piece.file.read(piece.offset, piece.length))
                else:
                    sink.write(b" " * piece.length if isinstance(piece, Blank) else piece.data)
        assert image.path.stat().st_size == image.size_bytes


def codes(call, *args):
    with pytest.raises(LoraformatError) as caught:
        call(*args)
    return caught.value.codes


# -- finding the numbers ------------------------------------------------------------------------------------------


def test_inline_tensors_of_every_form_and_place(tmp_path):
    model = make_model()
    file = open_onnx(save(tmp_path / "base.onnx", model))
    assert_same_structure(file, model)
    # All but half (int32_data), long (int64_data) and words (string_data).
    assert assert_same_numbers(file, model) == len(list(pairs(model, model))) - 3
    assert file.model.ByteSize() < model.ByteSize() / 2
    assert file.files == [file.file]
    assert file.problems == []


def test_tensors_yields_all_of_them_with_their_place(tmp_path):
    model = make_model()
    file = open_onnx(save(tmp_path / "base.onnx", model))
    places = [(scope, tensor.name) for scope, tensor in file.tensors()]
    assert sorted(name for _, name in places) == sorted(tensor.name for tensor, _ in pairs(model, model))
    assert ("graph", "w.raw") in places
    assert ("graph/const.value", "constant") in places
    assert ("graph/choose.then_branch", "w.then") in places
    assert ("function own::Scaled/Constant.value", "in_function") in places


def test_forms_without_a_byte_range_are_problems(tmp_path):
    file = open_onnx(save(tmp_path / "base.onnx", make_model()))
    found = {tensor.name: file.stored_tensor(tensor) for tensor in file.model.graph.initializer}
    assert found["half"].code == "LF403"
    assert "int32_data" in found["half"].found
    assert "int64_data" in found["long"].found
    assert "numpy_helper.from_array(numpy_helper.to_array(t), t.name)" in found["half"].mend
    assert found["words"].code == "LF106"
    small = file.model.graph.initializer[2]
    small.data_type = 99
    assert file.stored_tensor(small).code == "LF106"


def test_packed_nibbles_are_counted_in_half_bytes(tmp_path):
    weight = raw("q", np.arange(15).reshape(3, 5).astype(ml_dtypes.uint4))
    file = open_onnx(save(tmp_path / "q.onnx", helper.make_model(helper.make_graph([], "g", [], [], [weight]))))
    stored = file.stored_tensor(file.model.graph.initializer[0])
    assert stored.span.length == 8
    assert file.file.read(stored.span.offset, 8) == weight.raw_data


def test_sparse_and_training_tensors_are_found(tmp_path):
    model = make_model()
    sparse = helper.make_sparse_tensor(raw("sv", numbers(3)), raw("si", np.array([1, 3, 5])), [2, 4])
    model.graph.sparse_initializer.append(sparse)
    model.graph.node[0].attribute.append(
        helper.make_attribute("several", [raw("t1", numbers(2, 3)), raw("t2", numbers(4))])
    )
    model.graph.node[0].attribute.append(helper.make_attribute("sparse", sparse))
    model.graph.node[0].attribute.append(helper.make_attribute("sparses", [sparse, sparse]))
    model.graph.node[0].attribute.append(helper.make_attribute("graphs", [branch("b", raw("w.b", numbers(6, 5)))]))
    model.training_info.add().algorithm.initializer.append(raw("trained", numbers(40, 30)))
    file = open_onnx(save(tmp_path / "base.onnx", model))
    assert_same_structure(file, model)
    everything = list(pairs(model, model))
    assert assert_same_numbers(file, model) == len(everything) - 3
    assert sorted(t.name for _, t in file.tensors()) == sorted(t.name for t, _ in everything)


@pytest.mark.parametrize("one_file", [True, False])
def test_external_tensors(tmp_path, one_file):
    model = make_model()
    path = save(
        tmp_path / "base.onnx",
        onnx.ModelProto.FromString(model.SerializeToString()),
        save_as_external_data=True,
        all_tensors_to_one_file=one_file,
        location="base.onnx.data" if one_file else None,
        size_threshold=100,
        convert_attribute=True,
    )
    file = open_onnx(path)
    assert assert_same_numbers(file, onnx.load(path)) >= 8
    assert (len(file.files) == 2) == one_file
    assert file.problems == []


def test_odd_offsets_several_files_and_a_missing_length(tmp_path):
    a, b = numbers(7, 5), numbers(3, 11)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_bytes(b"xyz" + a.tobytes() + b"tail")
    (tmp_path / "b.bin").write_bytes(b.tobytes())
    graph = helper.make_graph(
        [], "g", [], [], [external("a", a.shape, "sub/a.bin", 3, 140), external("b", b.shape, "b.bin")]
    )
    file = open_onnx(save(tmp_path / "m.onnx", helper.make_model(graph)))
    first, second = (file.stored_tensor(tensor) for tensor in file.model.graph.initializer)
    np.testing.assert_array_equal(first.read(), a)
    np.testing.assert_array_equal(second.read(), b)
    assert first.span == Span(tmp_path / "sub" / "a.bin", 3, 140)
    assert assert_same_numbers(file, onnx.load(tmp_path / "m.onnx")) == 2


def external(name, shape, location, offset=None, length=None, **more):
    """Return a tensor with external data, its keys as given."""
    tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    keys = {"location": location, "offset": offset, "length": length, **more}
    for key, text in keys.items():
        if text is not None:
            tensor.external_data.add(key=key, value=str(text))
    return tensor


@pytest.mark.parametrize(
    "text", [b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n"]
)
def test_a_page_or_pointer_under_a_models_name_is_told(tmp_path, text):
    path = tmp_path / "model.onnx"
    path.write_bytes(text)
    with pytest.raises(LoraformatError) as caught:
        CONTAINER.open(path)
    assert caught.value.codes == ("LF111",)


def test_the_container_lists_the_main_graphs_initializers(tmp_path):
    model = make_model()
    model.metadata_props.add(key="author", value="nobody")
    path = save(tmp_path / "base.onnx", model)
    opened = CONTAINER.open(path)
    assert list(opened.tensors) == ["w.raw", "w.float", "small", "double", "brain", "empty", "scalar"]
    assert opened.metadata == {"author": "nobody"}
    assert CONTAINER.sniff(path.read_bytes()[:64], path.stat().st_size)
    model.graph.initializer.append(raw("small", numbers(3, 2)))
    assert codes(CONTAINER.open, save(path, model)) == ("LF118",)


class TestOnnxKeepsTheContainerLaws(ContainerLaws):
    container = CONTAINER

    def write_example(self, folder):
        model = make_model()
        ranged = [tensor for tensor in model.graph.initializer if tensor.name not in ("half", "long", "words")]
        path = save(folder / "model.onnx", model)
        return path, {tensor.name: numpy_helper.to_array(tensor) for tensor in ranged}


class TestExternalOnnxKeepsTheContainerLaws(ContainerLaws):
    container = CONTAINER
    mutations = 100

    def write_example(self, folder):
        names = ("w.raw", "small", "brain")
        model = make_model()
        weights = [tensor for tensor in model.graph.initializer if tensor.name in names]
        expected = {tensor.name: numpy_helper.to_array(tensor) for tensor in weights}
        model = helper.make_model(helper.make_graph(model.graph.node, "g", [], [], weights))
        path = save(folder / "model.onnx", model, save_as_external_data=True, location="data.bin", size_threshold=0)
        return path, expected


# -- what a hostile model may say -----------------------------------------------------------------------------------


def refuse_external(folder, tensor, name="m.onnx"):
    (folder / "w.bin").write_bytes(bytes(100))
    path = save(folder / name, helper.make_model(helper.make_graph([], "g", [], [], [tensor])))
    return codes(lambda: [open_onnx(path).stored_tensor(t) for t in open_onnx(path).model.graph.initializer])


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"location": "../w.bin"}, "LF903"),
        ({"location": "a/../../w.bin"}, "LF903"),
        ({"location": "/etc/passwd"}, "LF903"),
        ({"location": "a\\w.bin"}, "LF903"),
        ({"location": "C:w.bin"}, "LF903"),
        ({"location": ""}, "LF903"),
        ({"location": None}, "LF903"),
        ({"location": "none.bin"}, "LF100"),
        ({"location": "."}, "LF905"),
        ({"location": "m.onnx"}, "LF116"),
        ({"location": "./m.onnx"}, "LF116"),
        ({"location": "w.bin", "offset": -4}, "LF116"),
        ({"location": "w.bin", "offset": "0x4"}, "LF116"),
        ({"location": "w.bin", "offset": "1_0"}, "LF116"),
        ({"location": "w.bin", "offset": "٣"}, "LF116"),
        ({"location": "w.bin", "offset": "9" * 5000}, "LF116"),
        ({"location": "w.bin", "offset": 2**63}, "LF116"),
        ({"location": "w.bin", "offset": 77}, "LF116"),
        ({"location": "w.bin", "length": -24}, "LF116"),
        ({"location": "w.bin", "length": 23}, "LF116"),
        ({"location": "w.bin", "length": 28}, "LF116"),
        ({"location": "w.bin", "length": ""}, "LF116"),
    ],
)
def test_external_data_that_is_refused(tmp_path, keys, code):
    assert refuse_external(tmp_path, external("w", (2, 3), **keys)) == (code,)


@pytest.mark.parametrize("shape", [(2, -3), (-2, -3), (2, 13), (1,) * 9, (2**62, 2**62), (2**63 - 1,) * 8])
def test_shapes_that_are_refused(tmp_path, shape):
    assert refuse_external(tmp_path, external("w", shape, "w.bin")) == ("LF116",)
    inline = TensorProto(name="w", dims=shape, data_type=TensorProto.FLOAT, raw_data=bytes(24))
    assert refuse_external(tmp_path, inline) == ("LF116",)


@pytest.mark.parametrize(("key", "code"), [("location", "LF903"), ("offset", "LF116"), ("length", "LF116")])
def test_a_key_that_stands_twice(tmp_path, key, code):
    tensor = external("w", (2, 3), "w.bin", 0, 24)
    tensor.external_data.add(key=key, value="w.bin" if key == "location" else "24")
    assert refuse_external(tmp_path, tensor) == (code,)


def test_unknown_keys_are_ignored(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(24))
    tensor = external("w", (2, 3), "w.bin", __class__="os.system")
    tensor.external_data.add(key="__class__", value="again")
    file = open_onnx(save(tmp_path / "m.onnx", helper.make_model(helper.make_graph([], "g", [], [], [tensor]))))
    assert isinstance(file.stored_tensor(file.model.graph.initializer[0]), StoredTensor)


def test_numbers_in_two_places(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(24))
    both = external("both", (2, 3), "w.bin")
    both.raw_data = bytes(24)
    mixed = raw("mixed", numbers(2, 3))
    mixed.float_data.extend([1.0] * 6)
    wrong = TensorProto(name="wrong", dims=[6], data_type=TensorProto.INT32, float_data=[1.0] * 6)
    model = helper.make_model(helper.make_graph([], "g", [], [], [both, mixed, wrong]))
    file = open_onnx(_write(tmp_path / "m.onnx", model.SerializeToString()))  # onnx.save would tidy it up.
    assert [file.stored_tensor(tensor).code for tensor in file.model.graph.initializer] == ["LF403"] * 3


def test_a_symlink_that_leaves_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(24))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    assert refuse_external(folder, external("w", (2, 3), "link.bin")) == ("LF903",)


def test_a_pipe_as_data_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refuse_external(tmp_path, external("w", (2, 3), "pipe")) == ("LF905",)


def test_a_hub_cache_of_symlinks(tmp_path):
    model = make_model()
    (tmp_path / "work").mkdir()
    save(
        tmp_path / "work" / "model.onnx",
        onnx.ModelProto.FromString(model.SerializeToString()),
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=100,
    )
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name, blob in (("model.onnx", "11aa"), ("model.onnx_data", "22bb")):
        (tmp_path / "work" / name).rename(tmp_path / "blobs" / blob)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    file = open_onnx(snapshot / "model.onnx")
    assert assert_same_numbers(file, model) > 8
    (tmp_path / "out").mkdir()
    write(file.images(NewOutput(tmp_path / "out" / "model.onnx", 10, FRESH)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx_data"]


def test_hard_linked_data_is_a_warning(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(24))
    os.link(tmp_path / "w.bin", tmp_path / "other.bin")
    graph = helper.make_graph([], "g", [], [], [external("w", (2, 3), "w.bin"), external("v", (2, 3), "w.bin")])
    file = open_onnx(save(tmp_path / "m.onnx", helper.make_model(graph)))
    for tensor in file.model.graph.initializer:
        file.stored_tensor(tensor)
    assert [(problem.code, problem.severity) for problem in file.problems] == [("LF904", "warning")]


def test_overlaps(tmp_path):
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(bytes(200))
    (tmp_path / "c.bin").symlink_to("a.bin")
    tensors = [
        external("u", (2, 3), "a.bin", 0),
        external("v", (2, 3), "a.bin", 20),
        external("w", (2, 3), "a.bin", 44),
        external("same", (3, 2), "./a.bin", 44),
        external("link", (1, 2), "c.bin", 60),
        external("other", (2, 3), "b.bin", 0),
        external("all", (5, 10), "b.bin", 0),
        raw("inline", numbers(3, 2)),
    ]
    twin = branch("b", external("w", (2, 3), "a.bin", 44))
    node = helper.make_node("If", ["flag"], ["z"], name="choose", then_branch=twin)
    graph = helper.make_graph([node], "g", [], [], tensors)
    file = open_onnx(save(tmp_path / "m.onnx", helper.make_model(graph)))
    found = {tensor.name: file.overlaps(file.stored_tensor(tensor)) for tensor in file.model.graph.initializer}
    assert {name: sorted(names) for name, names in found.items()} == {
        "u": ["v"],
        "v": ["u"],
        "w": ["link", "same", "w"],
        "same": ["link", "w", "w"],
        "link": ["same", "w", "w"],
        "other": ["all"],
        "all": ["other"],
        "inline": [],
    }


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=12))
def test_overlaps_equal_comparing_all_pairs(tmp_path, places):
    (tmp_path / "w.bin").write_bytes(bytes(200))
    tensors = [external(str(i), (1, n), "w.bin", start) for i, (start, n) in enumerate(places)]
    file = open_onnx(save(tmp_path / "m.onnx", helper.make_model(helper.make_graph([], "g", [], [], tensors))))
    for i, (start, n) in enumerate(places):
        expected = {str(j) for j, (s, m) in enumerate(places) if j != i and s < start + 4 * n and start < s + 4 * m}
        assert set(file.overlaps(file.stored_tensor(file.model.graph.initializer[i]))) == expected


# -- outputs ------------------------------------------------------------------------------------------------------


def receipt_of(path):
    (value,) = [entry.value for entry in onnx.load(path).metadata_props if entry.key == RECEIPT_KEY]
    return value


def test_images_of_an_inline_model(tmp_path):
    path = save(tmp_path / "base.onnx", make_model())
    file = open_onnx(path)
    (image,) = file.images(NewOutput(tmp_path / "out.onnx", 300, FRESH))
    write([image])
    data = (tmp_path / "out.onnx").read_bytes()
    assert data.startswith(path.read_bytes())
    assert data.endswith(b" " * 300)
    assert receipt_of(tmp_path / "out.onnx") == " " * 300
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    for ours, theirs in zip(run(tmp_path / "out.onnx"), run(path), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for _, tensor in file.tensors():
        stored = file.stored_tensor(tensor)
        if isinstance(stored, StoredTensor):
            assert image.locate(stored.span) == stored.span.offset


def external_model(folder, name, location, **options):
    folder.mkdir(exist_ok=True)
    options = {"size_threshold": 100, "convert_attribute": True, "location": location, **options}
    return save(folder / name, make_model(), save_as_external_data=True, **options)


@pytest.mark.parametrize(
    ("location", "renamed"),
    [
        ("base.onnx.data", "merged-model.onnx.data"),
        ("base.onnx_data", "merged-model.onnx_data"),
        ("base.data", "merged-model.data"),
        ("base_weights.bin", "merged-model_weights.bin"),
        ("weights.bin", "merged-model.weights.bin"),
        ("baseline.bin", "merged-model.baseline.bin"),
    ],
)
def test_images_rename_data_files(tmp_path, location, renamed):
    path = external_model(tmp_path, "base.onnx", location)
    file = open_onnx(path)
    images = file.images(NewOutput(tmp_path / "merged-model.onnx", 70, FRESH))
    assert [image.path.name for image in images] == [renamed, "merged-model.onnx"]
    write(images)
    expected = run(path)
    (tmp_path / location).unlink()  # The copy does not need it.
    onnx.checker.check_model(tmp_path / "merged-model.onnx", full_check=True)
    for ours, theirs in zip(run(tmp_path / "merged-model.onnx"), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_long_names_change_the_lengths_of_lengths(tmp_path):
    """The location grows by more than a hundred bytes: prefixes of one byte become two at every level."""
    path = external_model(tmp_path, "b.onnx", "b.data")
    file = open_onnx(path)
    output = tmp_path / ("long" * 40 + ".onnx")
    write(file.images(NewOutput(output, 70, FRESH)))
    assert assert_same_numbers(open_onnx(output), onnx.load(path)) > 8
    expected = onnx.load(path, load_external_data=False)
    for tensor, _ in pairs(expected, expected):
        for entry in tensor.external_data:
            entry.value = "long" * 40 + ".data" if entry.key == "location" else entry.value
    expected.metadata_props.add(key=RECEIPT_KEY, value=" " * 70)
    assert onnx.load(output, load_external_data=False) == expected


def test_several_data_files_and_folders(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "base.data").write_bytes(bytes(24))
    (tmp_path / "in" / "x").write_bytes(bytes(24))
    (tmp_path / "in" / "base.x").write_bytes(bytes(24))
    places = ["sub/base.data", "./x", "base.x", "x"]
    tensors = [external(f"w{i}", (2, 3), place, 0, 24, checksum="00") for i, place in enumerate(places)]
    path = save(tmp_path / "in" / "base.onnx", helper.make_model(helper.make_graph([], "g", [], [], tensors)))
    (tmp_path / "out").mkdir()
    images = open_onnx(path).images(NewOutput(tmp_path / "out" / "new.onnx", 0, FRESH))
    names = [str(image.path.relative_to(tmp_path / "out")) for image in images]
    # base.x would take the name that x has already.
    assert names == ["sub/new.data", "new.x", f"new-{FRESH}.x", "new.onnx"]
    write(images)
    copy = onnx.load(tmp_path / "out" / "new.onnx", load_external_data=False)
    found = [{entry.key: entry.value for entry in tensor.external_data} for tensor in copy.graph.initializer]
    assert [entries["location"] for entries in found] == ["sub/new.data", "new.x", f"new-{FRESH}.x", "new.x"]
    # A checksum would be that of the old data.
    assert all(set(entries) == {"location", "offset", "length"} for entries in found)
    assert assert_same_numbers(open_onnx(tmp_path / "out" / "new.onnx"), onnx.load(path)) == 4


def test_the_same_name_elsewhere_changes_no_byte(tmp_path):
    path = external_model(tmp_path / "in", "base.onnx", "weights.bin")
    (tmp_path / "out").mkdir()
    images = open_onnx(path).images(NewOutput(tmp_path / "out" / "base.onnx", 9, FRESH))
    assert [image.path for image in images] == [tmp_path / "out" / "weights.bin", tmp_path / "out" / "base.onnx"]
    write(images)
    assert (tmp_path / "out" / "base.onnx").read_bytes().startswith(path.read_bytes())
    again = open_onnx(path).images(NewOutput(tmp_path / "out" / "base.onnx", 9, FRESH))
    assert again[0].path.name == f"weights-{FRESH}.bin"


def test_a_taken_name_gets_fresh_digits(tmp_path):
    path = external_model(tmp_path, "base.onnx", "base.onnx.data")
    (tmp_path / "out.onnx.data").write_bytes(b"of someone else")
    images = open_onnx(path).images(NewOutput(tmp_path / "out.onnx", 9, FRESH))
    assert images[0].path.name == f"out-{FRESH}.onnx.data"
    write(images)
    assert (tmp_path / "out.onnx.data").read_bytes() == b"of someone else"
    onnx.checker.check_model(tmp_path / "out.onnx")


def test_a_data_file_never_takes_the_models_own_name(tmp_path):
    (tmp_path / "base").write_bytes(bytes(24))
    graph = helper.make_graph([], "g", [], [], [external("w", (2, 3), "base")])
    path = save(tmp_path / "base.onnx", helper.make_model(graph))
    images = open_onnx(path).images(NewOutput(tmp_path / "out", 9, FRESH))
    assert [image.path.name for image in images] == [f"out-{FRESH}", "out"]


def test_a_receipt_is_replaced_wherever_it_stands(tmp_path):
    receipt = {"weights": ["w.raw"] * 400, "n": 1.5}
    model = make_model()
    own = onnx.ModelProto()
    own.metadata_props.add(key=RECEIPT_KEY, value=json.dumps(receipt) + "   ")
    model.metadata_props.add(key="author", value="nobody")
    plain = model.SerializeToString()
    bare = open_onnx(_write(tmp_path / "plain.onnx", plain))
    for name, data in (("last.onnx", plain + own.SerializeToString()), ("first.onnx", own.SerializeToString() + plain)):
        file = open_onnx(_write(tmp_path / name, data))
        assert file.receipt == receipt
        assert file.problems == []
        write(file.images(NewOutput(tmp_path / "out.onnx", 50, FRESH)))
        assert (tmp_path / "out.onnx").read_bytes()[: len(plain)] == plain
        assert receipt_of(tmp_path / "out.onnx") == " " * 50
        onnx.checker.check_model(tmp_path / "out.onnx")
        assert_same_numbers(file, model)
    assert bare.receipt is None
    assert open_onnx(tmp_path / "last.onnx").structure_sha256 == bare.structure_sha256


def test_the_structure_digest(tmp_path):
    model = make_model()
    file = open_onnx(save(tmp_path / "base.onnx", model))
    write(file.images(NewOutput(tmp_path / "out.onnx", 123, FRESH)))
    assert open_onnx(tmp_path / "out.onnx").structure_sha256 == file.structure_sha256
    data = bytearray((tmp_path / "base.onnx").read_bytes())
    span = file.stored_tensor(file.model.graph.initializer[0]).span
    data[span.offset] ^= 1
    assert open_onnx(_write(tmp_path / "weight.onnx", data)).structure_sha256 == file.structure_sha256
    model.graph.node[0].name = "furst"
    assert open_onnx(save(tmp_path / "node.onnx", model)).structure_sha256 != file.structure_sha256


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"a": NaN}', '{"a": 1, "a": 2}'])
def test_an_unreadable_receipt_is_noted(tmp_path, text):
    model = make_model()
    model.metadata_props.add(key=RECEIPT_KEY, value=text)
    file = open_onnx(save(tmp_path / "base.onnx", model))
    assert file.receipt is None
    assert [(problem.code, problem.severity) for problem in file.problems] == [("LF104", "note")]


def _write(path, data):
    rewrite(path, data)
    return path


def test_stale_data(tmp_path):
    for name in ("out.data", "out.1", "other.data"):
        (tmp_path / name).write_bytes(bytes(24))
    tensors = [external(name, (2, 3), name) for name in ("out.data", "out.1", "other.data", "out.gone")]
    path = save(tmp_path / "out.onnx", helper.make_model(helper.make_graph([], "g", [], [], tensors)))
    assert OnnxFile.stale_data(path) == [tmp_path / "out.1", tmp_path / "out.data"]
    assert OnnxFile.stale_data(tmp_path / "none.onnx") == []
    assert OnnxFile.stale_data(_write(tmp_path / "junk.onnx", b"junk")) == []
    tensors.append(external("w", (2, 3), "../out.data"))
    save(path, helper.make_model(helper.make_graph([], "g", [], [], tensors)))
    assert OnnxFile.stale_data(path) == []


# -- large files and damaged ones ---------------------------------------------------------------------------------


def varint(number):
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


def block(number, length, data=b""):
    return varint(number * 8 + 2) + varint(length) + data


def test_a_sparse_model_of_more_than_two_gigabytes(tmp_path):
    rows, columns = 200_000_000, 3
    length = rows * columns * 4
    head = b"\x08" + varint(rows) + b"\x08" + varint(columns) + b"\x10\x01" + block(8, 3, b"big") + block(9, length)
    small = raw("small", numbers(2, 3)).SerializeToString()
    tail = block(5, len(small), small) + block(2, 4, b"main")
    tensor = block(5, len(head) + length, head)
    start = b"\x08\x09" + block(7, len(tensor) + length + len(tail)) + tensor
    path = tmp_path / "huge.onnx"
    with open(path, "wb") as sink:
        sink.write(start)
        sink.truncate(len(start) + length)
        sink.seek(len(start) + length)
        sink.write(tail)
    tracemalloc.start()
    file = open_onnx(path)
    big, little = (file.stored_tensor(tensor) for tensor in file.model.graph.initializer)
    (image,) = file.images(NewOutput(tmp_path / "out.onnx", 100, FRESH))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000
    assert (big.span.offset, big.span.length, big.shape) == (len(start), length, (rows, columns))
    assert little.read().tobytes() == raw("small", little.read()).raw_data
    assert file.model.graph.name == "main"
    assert image.size_bytes == path.stat().st_size + 100 + len(image.pieces[1].data)


SEED = make_model(seed=0).SerializeToString()
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "drop"]), st.floats(0, 1, exclude_max=True), st.integers(0, 255)
    ),
    min_size=1,
    max_size=6,
)


def mutate(mutations):
    """Return the seed with damage to its structure."""
    data, structure = bytearray(SEED), structure_offsets()
    for kind, place, value in mutations:
        at = min(structure[int(place * len(structure))], len(data) - 1)
        if kind == "flip":
            data[at] ^= value
        elif kind == "insert":
            data[at:at] = bytes([value])
        elif kind == "drop":
            del data[max(at, 1) : at + 1 + value % 4]
        elif value < 50:
            del data[max(at, 1) :]
    return bytes(data)


@cache
def structure_offsets():
    """Return the offsets of the seed that are not numbers of a large tensor."""
    payload = set()
    model = make_model(seed=0)
    for tensor, _ in pairs(model, model):
        data = tensor.raw_data or np.array(tensor.float_data, "<f4").tobytes()
        if len(data) > 200:
            payload.update(range(SEED.index(data) + 2, SEED.index(data) + len(data)))
    return [offset for offset in range(len(SEED)) if offset not in payload]


@given(MUTATIONS)
@settings(max_examples=5 * settings.default.max_examples)
def test_a_damaged_model_is_read_as_onnx_reads_it_or_refused(tmp_path, mutations):
    data = mutate(mutations)
    try:
        file = open_onnx(_write(tmp_path / "m.onnx", data))
    except LoraformatError:
        return
    for _, tensor in file.tensors():
        with contextlib.suppress(LoraformatError):
            file.stored_tensor(tensor)
    try:
        theirs = onnx.ModelProto.FromString(data)
    except Exception:
        return
    assert_same_structure(file, theirs)
    for ours, original in pairs(file.model, theirs):
        try:
            stored = file.stored_tensor(ours)
            expected = numpy_helper.to_array(original)
        except Exception:
            continue
        if isinstance(stored, StoredTensor):
            assert stored.read().tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["a\\b.onnx", "C:b.onnx", "a\udcff.onnx"])
@pytest.mark.parametrize("files", ["one", "many"])
def test_an_output_after_which_no_data_file_may_be_called_is_refused(tmp_path: Path, name: str, files: str) -> None:
    base, adapter = write_base(tmp_path / "in", files), write_adapter(tmp_path / "adapter")
    before = files_below(tmp_path)
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / name)
    assert caught.value.codes == ("LF608",)
    assert files_below(tmp_path) == before
