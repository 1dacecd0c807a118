"""GGUF adapters against llama.cpp's own converter, tensor by tensor, and our tables against the gguf package's.

The converter comes in the sdist of llama-cpp-python (vendor/llama.cpp); LORAFORMAT_LLAMA_CPP names that folder.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from builders import write_peft
from loraformat.containers.gguf import CONTAINER
from loraformat.spellings import all_tables

gguf = pytest.importorskip("gguf", reason="needs gguf")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft asks transformers for it.
]

LLAMA_CPP = Path(os.environ.get("LORAFORMAT_LLAMA_CPP", "/nowhere")) / "convert_lora_to_gguf.py"
TABLES = [table for table in all_tables() if "gguf" in table.spellings]


LACKS = {
    **dict.fromkeys(("qwen2", "qwen3", "seed_oss", "exaone4", "olmo2", "granite", "smollm3"), r"_exps|_shexp|_inp"),
    "qwen3moe": r"_shexp|ffn_(?:gate|up|down)$",
    "qwen2moe": r"ffn_(?:gate|up|down)$",
    "olmoe": r"_shexp|ffn_(?:gate|up|down)$",
}
"""Architectures of a table to what others of it have and they have not."""


def test_there_are_tables_to_look_at() -> None:
    assert len(TABLES) > 3


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_names_are_those_of_the_gguf_package(table: Any) -> None:
    numbers = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    for architecture in set(table.architectures.values()):
        names = gguf.get_tensor_name_map(numbers[architecture], 12)
        for row in table.rows:
            if "gguf" not in row.paths or row.paths["transformers"] == ("lm_head",):  # Tied where the map has none.
                continue
            parted = len(row.paths["gguf"]) > len(row.paths["transformers"])  # Then mlx-lm has as many.
            for ours, theirs in zip(row.paths["mlx" if parted else "transformers"], row.paths["gguf"], strict=True):
                if architecture in LACKS and re.search(LACKS[architecture], theirs):
                    continue
                found = names.get_name(ours.replace(".{e}", "").format(i=7))
                assert found == theirs.removesuffix(".{e}").format(i=7), (architecture, ours)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "granite": {},
    "smollm3": {"pad_token_id": 0},
    "qwen2": {"head_dim": None, "hidden_size": 40},
    "qwen3": {},
    "seed_oss": {},
    "exaone4": {"layer_types": ["full_attention"] * 2},
    "olmo2": {"head_dim": None, "hidden_size": 40},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {"head_dim": None, "hidden_size": 40, "pad_token_id": 0, "partial_rotary_factor": 1.0},
}


def convert_theirs(folder: Path, base: Path, output: Path) -> None:
    command = [sys.executable, str(LLAMA_CPP), "--base", str(base), "--outfile", str(output), str(folder)]
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not LLAMA_CPP.exists(), reason="LORAFORMAT_LLAMA_CPP names no folder with convert_lora_to_gguf.py")
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_of_llama_cpps_converter(tmp_path: Path, family: str) -> None:
    pytest.importorskip("peft", reason="needs peft")
    import decoder_zoo as zoo

    model = zoo.make_model(family, **FAMILIES[family])
    modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] if family == "phi3" else zoo.LINEAR
    zoo.make_adapter(model, tmp_path / "peft", target_modules=modules)
    config = zoo.save_config(model, tmp_path / "base")
    loraformat.convert(tmp_path / "peft", "gguf", tmp_path / "ours.gguf", base=config, verify=True)
    convert_theirs(tmp_path / "peft", tmp_path / "base", tmp_path / "theirs.gguf")
    ours, theirs = (CONTAINER.open(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        assert tensor.shape == ours.tensors[name].shape, name
        assert np.array_equal(tensor.read(), ours.tensors[name].read()), name
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.metadata[key] == theirs.metadata[key]
    loraformat.convert(tmp_path / "theirs.gguf", "peft", tmp_path / "back", base=config, verify=True)
    one, other = (loraformat.load(tmp_path / name) for name in ("peft", "back"))
    for before, after in zip(one.targets, other.targets, strict=True):
        assert (before.name, before.rank, before.scale) == (after.name, after.rank, after.scale)
        assert all(np.array_equal(before.factors[role].read(), after.factors[role].read()) for role in before.factors)


@pytest.mark.skipif(not LLAMA_CPP.exists(), reason="LORAFORMAT_LLAMA_CPP names no folder with convert_lora_to_gguf.py")
def test_where_llama_cpps_converter_loses_a_scale_and_we_do_not(tmp_path: Path) -> None:
    """It ignores use_rslora and alpha_pattern: its file then acts with another strength than PEFT."""
    pytest.importorskip("peft", reason="needs peft")
    import decoder_zoo as zoo

    model = zoo.make_model("llama")
    zoo.make_adapter(model, tmp_path / "peft", use_rslora=True, r=4, lora_alpha=12)
    config = zoo.save_config(model, tmp_path / "base")
    loraformat.convert(tmp_path / "peft", "gguf", tmp_path / "ours.gguf", base=config, verify=True)
    convert_theirs(tmp_path / "peft", tmp_path / "base", tmp_path / "theirs.gguf")
    right = loraformat.load(tmp_path / "peft").targets[0].scale
    assert loraformat.load(tmp_path / "ours.gguf").targets[0].scale == right == 6.0
    assert loraformat.load(tmp_path / "theirs.gguf").targets[0].scale == 3.0


@pytest.mark.skipif(not LLAMA_CPP.exists(), reason="LORAFORMAT_LLAMA_CPP names no folder with convert_lora_to_gguf.py")
def test_the_embedding_lies_as_llama_cpp_wants_it(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft")
    import decoder_zoo as zoo

    model = zoo.make_model("llama")
    zoo.make_adapter(model, tmp_path / "peft", target_modules=["embed_tokens", "q_proj"])
    config = zoo.save_config(model, tmp_path / "base")
    loraformat.convert(tmp_path / "peft", "gguf", tmp_path / "ours.gguf", base=config, verify=True)
    convert_theirs(tmp_path / "peft", tmp_path / "base", tmp_path / "theirs.gguf")
    ours, theirs = (CONTAINER.open(tmp_path / f"{name}.gguf").tensors for name in ("ours", "theirs"))
    for name in ("token_embd.weight.lora_a", "token_embd.weight.lora_b"):
        assert np.array_equal(ours[name].read(), theirs[name].read()), name


EXPERTS = 3
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 28},
    "olmoe": {"num_experts": EXPERTS},
}


def name_experts(family: str) -> dict[str, tuple[int, int]]:
    """Return the experts' modules as they were before transformers 5, each with its shape."""
    owner, names = ("block_sparse_moe", ("w1", "w3", "w2")) if family == "mixtral" else ("mlp", ())
    names = names or ("gate_proj", "up_proj", "down_proj")
    shapes = dict(zip(names, ((28, 24), (28, 24), (24, 28)), strict=True))
    return {
        f"model.layers.{layer}.{owner}.experts.{expert}.{name}": shape
        for layer in range(2)
        for expert in range(EXPERTS)
        for name, shape in shapes.items()
    }


@pytest.mark.skipif(not LLAMA_CPP.exists(), reason="LORAFORMAT_LLAMA_CPP names no folder with convert_lora_to_gguf.py")
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_lie_as_llama_cpps_converter_lays_them(tmp_path: Path, family: str) -> None:
    """It reads one module for each expert, which is how transformers 4 has them."""
    pytest.importorskip("transformers", reason="needs transformers")
    import decoder_zoo as zoo

    model = zoo.make_model(family, **MIXTURES[family])
    dice = np.random.default_rng(2)
    pairs = {
        name: (dice.standard_normal((3, inner)).astype("f4"), dice.standard_normal((out, 3)).astype("f4"))
        for name, (out, inner) in name_experts(family).items()
    }
    write_peft(
        tmp_path / "peft", pairs, alpha=6, target_modules=["w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"]
    )
    config = zoo.save_config(model, tmp_path / "base")
    loraformat.convert(tmp_path / "peft", "gguf", tmp_path / "ours.gguf", base=config, verify=True)
    convert_theirs(tmp_path / "peft", tmp_path / "base", tmp_path / "theirs.gguf")
    ours, theirs = (CONTAINER.open(tmp_path / f"{name}.gguf").tensors for name in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name].read(), tensor.read()) for name, tensor in theirs.items())
    loraformat.convert(tmp_path / "theirs.gguf", "peft", tmp_path / "back", base=config, verify=True)
    back = {target.name: target for target in loraformat.load(tmp_path / "back").targets}
    for name, (down, up) in pairs.items():
        assert back[name].scale == 2.0
        assert np.array_equal(back[name].factors["lora_A.weight"].read(), down)
        assert np.array_equal(back[name].factors["lora_B.weight"].read(), up)
