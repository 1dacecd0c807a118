"""Sets of graphs beside those of a folder, which refer to its data files: small, proven, and out of its way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import loraformat
from builders import write_peft
from graphs import Net, dyadic, dyadic_factors, linear_net, run, write_model
from loraformat.bases.onnx_set import BASE
from loraformat.loading import open_base
from models import files_below

RNG = np.random.default_rng(8)
Q, K, E = "decoder.layers.0.self_attn.q_proj", "decoder.layers.0.encoder_attn.k_proj", "encoder.layers.0.fc1"
BIG = "decoder.layers.0.fc2"
SHAPES = {Q: (64, 48), K: (56, 48), E: (72, 40), BIG: (320, 256)}
WEIGHTS = {name: dyadic(RNG, *shape) for name, shape in SHAPES.items()}
FACTORS = {name: dyadic_factors(RNG, *SHAPES[name], 2) for name in (Q, K)}


def model_of(*names: str, prefix: str = "") -> onnx.ModelProto:
    """Return a model of independent modules, whose inputs say how wide they are."""
    model = linear_net({name.removeprefix(prefix): WEIGHTS[name] for name in names}).model()
    for entry, name in zip(model.graph.input, names, strict=True):
        entry.type.tensor_type.shape.dim[1].dim_value = SHAPES[name][1]
    return model


def write_folder(folder: Path, files: str = "one") -> Path:
    """Write two decoders, one of them in a sub-folder, and an encoder of which nothing is adapted."""
    write_model(folder / "decoder_model.onnx", model_of(Q, K, BIG), files)
    write_model(folder / "past" / "decoder_model.onnx", model_of(Q, BIG), files)
    write_model(folder / "encoder_model.onnx", model_of(E, prefix="encoder."), files)
    (folder / "config.json").write_text("{}")
    return folder


def compute(graph: Path) -> list[Any]:
    model = onnx.load(graph, load_external_data=False)
    sizes = {each.name: each.type.tensor_type.shape.dim[-1].dim_value for each in model.graph.input}
    feeds = {name: dyadic(np.random.default_rng(1), 3, size) for name, size in sizes.items()}
    return run(graph, feeds)


@pytest.mark.parametrize("files", ["", "one", "many"])
def test_changed_graphs_stand_beside_theirs(tmp_path: Path, files: str) -> None:
    base = write_folder(tmp_path / "base", files)
    adapter, before = write_peft(tmp_path / "adapter", FACTORS, alpha=8.0), files_below(base)
    receipt = loraformat.merge(base, [adapter], base / "french.graphs.json", external_data="share")
    loraformat.merge(base, [adapter], tmp_path / "whole")
    after = files_below(base)
    assert {name: after[name] for name in before} == before
    added = {"decoder_model-french.onnx", "french.data", "past/decoder_model-french.onnx", "past/french.data"}
    assert after.keys() - before.keys() == {*added, "french.graphs.json"}
    assert sum(len(after[name]) for name in added) < 4 * (2 * 64 * 48 + 56 * 48) + 4000
    for name in ("decoder_model", "past/decoder_model"):
        onnx.checker.check_model(str(base / f"{name}-french.onnx"))
        for one, other in zip(
            compute(base / f"{name}-french.onnx"), compute(tmp_path / "whole" / f"{name}.onnx"), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    found = loraformat.verify(base / "french.graphs.json", base, [adapter], run=True)
    assert found.holds
    assert {each.output.partition(":")[0] for each in found.runs} == {"decoder_model.onnx", "past/decoder_model.onnx"}
    assert open_base(base / "french.graphs.json").parent_receipt["plan_sha256"] == receipt.plan_sha256
    with (base / "past" / "french.data").open("r+b") as stream:
        stream.seek(64)
        stream.write(b"\x00\x00\x81\x3f")
    assert not loraformat.verify(base / "french.graphs.json", base, [adapter]).holds


def test_sets_are_none_of_the_folders_graphs(tmp_path: Path) -> None:
    """Neither whole ones nor what a killed run has left: a list comes last, and a graph says itself what it is."""
    base = write_folder(tmp_path / "base")
    adapter, before = write_peft(tmp_path / "adapter", FACTORS, alpha=8.0), files_below(base)
    for name in ("one", "two"):
        loraformat.merge(base, [adapter], base / f"{name}.graphs.json", external_data="share")
    (base / "one.graphs.json").unlink()
    loraformat.merge(base, [adapter], tmp_path / "out")
    assert files_below(tmp_path / "out").keys() == {*before, "merge_receipt.json"}
    with pytest.raises(loraformat.LoraformatError, match="LF601"):
        loraformat.merge(base, [adapter], base / "one.graphs.json", external_data="share")
    loraformat.merge(base, [adapter], base / "one.graphs.json", external_data="share", force=True)
    assert loraformat.verify(base / "two.graphs.json", base, [adapter]).holds


def test_a_set_that_is_replaced_takes_its_files_along(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base")
    both = write_peft(tmp_path / "both", FACTORS, alpha=8.0)
    one = write_peft(tmp_path / "one", {K: FACTORS[K]}, alpha=8.0)
    before = files_below(base)
    loraformat.merge(base, [both], base / "x.graphs.json", external_data="share")
    loraformat.merge(base, [one], base / "x.graphs.json", external_data="share", force=True)
    assert files_below(base).keys() - before.keys() == {"x.graphs.json", "decoder_model-x.onnx", "x.data"}
    assert loraformat.verify(base / "x.graphs.json", base, [one], run=True).holds


def test_graphs_that_share_a_data_file_share_what_differs(tmp_path: Path) -> None:
    base, models = tmp_path / "base", {}
    for name in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
        models[name] = write_model(base / name, model_of(Q, BIG), "one")
    other = onnx.load(models["decoder_with_past_model.onnx"], load_external_data=False)
    for tensor in other.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "decoder_model.onnx.data"
    onnx.save(other, base / "decoder_with_past_model.onnx")
    (base / "decoder_with_past_model.onnx.data").unlink()
    adapter = write_peft(tmp_path / "adapter", {Q: FACTORS[Q]}, alpha=8.0)
    loraformat.merge(base, [adapter], base / "x.graphs.json", external_data="share")
    assert (base / "x.data").stat().st_size == 4 * 64 * 48
    loraformat.merge(base, [adapter], tmp_path / "whole")
    for name in models:
        merged = base / name.replace(".onnx", "-x.onnx")
        for one, two in zip(compute(merged), compute(tmp_path / "whole" / name), strict=True):
            np.testing.assert_array_equal(one, two)
    assert loraformat.verify(base / "x.graphs.json", base, [adapter]).holds


def test_copies_and_biases_of_a_set(tmp_path: Path) -> None:
    """A weight that two modules read, and a bias that a graph lacks: what a graph has more is in the set's files."""
    base = tmp_path / "base"
    net = Net()
    shared = net.weight("shared", WEIGHTS[Q].T.copy())
    for module in ("model.a", "model.b"):
        path = "/" + module.replace(".", "/")
        net.op("MatMul", [net.feed(f"in.{module}"), shared], net.result(f"out.{module}"), f"{path}/MatMul")
    model = net.model()
    for entry in model.graph.input:
        entry.type.tensor_type.shape.dim[1].dim_value = SHAPES[Q][1]
    write_model(base / "model.onnx", model, "one")
    adapter = write_peft(tmp_path / "adapter", {"model.a": FACTORS[Q]}, alpha=8.0)
    loraformat.merge(base, [adapter], base / "x.graphs.json", external_data="share")
    assert (base / "x.data").stat().st_size == 4 * 64 * 48
    found = loraformat.verify(base / "x.graphs.json", base, [adapter], run=True)
    assert found.holds
    onnx.checker.check_model(str(base / "model-x.onnx"))


REFUSED: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "no set's name": ("LF837", lambda base, adapter: merge_as(base, adapter, "merged.onnx")),
    "no name of a set": ("LF444", lambda base, adapter: merge_as(base, adapter, "merged.json")),
    "elsewhere": ("LF444", lambda base, adapter: merge_as(base, adapter, "../x.graphs.json")),
    "with links": ("LF444", lambda base, adapter: merge_as(base, adapter, "x.graphs.json", link=True)),
    "into a set": ("LF635", lambda base, adapter: loraformat.merge(set_of(base, adapter), [adapter], base / "../out")),
    "into a set's files": ("LF635", lambda base, adapter: loraformat.merge_into(set_of(base, adapter), [adapter])),
}


def merge_as(base: Path, adapter: Path, name: str, **options: Any) -> Path:
    loraformat.merge(base, [adapter], base / name, external_data="share", **options)
    return base / name


def set_of(base: Path, adapter: Path) -> Path:
    return merge_as(base, adapter, "whole.graphs.json")


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    base, adapter = write_folder(tmp_path / "base"), write_peft(tmp_path / "adapter", FACTORS, alpha=8.0)
    code, attempt = REFUSED[case]
    with pytest.raises(loraformat.LoraformatError) as caught:
        attempt(base, adapter)
    assert caught.value.codes == (code,)


@pytest.mark.parametrize("text", ['{"graphs":{}', '{"graphs":{"a.onnx":3}}', '{"graphs":{"a.onnx":"../a.onnx"}}'])
def test_hostile_lists(tmp_path: Path, text: str) -> None:
    path = write_folder(tmp_path / "base") / "x.graphs.json"
    path.write_text(text)
    assert BASE.accepts(path, text.encode(), len(text))
    with pytest.raises(loraformat.LoraformatError):
        open_base(path)


def test_the_set_is_named_after_the_adapter(tmp_path: Path) -> None:
    base, adapter = write_folder(tmp_path / "base"), write_peft(tmp_path / "style", FACTORS, alpha=8.0)
    assert loraformat.merge(base, [adapter], external_data="share").output == str(base / "style.graphs.json")
    receipts = loraformat.merge_each(base, [write_peft(tmp_path / "b", FACTORS)], base, external_data="share")
    assert [receipt.output for receipt in receipts] == [str(base / "b.graphs.json")]


def test_a_folder_with_sets_is_not_merged_into_in_place(tmp_path: Path) -> None:
    base, adapter = write_folder(tmp_path / "base"), write_peft(tmp_path / "adapter", FACTORS, alpha=8.0)
    merge_as(base, adapter, "x.graphs.json")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge_into(base, [adapter])
    assert caught.value.codes == ("LF638",)
    assert loraformat.verify(base / "x.graphs.json", base, [adapter]).holds
