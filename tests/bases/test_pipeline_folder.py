"""Pipelines of diffusers: every component that has a target is merged into, and everything else travels along."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat
from builders import Factors, write_peft, write_tensors
from folders import write_model_folder
from graphs import Array, dyadic, dyadic_factors, product
from loraformat.bases.pipeline_folder import BASE
from loraformat.loading import open_base
from models import files_below
from torch_zips import write_torch

RNG = np.random.default_rng(3)
UNET, TEXT = "down_blocks.0.attentions.0.to_q", "text_model.encoder.layers.0.self_attn.q_proj"
OTHER = "mid_block.attentions.0.to_k"
FACTORS: Factors = dyadic_factors(RNG, 12, 8, 2)
WEIGHTS = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"
TARGETS = (f"unet.{UNET}", f"unet.{OTHER}", f"text_encoder.{TEXT}", f"text_encoder_2.{TEXT}")
LIBRARIES = {"unet": "diffusers", "vae": "diffusers", "text_encoder": "transformers", "text_encoder_2": "transformers"}


def make_weights(*modules: str) -> dict[str, Array]:
    return {f"{module}.weight": dyadic(RNG, 12, 8) for module in modules}


def write_pipeline(folder: Path) -> Path:
    """Write a pipeline with shards, a second form of them, torch's own weights, and what no reader of it takes."""
    unet, text = make_weights(UNET, OTHER), make_weights(TEXT)
    write_model_folder(folder / "unet", unet, WEIGHTS, 2, write_tensors)
    write_tensors(folder / "unet" / HALF, {name: array.astype(np.float16) for name, array in unet.items()})
    write_model_folder(folder / "text_encoder", text, "model.safetensors", 0, write_tensors)
    write_model_folder(folder / "text_encoder_2", text, "pytorch_model.bin", 0, write_torch)
    write_model_folder(folder / "vae", make_weights(f"encoder.{UNET}"), WEIGHTS, 0, write_tensors)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    write_tensors(folder / "v1-pruned.safetensors", unet)
    index = {name: [library, "Model"] for name, library in LIBRARIES.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **index, "tokenizer": ["a", "b"]}))
    return folder


def write_adapter(folder: Path, *targets: str) -> Path:
    return write_peft(folder, dict.fromkeys(targets, FACTORS), alpha=8.0)


def find_codes(base: Path, adapter: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], base.parent / "refused", **options)
    assert not (base.parent / "refused").exists()
    return caught.value.codes


def check_added(before: Mapping[str, Array], after: Mapping[str, Array]) -> None:
    assert list(after) == list(before)
    for name, array in before.items():
        expected = (array + product(FACTORS, 4.0)).astype(array.dtype)
        assert after[name].dtype == array.dtype
        assert np.array_equal(after[name], expected), name


def test_every_form_of_every_component(tmp_path: Path) -> None:
    base, adapter, out = write_pipeline(tmp_path / "base"), write_adapter(tmp_path / "a", *TARGETS), tmp_path / "out"
    receipt = loraformat.merge(base, [adapter], out)
    assert {weight.name.partition(":")[0] for weight in receipt.weights} == {
        f"unet/{WEIGHTS}",
        f"unet/{HALF}",
        "text_encoder/model.safetensors",
        "text_encoder_2/pytorch_model.bin",
    }
    assert [(each.code, each.where) for each in receipt.problems if "left out" in each.found] == [
        ("LF609", "v1-pruned.safetensors")
    ]
    before, after = files_below(base), files_below(out)
    assert set(after) == {*before, "merge_receipt.json"} - {"v1-pruned.safetensors"}
    changed = {name for name in after if after[name] != before.get(name)} - {"merge_receipt.json"}
    assert changed == {name for name in after if name.endswith((".safetensors", ".bin")) and not name.startswith("vae")}
    for name in changed - {"text_encoder_2/pytorch_model.bin"}:
        check_added(load_file(base / name), load_file(out / name))
    assert loraformat.verify(out, base, [adapter]).holds
    (out / "unet" / HALF).write_bytes(before[f"unet/{HALF}"])
    assert not loraformat.verify(out, base, [adapter]).holds


def test_in_place_and_back(tmp_path: Path) -> None:
    base, adapter = write_pipeline(tmp_path / "base"), write_adapter(tmp_path / "a", *TARGETS)
    before = files_below(base)
    loraformat.merge(base, [adapter], tmp_path / "out")
    copied = files_below(tmp_path / "out")
    loraformat.merge_into(base, [adapter], keep_undo=True)
    merged = files_below(base)
    assert {name: merged[name] for name in copied} == copied | {"merge_receipt.json": merged["merge_receipt.json"]}
    loraformat.unmerge(base)
    assert {name: files_below(base)[name] for name in before} == before


@pytest.mark.parametrize(
    ("targets", "components"),
    [((UNET,), {"unet"}), ((f"text_encoder_2.{TEXT}",), {"text_encoder_2"}), ((f"encoder.{UNET}",), {"vae"})],
)
def test_the_component_that_is_meant(tmp_path: Path, targets: tuple[str, ...], components: set[str]) -> None:
    base, adapter = write_pipeline(tmp_path / "base"), write_adapter(tmp_path / "a", *targets)
    found = loraformat.resolve_targets(base, adapter)
    assert {each.weight.partition("/")[0] for each in found.targets} == components
    (tmp_path / "map.json").write_text(json.dumps(found.as_json()))
    by_map = loraformat.plan_merge(base, [adapter], tmp_path / "out", map=tmp_path / "map.json")
    assert by_map.sha256 == loraformat.plan_merge(base, [adapter], tmp_path / "out").sha256


def test_what_is_said_of_it(tmp_path: Path) -> None:
    base, adapter = write_pipeline(tmp_path / "base"), write_adapter(tmp_path / "a", *TARGETS)
    assert open_base(base).format == BASE.name
    described = loraformat.inspect(base).as_json()
    assert (described["format"], described["tensors"], described["receipt"]) == ("pipeline folder", 7, None)
    (verdict,) = loraformat.validate(adapter, base=base)
    assert not [problem for problem in verdict.problems if problem.severity == "error"]


def test_names_of_several_components_or_none_are_refused(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base")
    assert find_codes(base, write_adapter(tmp_path / "both", TEXT)) == ("LF404",)
    lacking = write_adapter(tmp_path / "lacking", f"text_encoder_3.{TEXT}", f"unet.{UNET}")
    assert find_codes(base, lacking) == ("LF401",)
    receipt = loraformat.merge(base, [lacking], tmp_path / "out", allow_unmatched=["text_encoder_3.*"])
    assert len(receipt.weights) == 2


def test_a_form_without_a_target_is_refused(tmp_path: Path) -> None:
    base, adapter = write_pipeline(tmp_path / "base"), write_adapter(tmp_path / "a", f"unet.{UNET}", f"unet.{OTHER}")
    write_tensors(base / "unet" / HALF, make_weights(UNET))
    assert find_codes(base, adapter) == ("LF833",)
    assert len(loraformat.merge(base, [adapter], tmp_path / "out", allow_unmatched=["*to_k"]).weights) == 3


def test_a_second_index_of_shards(tmp_path: Path) -> None:
    base, adapter = write_pipeline(tmp_path / "base"), write_adapter(tmp_path / "a", f"unet.{UNET}")
    shard = "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
    (base / "unet" / HALF).rename(base / "unet" / shard)
    places = dict.fromkeys(load_file(base / "unet" / shard), shard)
    (base / "unet" / f"{WEIGHTS}.index.fp16.json").write_text(json.dumps({"weight_map": places}))
    receipt = loraformat.merge(base, [adapter], tmp_path / "out")
    assert {weight.name.partition(":")[0] for weight in receipt.weights} == {f"unet/{WEIGHTS}", f"unet/{HALF}"}
    assert set(files_below(tmp_path / "out" / "unet")) == set(files_below(base / "unet"))


def test_what_needs_new_files_is_refused_by_name(tmp_path: Path) -> None:
    base, adapter = write_pipeline(tmp_path / "base"), write_adapter(tmp_path / "a", f"unet.{UNET}")
    assert find_codes(base, adapter, dtype="bfloat16") == ("LF620",)


def test_what_takes_one_model_refuses_several(tmp_path: Path) -> None:
    base, adapter = write_pipeline(tmp_path / "base"), write_adapter(tmp_path / "a", f"unet.{UNET}")
    assert find_codes(base, adapter, base_checkpoint=base) == ("LF834",)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.extract(base, base)
    assert caught.value.codes == ("LF834",)


def test_a_pipeline_in_a_cache_of_links(tmp_path: Path) -> None:
    """A cache of the hub has every file as a link into one folder of blobs."""
    base, adapter = write_pipeline(tmp_path / "base"), write_adapter(tmp_path / "a", *TARGETS)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    for number, name in enumerate(files_below(base)):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    loraformat.merge(snapshot, [adapter], tmp_path / "out")
    assert set(files_below(tmp_path / "out")) - set(files_below(snapshot)) == {"merge_receipt.json"}
    assert loraformat.verify(tmp_path / "out", snapshot, [adapter]).holds


def test_links_of_what_stays(tmp_path: Path) -> None:
    base, adapter = write_pipeline(tmp_path / "base"), write_adapter(tmp_path / "a", f"unet.{UNET}")
    loraformat.merge(base, [adapter], tmp_path / "out", link=True)
    linked = [name for name in files_below(tmp_path / "out") if (tmp_path / "out" / name).stat().st_nlink > 1]
    assert {"text_encoder/model.safetensors", "model_index.json"} <= set(linked)
    assert not {f"unet/{HALF}", "merge_receipt.json"} & set(linked)
    assert loraformat.verify(tmp_path / "out", base, [adapter]).holds


def test_a_stamped_adapter(tmp_path: Path) -> None:
    base, adapter = write_pipeline(tmp_path / "base"), write_adapter(tmp_path / "a", f"unet.{UNET}")
    (base / "unet" / HALF).unlink()
    loraformat.save(loraformat.stamp(adapter, base), tmp_path / "stamped.safetensors")
    loraformat.merge(base, [tmp_path / "stamped.safetensors"], tmp_path / "out")
    with pytest.raises(loraformat.LoraformatError):
        loraformat.merge(tmp_path / "out", [tmp_path / "stamped.safetensors"], tmp_path / "twice")


@pytest.mark.parametrize("listed", ["{", "[]", '{"../unet": ["a", "b"], "unet": "a", ".": ["a", "b"]}'])
def test_a_folder_that_lists_no_components(tmp_path: Path, listed: str) -> None:
    base = write_pipeline(tmp_path / "base")
    (base / "model_index.json").write_text(listed)
    assert not BASE.accepts(base, b"", 0)
