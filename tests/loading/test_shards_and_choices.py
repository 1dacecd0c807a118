"""Adapters in several files, and one of several adapters in a file."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import loraformat
from builders import lora_factors, write_peft, write_tensors
from loraformat.loading import load_adapter

FACTORS = {f"layers.{place}.fc": lora_factors(np.random.default_rng(place), 7, 5, 2) for place in range(3)}
WHOLE = "adapter_model.safetensors"


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Return a folder of two shards and their index."""
    folder = write_peft(tmp_path / "split", FACTORS)
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    halves = [sorted(tensors)[:3], sorted(tensors)[3:]]
    places = {}
    for number, names in enumerate(halves, 1):
        shard = f"adapter_model-{number:05}-of-00002.safetensors"
        write_tensors(folder / shard, {name: tensors[name] for name in names})
        places |= dict.fromkeys(names, shard)
    (folder / f"{WHOLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def read_all(path: Path) -> dict[str, dict[str, Any]]:
    targets = load_adapter(path).targets
    return {each.name: {role: factor.read().tolist() for role, factor in each.factors.items()} for each in targets}


def test_shards_are_one_adapter(split: Path, tmp_path: Path) -> None:
    whole = write_peft(tmp_path / "whole", FACTORS)
    index, first = split / f"{WHOLE}.index.json", split / "adapter_model-00001-of-00002.safetensors"
    digests = {load_adapter(path).sha256 for path in (split, index, first)}
    assert len(digests) == 1
    assert all(read_all(path) == read_all(whole) for path in (split, index, first))
    (verdict,) = loraformat.validate(split)
    assert (verdict.targets, verdict.problems) == (3, ())
    inspected = loraformat.inspect(split)
    assert inspected.as_json()["bytes"] == sum(path.stat().st_size for path in split.glob("*.safetensors"))
    index.unlink()
    assert all(read_all(path) == read_all(whole) for path in (split, first))
    assert load_adapter(split).sha256 in digests


def test_what_is_wrong_with_shards(split: Path, tmp_path: Path) -> None:
    index, second = split / f"{WHOLE}.index.json", split / "adapter_model-00002-of-00002.safetensors"
    without = shutil.copytree(split, tmp_path / "without")
    (without / index.name).unlink()
    shutil.copy(without / "adapter_model-00001-of-00002.safetensors", without / second.name)
    second.unlink()
    for folder in (split, without):
        with pytest.raises(loraformat.LoraformatError) as caught:
            load_adapter(folder)
        assert set(caught.value.codes) <= {"LF115", "LF100"}
    index.unlink()
    with pytest.raises(loraformat.LoraformatError) as caught:
        load_adapter(split)
    assert caught.value.codes == ("LF115",)
    assert "2, from 1 to 2" in caught.value.problems[0].expected


def test_a_shard_of_another_name_is_a_file(tmp_path: Path) -> None:
    whole = write_peft(tmp_path / "whole", FACTORS)
    alone = shutil.copy(whole / WHOLE, tmp_path / "some-00001-of-00009.safetensors")
    assert len(loraformat.load(alone, alpha=4).targets) == 3


def write_several(path: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """Write the state dict of a PEFT model with two adapters, and return each one's tensors."""
    made = {}
    for seed, name in enumerate(("speech", "vision"), 10):
        down, up = lora_factors(np.random.default_rng(seed), 7, 5, 2)
        made[name] = {f"fc.lora_A.{name}.weight": down, f"fc.lora_B.{name}.weight": up}
        made[name][f"head.modules_to_save.{name}.dense.weight"] = np.full((3, 4), seed, np.float32)
    tensors = {f"base_model.model.{key}": array for own in made.values() for key, array in own.items()}
    write_tensors(path, tensors)
    return made


def test_one_of_several_adapters(tmp_path: Path) -> None:
    path = tmp_path / "both.safetensors"
    made = write_several(path)
    adapter = loraformat.load(f"{path}#vision", alpha=4)
    assert [target.name for target in adapter.targets] == ["fc", "head.dense"]
    found = adapter.targets[0].factors["lora_A.weight"].read()
    np.testing.assert_array_equal(found, made["vision"]["fc.lora_A.vision.weight"])
    assert adapter.targets[1].factors["weight"].read()[0, 0] == 11
    assert [(each.code, each.severity) for each in adapter.problems] == [("LF243", "note")]
    assert adapter.sha256 != loraformat.load(f"{path}#speech", alpha=4).sha256
    (problem,) = loraformat.load(path, alpha=4).problems
    assert problem.code == "LF238"
    assert f"{path}#speech" in problem.advice
    loraformat.convert(f"{path}#vision", "peft", tmp_path / "vision", alpha=4)
    assert read_all(tmp_path / "vision").keys() == {"fc", "head.dense"}


def test_merged_under_the_name_that_was_chosen(tmp_path: Path) -> None:
    write_several(tmp_path / "both.safetensors")
    base = {"fc.weight": np.ones((7, 5), np.float32), "head.dense.weight": np.ones((3, 4), np.float32)}
    write_tensors(tmp_path / "base.safetensors", base)
    source = tmp_path / "both.safetensors"
    arguments = [(f"{source}#vision", 0.5), (f"{source}#speech", 0.5)]
    with pytest.raises(loraformat.LoraformatError):  # both replace head
        loraformat.merge(tmp_path / "base.safetensors", arguments, tmp_path / "out.safetensors", alpha=4)
    receipt = loraformat.merge(
        tmp_path / "base.safetensors", [f"{source}#vision"], tmp_path / "out.safetensors", alpha=4
    )
    assert [each.name for each in receipt.adapters] == ["vision"]


def test_one_that_is_not_there(tmp_path: Path) -> None:
    write_several(tmp_path / "both.safetensors")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.load(f"{tmp_path / 'both.safetensors'}#text", alpha=4)
    assert caught.value.codes == ("LF242",)
    assert "speech, vision" in caught.value.problems[0].found


def test_a_scheme_without_names(tmp_path: Path) -> None:
    down, up = FACTORS["layers.0.fc"]
    kohya = {
        "lora_unet_fc.lora_down.weight": down,
        "lora_unet_fc.lora_up.weight": up,
        "lora_unet_fc.alpha": np.float32(2),
    }
    write_tensors(tmp_path / "k.safetensors", {name: np.asarray(array) for name, array in kohya.items()})
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.load(f"{tmp_path / 'k.safetensors'}#text")
    assert caught.value.codes == ("LF242",)


def test_a_file_with_the_mark_in_its_name(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "style#2", FACTORS)
    assert len(load_adapter(folder).targets) == 3
