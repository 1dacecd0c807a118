"""Folders of ONNX graphs: every graph that has a target is merged into, and everything else travels along."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import loraformat
from builders import Factors, write_peft
from graphs import Array, Net, dyadic, dyadic_factors, linear_net, product, run, write_data_by_hand, write_model
from loraformat.bases.onnx_folder import BASE
from loraformat.loading import open_base
from models import files_below

RNG = np.random.default_rng(3)
Q = "decoder.layers.0.self_attn.q_proj"
K = "decoder.layers.0.encoder_attn.k_proj"
E = "encoder.layers.0.self_attn.q_proj"
WEIGHTS: Mapping[str, Array] = {name: dyadic(RNG, 12, 8) for name in (Q, K, E)}
FACTORS: Mapping[str, Factors] = {name: dyadic_factors(RNG, 12, 8, 2) for name in (Q, K, E)}
SIZES = {f"in.{name}_1": 8 for name in (Q, "other")}
FEED = dyadic(RNG, 3, 8)


def write_halves(folder: Path, files: str = "") -> Path:
    """Write an encoder, whose modules lack the half's name, and two decoders of the same modules."""
    write_model(folder / "encoder_model.onnx", linear_net({E.removeprefix("encoder."): WEIGHTS[E]}).model(), files)
    write_model(folder / "decoder_model.onnx", linear_net({Q: WEIGHTS[Q], K: WEIGHTS[K]}).model(), files)
    write_model(folder / "decoder_with_past_model.onnx", linear_net({Q: WEIGHTS[Q]}, "dynamo").model(), files)
    (folder / "config.json").write_text("{}")
    return folder


def check_merged(graph: Path, module: str, name: str, scale: float = 4.0) -> None:
    feeds = {entry.name: FEED for entry in onnx.load(graph, load_external_data=False).graph.input}
    outputs = [entry.name for entry in onnx.load(graph, load_external_data=False).graph.output]
    found = run(graph, feeds)[outputs.index(f"out.{module}")]
    assert np.array_equal(found, FEED @ (WEIGHTS[name] + product(FACTORS[name], scale)).T.astype(np.float32))


@pytest.mark.parametrize("files", ["", "one", "many"])
def test_every_graph_that_has_a_target(tmp_path: Path, files: str) -> None:
    base = write_halves(tmp_path / "base", files)
    adapter = write_peft(tmp_path / "adapter", FACTORS, alpha=8.0)
    receipt = loraformat.merge(base, [adapter], tmp_path / "out")
    assert len(receipt.weights) == 4
    assert receipt.adapters[0].targets == 3
    lacking = [problem for problem in receipt.problems if problem.code == "LF461"]
    assert [(each.where, K in each.found) for each in lacking] == [("decoder_with_past_model.onnx", True)]
    out = tmp_path / "out"
    assert set(files_below(out)) == {*files_below(base), "merge_receipt.json"}
    check_merged(out / "encoder_model.onnx", E.removeprefix("encoder."), E)
    check_merged(out / "decoder_model.onnx", Q, Q)
    check_merged(out / "decoder_model.onnx", K, K)
    check_merged(out / "decoder_with_past_model.onnx", Q, Q)
    assert loraformat.verify(out, base, [adapter]).holds
    assert loraformat.inspect(out).base.parent_receipt["plan_sha256"] == receipt.plan_sha256


def test_an_output_named_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_halves(tmp_path / "base", "one")
    adapter = write_peft(tmp_path / "adapter", FACTORS, alpha=8.0)
    monkeypatch.chdir(tmp_path)
    loraformat.merge("base", ["adapter"], "out", keep_undo=True)
    loraformat.merge(base, [adapter], tmp_path / "named", keep_undo=True)
    assert files_below(Path("out")) == files_below(Path("named"))
    loraformat.unmerge("out", "again")
    assert all(files_below(Path("again"))[name] == data for name, data in files_below(base).items() if ".data" in name)


def test_in_place_and_back(tmp_path: Path) -> None:
    base = write_halves(tmp_path / "base", "one")
    before, adapter = files_below(base), write_peft(tmp_path / "adapter", FACTORS, alpha=8.0)
    loraformat.merge(base, [adapter], tmp_path / "out")
    loraformat.merge_into(base, [adapter], keep_undo=True)
    merged, copied = files_below(base), files_below(tmp_path / "out")
    assert {name: merged[name] for name in before} == {name: copied[name] for name in before} != before
    loraformat.unmerge(base)
    assert {name: files_below(base)[name] for name in before} == before


def test_a_map_names_weights_by_their_graphs(tmp_path: Path) -> None:
    base, adapter = write_halves(tmp_path / "base"), write_peft(tmp_path / "adapter", FACTORS, alpha=8.0)
    found = loraformat.resolve_targets(base, adapter)
    assert [each.weight.partition(":")[0] for each in found.targets if each.target == Q] == [
        "decoder_model.onnx",
        "decoder_with_past_model.onnx",
    ]
    (tmp_path / "map.json").write_text(json.dumps(found.as_json()))
    by_map = loraformat.plan_merge(base, [adapter], tmp_path / "out", map=tmp_path / "map.json")
    assert by_map.sha256 == loraformat.plan_merge(base, [adapter], tmp_path / "out").sha256


def strip_names(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in model.graph.node:
        node.ClearField("name")
        node.ClearField("metadata_props")
    return model


def test_a_graph_that_may_hide_a_target_is_refused(tmp_path: Path) -> None:
    """Merged into one form of a model and not into the other, the two would disagree: nobody would see it."""
    base = tmp_path / "base"
    write_model(base / "model.onnx", linear_net({Q: WEIGHTS[Q]}).model())
    write_model(base / "model_optimised.onnx", strip_names(linear_net({Q: WEIGHTS[Q]}).model()))
    adapter = write_peft(tmp_path / "adapter", {Q: FACTORS[Q]}, alpha=8.0)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "out")
    assert caught.value.codes == ("LF460",)
    assert "model_optimised.onnx:onnx::MatMul_100" in caught.value.problems[0].found
    entry = {"target": Q, "weight": "model_optimised.onnx:onnx::MatMul_100"}
    (tmp_path / "map.json").write_text(json.dumps({"targets": [entry]}))
    receipt = loraformat.merge(base, [adapter], tmp_path / "out", map=tmp_path / "map.json")
    assert len(receipt.weights) == 2
    allowed = loraformat.merge(base, [adapter], tmp_path / "left", allow_unmatched=["*q_proj"])
    assert [weight.name for weight in allowed.weights] == ["model.onnx:onnx::MatMul_100"]


UNET, TEXT = "down_blocks.0.attentions.0.to_q", "text_model.encoder.layers.0.self_attn.q_proj"


def write_pipeline(folder: Path) -> Path:
    """Write a pipeline whose text encoders have modules of the same names, and whose VAE has some of the UNet's."""
    rng = np.random.default_rng(5)
    modules = {"unet": UNET, "text_encoder": TEXT, "text_encoder_2": TEXT, "vae_encoder": f"encoder.{UNET}"}
    for component, module in modules.items():
        write_model(folder / component / "model.onnx", linear_net({module: dyadic(rng, 12, 8)}).model(), "one")
    (folder / "model_index.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("targets", "graphs"),
    [
        ([f"unet.{UNET}", f"text_encoder.{TEXT}"], {"unet", "text_encoder"}),
        ([f"text_encoder_2.{TEXT}"], {"text_encoder_2"}),
        ([UNET], {"unet"}),
    ],
)
def test_parts_of_a_pipeline(tmp_path: Path, targets: list[str], graphs: set[str]) -> None:
    base = write_pipeline(tmp_path / "base")
    adapter = write_peft(tmp_path / "adapter", dict.fromkeys(targets, FACTORS[Q]), alpha=8.0)
    receipt = loraformat.merge(base, [adapter], tmp_path / "out")
    assert {weight.name.partition("/")[0] for weight in receipt.weights} == graphs
    assert not any(problem.code == "LF461" for problem in receipt.problems)
    before, after = files_below(base), files_below(tmp_path / "out")
    changed = {name.partition("/")[0] for name in before if before[name] != after[name]}
    assert changed == graphs


def test_a_module_of_several_parts_is_refused(tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "adapter", {TEXT: FACTORS[Q]}, alpha=8.0)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(write_pipeline(tmp_path / "base"), [adapter], tmp_path / "out")
    assert caught.value.codes == ("LF404",)
    assert "text_encoder, text_encoder_2" in caught.value.problems[0].found


def write_sharing(folder: Path, second: Net) -> Path:
    """Write two graphs whose weights lie in one data file, at the same place."""
    for name, net in (("prefill", linear_net({Q: WEIGHTS[Q]})), ("decode", second)):
        write_data_by_hand(folder / f"{name}.onnx", net.model(), {"onnx::MatMul_100": ("model.data", 16)})
    return folder


def test_graphs_with_one_data_file(tmp_path: Path) -> None:
    base = write_sharing(tmp_path / "base", linear_net({Q: WEIGHTS[Q]}))
    adapter = write_peft(tmp_path / "adapter", {Q: FACTORS[Q]}, alpha=8.0)
    receipt = loraformat.merge(base, [adapter], tmp_path / "out")
    assert len(receipt.weights) == 1
    for graph in ("prefill", "decode"):
        check_merged(tmp_path / "out" / f"{graph}.onnx", Q, Q)
    assert loraformat.verify(tmp_path / "out", base, [adapter]).holds


def test_one_data_file_read_otherwise_elsewhere_is_refused(tmp_path: Path) -> None:
    base = write_sharing(tmp_path / "base", linear_net({"other": WEIGHTS[Q]}))
    adapter = write_peft(tmp_path / "adapter", {Q: FACTORS[Q]}, alpha=8.0)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "out")
    assert caught.value.codes == ("LF402",)
    assert "decode.onnx" in caught.value.problems[0].found


def test_a_copy_for_one_reader_in_each_graph(tmp_path: Path) -> None:
    """Both graphs get a tensor of the same name; each is filled with its own numbers."""
    nets = {}
    for position, name in enumerate(("model", "model_2")):
        net = linear_net({Q: WEIGHTS[Q] * (position + 1)})
        net.op("MatMul", [net.feed("in.other"), "onnx::MatMul_100"], net.result("out.other"), "/other/MatMul")
        nets[name] = write_model(tmp_path / "base" / f"{name}.onnx", net.model(), "one" if position else "")
    adapter = write_peft(tmp_path / "adapter", {Q: FACTORS[Q]}, alpha=8.0)
    receipt = loraformat.merge(tmp_path / "base", [adapter], tmp_path / "out")
    assert [each.copied_from.partition(":")[0] for each in receipt.weights] == ["model.onnx", "model_2.onnx"]
    for position, name in enumerate(nets):
        first, other = run(tmp_path / "out" / f"{name}.onnx", {f"in.{Q}": FEED, "in.other": FEED})
        weight = WEIGHTS[Q] * (position + 1)
        assert np.array_equal(first, FEED @ (weight + product(FACTORS[Q], 4.0)).T.astype(np.float32))
        assert np.array_equal(other, FEED @ weight.T)
    proof = loraformat.verify(tmp_path / "out", tmp_path / "base", [adapter], run=True, sizes=SIZES)
    assert proof.holds
    assert {each.output for each in proof.runs} == {f"{name}.onnx:out.{m}" for name in nets for m in (Q, "other")}
    assert all((each.effect > 0.1) == (Q in each.output) for each in proof.runs)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_of_transformers_at_the_top_go_first(tmp_path: Path, name: str) -> None:
    base = write_halves(tmp_path / "base" / "onnx").parent
    assert open_base(base).format == "onnx folder"
    (base / name).write_bytes(b"")
    assert not BASE.accepts(base, b"", 0)


def test_weights_in_other_formats_stay_behind(tmp_path: Path) -> None:
    base = write_halves(tmp_path / "base")
    for name in ("model.ort", "model.gguf"):
        (base / name).write_bytes(b"x")
    options: dict[str, Any] = {"allow_unmatched": ["*"]}
    adapter = write_peft(tmp_path / "adapter", FACTORS, alpha=8.0)
    receipt = loraformat.merge(base, [adapter], tmp_path / "out", **options)
    assert {p.where for p in receipt.problems if p.code == "LF609"} == {"model.ort", "model.gguf"}


def test_validation_and_stamps_know_the_graphs(tmp_path: Path) -> None:
    base, adapter = write_halves(tmp_path / "base"), write_peft(tmp_path / "adapter", FACTORS, alpha=8.0)
    (verdict,) = loraformat.validate(adapter, base=base)
    assert not any(problem.severity == "error" for problem in verdict.problems)
    stamped = loraformat.stamp(loraformat.load(adapter), base)
    assert all(target.fingerprint is not None for target in stamped.targets)
    receipt = loraformat.merge(base, [(stamped, 1.0)], tmp_path / "out")
    assert len(receipt.weights) == 4


def test_one_half_alone_says_what_stands_beside_it(tmp_path: Path) -> None:
    """Who merges into one decoder of three has an adapter for one token, or for all but the first."""
    base, adapter = write_halves(tmp_path / "base"), write_peft(tmp_path / "adapter", {Q: FACTORS[Q]})
    receipt = loraformat.merge(base / "decoder_model.onnx", [adapter], tmp_path / "merged.onnx")
    (note,) = [problem for problem in receipt.problems if problem.code == "LF462"]
    assert "decoder_with_past_model.onnx" in note.found
    assert not any(problem.code == "LF462" for problem in open_base(base).problems)


def test_in_a_cache_of_the_hub_files_are_links(tmp_path: Path) -> None:
    base, blobs = write_halves(tmp_path / "base"), tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../blobs/{number}")
    adapter = write_peft(tmp_path / "adapter", FACTORS, alpha=8.0)
    assert len(loraformat.merge(base, [adapter], tmp_path / "out").weights) == 4
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_what_is_no_graph_of_the_folder(tmp_path: Path) -> None:
    base, adapter = write_halves(tmp_path / "base"), write_peft(tmp_path / "adapter", FACTORS)
    (base / "folder.onnx").mkdir()
    (base / "nowhere.onnx").symlink_to("missing")
    (base / "around").symlink_to("..")
    receipt = loraformat.merge(base, [adapter], tmp_path / "out")
    assert {p.where for p in receipt.problems if p.code == "LF609"} == {"around", "nowhere.onnx"}
    assert len(receipt.weights) == 4
    stranger = write_model(tmp_path / "stranger.onnx", linear_net({Q: WEIGHTS[Q]}).model())
    (base / "link.onnx").symlink_to(stranger)
    with pytest.raises(loraformat.LoraformatError) as caught:
        open_base(base)
    assert caught.value.codes == ("LF903",)
    (base / "link.onnx").unlink()
    (base / "broken.onnx").write_bytes(b"")
    with pytest.raises(loraformat.LoraformatError) as caught:
        open_base(base)
    assert caught.value.codes == ("LF118",)


@pytest.mark.parametrize("pattern", ["unet/*", "unet/", "unet/model.onnx"])
def test_only_the_chosen_graphs_change(tmp_path: Path, pattern: str) -> None:
    base = write_pipeline(tmp_path / "base")
    targets = [f"unet.{UNET}", f"text_encoder.{TEXT}"]
    adapter = write_peft(tmp_path / "adapter", dict.fromkeys(targets, FACTORS[Q]), alpha=8.0)
    receipt = loraformat.merge(base, [adapter], tmp_path / "out", graphs=[pattern])
    assert [(each.code, each.found) for each in receipt.problems] == [
        ("LF634", f"1 targets of graphs that were not chosen: text_encoder.{TEXT}")
    ]
    assert (len(receipt.weights), receipt.unmatched) == (1, (f"text_encoder.{TEXT}",))
    before, after = files_below(base), files_below(tmp_path / "out")
    assert {name.partition("/")[0] for name in before if before[name] != after[name]} == {"unet"}
    assert loraformat.verify(tmp_path / "out", base, [adapter]).holds
    loraformat.unmerge(tmp_path / "out", tmp_path / "back", adapters=[adapter], graphs=[pattern])
    assert files_below(tmp_path / "back")["unet/model.onnx.data"] == before["unet/model.onnx.data"]


def test_a_choice_of_graphs_decides_between_parts_and_forms(tmp_path: Path) -> None:
    """A name in several parts is ambiguous, and a form without names a doubt: neither is where it is not chosen."""
    adapter = write_peft(tmp_path / "adapter", {TEXT: FACTORS[Q]}, alpha=8.0)
    base = write_pipeline(tmp_path / "base")
    receipt = loraformat.merge(base, [adapter], tmp_path / "out", graphs=["text_encoder_2"])
    assert [weight.name.partition("/")[0] for weight in receipt.weights] == ["text_encoder_2"]
    forms = tmp_path / "forms"
    write_model(forms / "model.onnx", linear_net({Q: WEIGHTS[Q]}).model())
    write_model(forms / "model_optimised.onnx", strip_names(linear_net({Q: WEIGHTS[Q]}).model()))
    other = write_peft(tmp_path / "other", {Q: FACTORS[Q]}, alpha=8.0)
    assert loraformat.merge(forms, [other], tmp_path / "some", graphs=["model.onnx"]).problems == ()
    for pattern, code in (("model_optimised.onnx", "LF401"), ("gone*", "LF633")):
        with pytest.raises(loraformat.LoraformatError) as caught:
            loraformat.merge(forms, [other], tmp_path / "none", graphs=[pattern])
        assert caught.value.codes == (code,)
    assert not loraformat.resolve_targets(forms, other, graphs=["model_optimised.onnx"]).is_whole
    with pytest.raises(loraformat.LoraformatError, match="LF633"):
        loraformat.merge(forms / "model.onnx", [other], tmp_path / "none.onnx", graphs=["model.onnx"])


def test_links_of_what_is_no_data_file(tmp_path: Path) -> None:
    """A graph with its weights in it is linked where nothing of it changes; onnx reads no data of several names."""
    base = write_pipeline(tmp_path / "base")
    write_model(base / "safety_checker" / "model.onnx", linear_net({"head": dyadic(RNG, 12, 8)}).model())
    adapter = write_peft(tmp_path / "adapter", {f"unet.{UNET}": FACTORS[Q]}, alpha=8.0)
    loraformat.merge(base, [adapter], tmp_path / "out", link=True)
    counts = {name: (tmp_path / "out" / name).stat().st_nlink for name in files_below(base)}
    data = {name for name in counts if name.endswith(".data")}
    assert {name for name, count in counts.items() if count == 1} == data
    assert loraformat.verify(tmp_path / "out", base, [adapter]).holds
    onnx.checker.check_model(str(tmp_path / "out" / "text_encoder" / "model.onnx"))
