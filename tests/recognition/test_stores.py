"""Folders in which frameworks keep tensors in a form of their own: each is said by name, with the way out."""

from pathlib import Path

import pytest

from builders import write_tensors
from loraformat.errors import LoraformatError
from loraformat.loading.adapter_folders import find_factors
from loraformat.recognition.stores import recognise_store


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("manifest.ocdbt", "d", "_METADATA"), "orbax"),
        (("__0_0.distcp", ".metadata"), "torch"),
        (("zero_pp_rank_0_mp_rank_00_optim_states.pt",), "DeepSpeed"),
        (("model.lora_config.npy", "model.lora_weights.npy"), "TensorRT"),
        (("lora_config.json", "lora_model_state.tp00.pdparams"), "Paddle"),
        (("gemma.lora.h5",), "KerasHub"),
        (("metadata.json", "adapter_weights.bin"), "Apple"),
        (("model.mlpackage",), "Core ML"),
        (("adapter_model.tensors",), "tensorizer"),
        (("adapter_shards",), "neuron"),
        (("lora_gpu.tflite",), "MediaPipe"),
    ],
)
def test_a_folder_is_refused_by_the_name_of_its_framework(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"0")
    with pytest.raises(LoraformatError) as caught:
        find_factors(tmp_path)
    assert caught.value.codes == ("LF121",)
    (problem,) = caught.value.problems
    assert words in problem.found
    assert problem.mend


def test_an_adapter_in_the_same_folder_counts(tmp_path: Path) -> None:
    (tmp_path / "zero_to_fp32.py").write_bytes(b"0")
    write_tensors(tmp_path / "adapter_model.safetensors", {})
    assert find_factors(tmp_path).name == "adapter_model.safetensors"
    assert recognise_store(("adapter_model.safetensors", "adapter_config.json")) is None
