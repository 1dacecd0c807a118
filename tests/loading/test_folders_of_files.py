"""Folders whose files have names of their own, and folders of folders: one is taken, of several none."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import loraformat
from builders import lora_factors, write_peft, write_tensors
from loraformat.loading import load_adapter, open_base

FACTORS = {"layers.0.fc": lora_factors(np.random.default_rng(0), 7, 5, 2)}
DIFFUSERS = {
    f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.{role}.weight": array
    for role, array in zip(("lora_A", "lora_B"), FACTORS["layers.0.fc"], strict=True)
}


def test_the_only_file_is_the_adapter(tmp_path: Path) -> None:
    write_tensors(tmp_path / "pytorch_lora_weights.safetensors", DIFFUSERS)
    (tmp_path / "README.md").write_text("a card")
    assert load_adapter(tmp_path).scheme == "diffusers"
    assert [verdict.path.name for verdict in loraformat.validate(tmp_path)] == ["pytorch_lora_weights.safetensors"]


def test_of_several_files_one_is_to_be_named(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        write_tensors(tmp_path / name, DIFFUSERS)
    with pytest.raises(loraformat.InputError) as caught:
        load_adapter(tmp_path)
    assert caught.value.problems[0].advice == (
        f"Name the one that you mean: {tmp_path / 'a.safetensors'}, {tmp_path / 'b.safetensors'}."
    )


def test_checkpoints_of_a_trainer_are_named(tmp_path: Path) -> None:
    write_peft(tmp_path / "checkpoint-500", FACTORS)
    shutil.copytree(tmp_path / "checkpoint-500", tmp_path / "checkpoint-1000")
    with pytest.raises(loraformat.InputError) as caught:
        load_adapter(tmp_path)
    assert f"{tmp_path / 'checkpoint-1000'}, {tmp_path / 'checkpoint-500'}." in caught.value.problems[0].advice


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(loraformat.InputError, match="an empty folder"):
        load_adapter(tmp_path)


def test_tensors_of_peft_without_their_configuration(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "x.safetensors", {"base_model.model.layers.0.fc.ia3_l": np.ones((5, 1))})
    with pytest.raises(loraformat.InputError) as caught:
        load_adapter(path)
    assert "adapter_config.json" in caught.value.problems[0].advice


def test_parts_of_a_pipeline_are_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for part in ("unet", "text_encoder", "scheduler"):
        (tmp_path / part).mkdir()
    for part in ("unet", "text_encoder"):
        (tmp_path / part / "config.json").write_text("{}")
    with pytest.raises(loraformat.InputError) as caught:
        open_base(tmp_path)
    (problem,) = caught.value.problems
    assert problem.found == "a pipeline of diffusers with text_encoder, unet"
    assert f"merge {tmp_path / 'unet'} ADAPTER --allow-unmatched 'text_encoder*'" in problem.advice
