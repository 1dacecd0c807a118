"""gpt-oss: gate and up take turns in the rows of one packed parameter, and are two stacks elsewhere."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat
from builders import write_tensors

EXPERTS, RANK, HIDDEN, MLP = 3, 2, 10, 14
PACKED = "base_model.model.model.layers.0.mlp.experts"
CONFIG = {"model_type": "gpt_oss", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "hidden_size": 10}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dice = np.random.default_rng(0)
    shapes = {
        f"{PACKED}.base_layer.lora_A.weight": (EXPERTS * RANK, HIDDEN),
        f"{PACKED}.base_layer.lora_B.weight": (2 * MLP, EXPERTS * RANK),
        f"{PACKED}.lora_A.weight": (EXPERTS * RANK, MLP),
        f"{PACKED}.lora_B.weight": (HIDDEN, EXPERTS * RANK),
    }
    arrays = {name: dice.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    write_tensors(tmp_path / "adapter_model.safetensors", arrays)
    fields: dict[str, Any] = {"peft_type": "LORA", "peft_version": "0.21.2", "r": RANK, "lora_alpha": 4}
    fields |= {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": []}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_to_mlx_and_back(folder: Path) -> None:
    base, given = folder / "config.json", load_file(folder / "adapter_model.safetensors")
    loraformat.convert(folder, "mlx", folder / "mlx", base=base, verify=True)
    stacks = load_file(folder / "mlx" / "adapters.safetensors")
    up_of_expert = given[f"{PACKED}.base_layer.lora_B.weight"].reshape(2 * MLP, RANK, EXPERTS)
    for first, part in enumerate(("gate_proj", "up_proj")):
        name = f"model.layers.0.mlp.experts.{part}"
        a = given[f"{PACKED}.base_layer.lora_A.weight"].reshape(EXPERTS, RANK, HIDDEN)
        assert np.array_equal(stacks[f"{name}.lora_a"], a)
        assert np.array_equal(stacks[f"{name}.lora_b"], up_of_expert[first::2].transpose(2, 0, 1))
    loraformat.convert(folder / "mlx", "peft", folder / "back", base=base, verify=True)
    back = load_file(folder / "back" / "adapter_model.safetensors")
    assert all(np.array_equal(back[name], array) for name, array in given.items())


def test_to_gguf(folder: Path) -> None:
    loraformat.convert(folder, "gguf", folder / "a.gguf", base=folder / "config.json", verify=True)
    adapter = loraformat.load(folder / "a.gguf")
    assert {target.name.rpartition(".")[0] for target in adapter.targets} == {
        f"blk.0.ffn_{name}_exps" for name in ("gate", "up", "down")
    }


def test_without_the_base_it_is_not_split(folder: Path) -> None:
    """Llama's and Qwen's packed experts have all of gate above all of up, under the same names."""
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.convert(folder, "mlx", folder / "mlx")
    assert "LF316" in caught.value.codes
