"""What real exports do to weights, and that each of it is merged right or refused, never merged wrong."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import loraformat

if TYPE_CHECKING:
    from lab import Lab
    from zoo import Trained

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")


def _refused(base: Path, adapter: Path, output: Path) -> loraformat.LoraformatError:
    """Return the error of a merge that must not happen and must leave nothing behind."""
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], output)
    assert list(output.parent.iterdir()) == []
    return caught.value


def _assert_right(base: Path, trained: "Trained", output: Path) -> None:
    """Merge and compare with PEFT's unmerged model: its own merge changes both users of a shared tensor."""
    from lab import merge_checked, merged_right_or_refused

    assert merged_right_or_refused(base, trained, output)
    merge_checked(base, trained, output, force=True)


# --- BatchNorm that was folded into the layer before it --------------------------------------------------------------


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_folded_batchnorm_is_refused_by_name(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    trained = lab.trained("resnet")
    error = _refused(lab.exported("resnet", exporter), trained.folder, tmp_path / "merged.onnx")
    assert set(error.codes) == {"LF407"}
    convolutions = {target for target in trained.deltas if target.endswith(".convolution")}
    assert len(convolutions) == 7
    assert {target for target in convolutions if target in str(error)} == convolutions
    assert "do_constant_folding=False" in str(error)
    assert "optimize=False" in str(error)


def test_the_older_exporter_folds_into_convolutions_only(lab: "Lab", tmp_path: Path) -> None:
    base = lab.exported("normed", "ts")
    error = _refused(base, lab.trained("normed").folder, tmp_path / "merged.onnx")
    assert error.codes == ("LF407",)
    _assert_right(base, lab.trained("normed", ["lin", "bare"]), tmp_path / "linear.onnx")


def test_the_newer_exporter_folds_into_linear_layers_too(lab: "Lab", tmp_path: Path) -> None:
    """It keeps the weight's name, and where the layer had a bias that name as well."""
    error = _refused(lab.exported("normed", "dynamo"), lab.trained("normed").folder, tmp_path / "merged.onnx")
    assert error.codes == ("LF407",) * 3


@pytest.mark.parametrize("exporter", ["ts_nofold", "dynamo_noopt"])
def test_batchnorm_that_was_not_folded_is_no_obstacle(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    _assert_right(lab.exported("normed", exporter), lab.trained("normed"), tmp_path / "merged.onnx")


# --- tied weights ----------------------------------------------------------------------------------------------------

TIED = [("gpt2", "lm_head"), ("gpt2", "wte"), ("llama_tied", "lm_head"), ("llama_tied", "embed_tokens")]


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
@pytest.mark.parametrize(("model", "target"), TIED)
def test_tied_weights_that_were_folded_apart(
    lab: "Lab", tmp_path: Path, model: str, target: str, exporter: str
) -> None:
    """Folding makes a transposed copy for the head; the newer exporter calls the embedding's tensor lm_head.weight."""
    _assert_right(lab.exported(model, exporter), lab.trained(model, [target]), tmp_path / "merged.onnx")


# --- layers with equal numbers, stored once (test_onnx_sharing.py has those that are adapted) ------------------------


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
@pytest.mark.parametrize("model", ["twins_2d", "twins_3d"])
def test_a_layer_beside_equal_layers_is_merged(lab: "Lab", tmp_path: Path, model: str, exporter: str) -> None:
    _assert_right(lab.exported(model, exporter), lab.trained(model, ["c"]), tmp_path / "merged.onnx")


@pytest.mark.parametrize("model", ["twins_2d", "twins_3d"])
def test_equal_layers_stored_twice_are_merged(lab: "Lab", tmp_path: Path, model: str) -> None:
    _assert_right(lab.exported(model, "dynamo_noopt"), lab.trained(model, ["a", "b"]), tmp_path / "merged.onnx")


# --- adapters of other models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_an_adapter_for_another_architecture(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    error = _refused(lab.exported("llama", exporter), lab.trained("gpt2").folder, tmp_path / "merged.onnx")
    assert set(error.codes) == {"LF401"}
    assert "transformer.h.0.attn.c_attn" in str(error)


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_near_misses_are_named(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    """An adapter with one name that the base lacks: the others do not go in without it."""
    folder = _renamed(
        lab.trained("llama").folder, "layers.1.mlp.down_proj", "layers.2.mlp.down_proj", tmp_path / "adapter"
    )
    output = tmp_path / "out" / "merged.onnx"
    output.parent.mkdir()
    error = _refused(lab.exported("llama", exporter), folder, output)
    assert error.codes == ("LF401",)
    assert "model.layers.2.mlp.down_proj" in str(error)
    assert "model.layers.1.mlp.down_proj" in error.problems[0].found


def _renamed(folder: Path, old: str, new: str, into: Path) -> Path:
    """Copy a PEFT folder with part of its tensors' names replaced."""
    from safetensors.numpy import load_file, save_file

    into.mkdir()
    (into / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name.replace(old, new): array for name, array in tensors.items()}, into / "adapter_model.safetensors")
    return into


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_an_adapter_for_a_wider_model_of_the_same_kind(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    """All names fit, no shape does."""
    trained = lab.trained("bert")
    error = _refused(lab.exported("bert_wide", exporter), trained.folder, tmp_path / "merged.onnx")
    assert set(error.codes) == {"LF405"}
