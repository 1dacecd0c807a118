"""An ONNX model as a base: which files belong to it, what its copy looks like, what it says about itself."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import loraformat
from graphs import (
    FORMS,
    STYLES,
    Net,
    dyadic,
    dyadic_factors,
    linear_net,
    merge_model,
    product,
    run,
    torchscript_name,
    write_data_by_hand,
    write_model,
)
from loraformat.bases import BASES, BaseModel
from loraformat.bases.onnx_graph import BASE
from loraformat.receipt import RECEIPT_KEY

WEIGHTS = {
    f"model.layers.{layer}.{module}": shape for layer in (0, 1) for module, shape in (("up", (7, 5)), ("down", (5, 7)))
}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: dyadic(rng, *shape) for name, shape in WEIGHTS.items()}


def open_at(path: Path) -> BaseModel:
    return BASE.open(path)


def test_the_room_has_it() -> None:
    assert BASE in [member for _, member in BASES]


@pytest.mark.parametrize("style", STYLES)
def test_every_style_names_every_module(tmp_path: Path, style: str) -> None:
    base = open_at(write_model(tmp_path / "m.onnx", linear_net(weights(), style).model()))
    assert {site.module for site in base.sites} == set(WEIGHTS)
    for site in base.sites:
        assert site.weight is not None
        assert site.weight.consumers == {site.id}


@pytest.mark.parametrize("files", ["", "one", "many"])
def test_all_files_belong_to_it(tmp_path: Path, files: str) -> None:
    path = write_model(tmp_path / "m.onnx", linear_net(weights()).model(), files)
    expected = {entry.resolve() for entry in tmp_path.iterdir()}
    assert {file.path.resolve() for file in open_at(path).files} == expected
    assert len(expected) == {"": 1, "one": 2, "many": 5}[files]


@pytest.mark.parametrize("files", ["", "one"])
def test_the_structure_digest_is_that_of_everything_but_the_numbers(tmp_path: Path, files: str) -> None:
    def digest(folder: str, seed: int) -> str:
        return open_at(write_model(tmp_path / folder / "m.onnx", big(seed), files)).structure_sha256

    def big(seed: int) -> onnx.ModelProto:
        return linear_net({"a": dyadic(np.random.default_rng(seed), 70, 50)}).model()

    assert digest("one", 1) == digest("other", 2)
    renamed = linear_net({"b": dyadic(np.random.default_rng(1), 70, 50)}).model()
    assert digest("one", 1) != open_at(write_model(tmp_path / "r" / "m.onnx", renamed, files)).structure_sha256


def test_a_model_in_a_symlinked_cache_is_read(tmp_path: Path) -> None:
    """A hub cache: the names are symlinks into a store of blobs, the data file a blob beside the model's."""
    write_model(tmp_path / "blobs" / "m.onnx", linear_net(weights()).model(), "one")
    (tmp_path / "snapshot").mkdir()
    for name in ("m.onnx", "m.onnx.data"):
        os.rename(tmp_path / "blobs" / name, tmp_path / "blobs" / f"blob-{name}")
        os.symlink(tmp_path / "blobs" / f"blob-{name}", tmp_path / "snapshot" / name)
    base = open_at(tmp_path / "snapshot" / "m.onnx")
    assert {site.module for site in base.sites} == set(WEIGHTS)


def test_a_missing_data_file_is_said_to_be_missing(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", linear_net(weights()).model(), "one")
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(loraformat.InputError) as caught:
        open_at(path)
    assert caught.value.codes == ("LF100",)
    assert "m.onnx.data" in str(caught.value)


def test_a_data_file_cut_off_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", linear_net(weights()).model(), "one")
    os.truncate(tmp_path / "m.onnx.data", 100)
    with pytest.raises(loraformat.InputError) as caught:
        open_at(path)
    assert caught.value.codes == ("LF116",)


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname", "a/../../outside.bin"])
def test_a_location_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "outside.bin").write_bytes(bytes(1000))
    net = Net()
    net.op("MatMul", [net.feed("x"), net.weight("w", np.ones((5, 7), np.float32))], net.result("y"), "/a/MatMul")
    path = write_data_by_hand(tmp_path / "sub" / "m.onnx", net.model(), {"w": ("inside.bin", 0)})
    model = onnx.load(str(path), load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(loraformat.RefusedError) as caught:
        open_at(path)
    assert caught.value.codes == ("LF903",)


def test_hard_linked_data_gives_a_warning_and_is_never_linked_again(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.onnx", linear_net(weights()).model(), "one")
    os.link(tmp_path / "base.onnx.data", tmp_path / "second-name")
    assert [problem.code for problem in open_at(path).problems] == ["LF904"]
    module = next(iter(WEIGHTS))
    merge_model(tmp_path, path, {module: dyadic_factors(np.random.default_rng(1), 7, 5, 2)})
    assert (tmp_path / "merged.onnx.data").stat().st_nlink == 1


@pytest.mark.parametrize("form", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("files", ["", "one"])
def test_weights_of_every_form_behind_a_cast(tmp_path: Path, form: str, files: str) -> None:
    rng = np.random.default_rng(5)
    weight = dyadic(rng, 7, 5, step=0.5, reach=1)
    factors = dyadic(rng, 1, 5, step=1, reach=1), dyadic(rng, 7, 1, step=0.25, reach=1)
    net = Net()
    wide = net.op("Cast", [net.weight("w", weight.T.astype(FORMS[form]))], "wide", to=TensorProto.FLOAT)
    net.op("MatMul", [net.feed("x"), wide], net.result("y"), torchscript_name("a", "MatMul"))
    path = write_model(tmp_path / "base.onnx", net.model(), files)
    merged = merge_model(tmp_path, path, {"a": factors}, alpha=1.0)
    x = dyadic(rng, 2, 5)
    np.testing.assert_array_equal(run(merged, {"x": x})[0], x @ (weight + product(factors)).T)


def test_listing_tensors_finds_those_inside_nodes(tmp_path: Path) -> None:
    net = Net()
    net.op("MatMul", [net.feed("x"), net.constant("w", np.ones((5, 7), np.float32))], net.result("y"), "/a/MatMul")
    net.weight("unused", np.ones(3, np.float32))
    base = open_at(write_model(tmp_path / "m.onnx", net.model()))
    assert sorted(tensor.shape for tensor in base.list_tensors()) == [(3,), (5, 7)]


def test_a_receipt_that_is_not_json_is_a_note_and_goes(tmp_path: Path) -> None:
    model = linear_net(weights()).model()
    helper.set_model_props(model, {RECEIPT_KEY: "{not json", "author": "someone"})
    path = write_model(tmp_path / "base.onnx", model)
    base = open_at(path)
    assert base.parent_receipt is None
    assert [(problem.code, problem.severity) for problem in base.problems] == [("LF104", "note")]
    merged = merge_model(tmp_path, path, {next(iter(WEIGHTS)): dyadic_factors(np.random.default_rng(1), 7, 5, 2)})
    props = [(entry.key, entry.value[:1]) for entry in onnx.load(str(merged)).metadata_props]
    assert props == [("author", "s"), (RECEIPT_KEY, "{")]


def test_damaged_models_are_an_index_or_an_error(tmp_path: Path) -> None:
    """Any byte may be wrong: what opens must plan, or say why not."""
    net = linear_net(
        {"a": dyadic(np.random.default_rng(0), 4, 3), "b": dyadic(np.random.default_rng(1), 3, 4)}, "dynamo-unfolded"
    )
    net.functions.append(
        helper.make_function(
            "own", "F", ["p"], ["q"], [helper.make_node("Relu", ["p"], ["q"])], [helper.make_opsetid("", 18)]
        )
    )
    data = net.model().SerializeToString()
    dice = np.random.default_rng(7)
    opened = 0
    path = tmp_path / "damaged.onnx"
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(int(dice.choice([1, 1, 2, 5]))):
            damaged[int(dice.integers(len(data)))] = int(dice.integers(256))
        path.unlink(missing_ok=True)
        path.write_bytes(damaged)
        try:
            base = open_at(path)
        except loraformat.LoraformatError:
            continue
        opened += 1
        for site in base.sites:
            assert site.weight is None or site.weight.tensor.read().shape == site.weight.tensor.shape
    assert 20 < opened < 400


def test_stale_data_is_what_bears_the_output_s_own_name(tmp_path: Path) -> None:
    model = linear_net(weights()).model()
    base = open_at(write_model(tmp_path / "base.onnx", model, "one"))
    write_model(tmp_path / "m.onnx", model, "one")
    (tmp_path / "m.onnx.data.bak").write_bytes(b"mine")
    assert base.list_stale(tmp_path / "m.onnx") == [tmp_path / "m.onnx.data"]
    assert base.list_stale(tmp_path / "absent.onnx") == []
    (tmp_path / "text.onnx").write_bytes(b"hello, this is no model")
    assert base.list_stale(tmp_path / "text.onnx") == []


def test_data_of_another_model_with_a_longer_name_is_not_stale(tmp_path: Path) -> None:
    """`m.onnx` may read `model.onnx.data`, which begins with its stem but is another model's."""
    model = linear_net(weights()).model()
    write_model(tmp_path / "model.onnx", model, "one")
    write_data = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    (tmp_path / "m.onnx").write_bytes(write_data.SerializeToString())
    base = open_at(write_model(tmp_path / "base.onnx", model))
    assert base.list_stale(tmp_path / "m.onnx") == []
