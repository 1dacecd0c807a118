"""KerasHub's own files: what a backbone with LoRA multiplies with is what a merge into transformers' names gives."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from builders import write_tensors

os.environ.setdefault("KERAS_BACKEND", "jax")
pytest.importorskip("h5py", reason="needs h5py")
keras_hub = pytest.importorskip("keras_hub", reason="needs keras-hub, in an environment of its own")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

HIDDEN, HEADS, KV, SIZE = 24, 4, 2, 10
COUNTS = {"num_query_heads": HEADS, "num_key_value_heads": KV, "hidden_dim": HIDDEN, "intermediate_dim": 64}
COMMON: dict[str, Any] = {"vocabulary_size": 40, "num_layers": 3, **COUNTS}
NORMS = {"use_post_ffw_norm": True, "use_post_attention_norm": True}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("GemmaBackbone", {"head_dim": SIZE}),
    "gemma2": ("GemmaBackbone", {"head_dim": SIZE, **NORMS}),
    "gemma3_text": ("Gemma3Backbone", {"head_dim": SIZE, "image_size": 16, "use_query_key_norm": True, **NORMS}),
    "llama": ("LlamaBackbone", {}),
    "mistral": ("MistralBackbone", {}),
    "qwen2": ("QwenBackbone", {}),
    "qwen3": ("Qwen3Backbone", {"head_dim": SIZE}),
}
ATTENTION = {"query": "q", "key": "k", "value": "v", "attention_output": "o"}
MLP = {
    **{"ffw_gating": "gate", "ffw_gating_2": "up", "ffw_linear": "down"},
    **{"feedforward_gate_dense": "gate", "feedforward_intermediate_dense": "up", "feedforward_output_dense": "down"},
}


def as_matrix(kernel: Any, name: str, *, heads_first: bool) -> Any:
    """Return a kernel as transformers stores it, `(out, in)`: what KerasHub's own converters undo."""
    kernel = np.asarray(kernel)
    if name == "attention_output":
        return kernel.reshape(-1, kernel.shape[2]).T
    if name in ATTENTION:
        by_head = kernel.transpose(0, 2, 1) if heads_first else kernel.transpose(1, 2, 0)
        return by_head.reshape(-1, by_head.shape[2])
    return kernel.T


@pytest.mark.parametrize("family", BACKBONES)
def test_a_merge_is_what_the_backbone_multiplies_with(family: str, tmp_path: Path) -> None:
    kind, more = BACKBONES[family]
    backbone = getattr(keras_hub.models, kind)(**COMMON, **more)
    names = [*ATTENTION, *MLP]
    backbone.enable_lora(2, target_layer_names=names)
    dice = np.random.default_rng(0)
    before, after = {}, {}
    for layer in backbone._flatten_layers(include_self=False):
        if not getattr(layer, "lora_enabled", False):
            continue
        plain, heads_first = np.asarray(layer._kernel), family.startswith("gemma")
        layer.lora_kernel_b.assign(dice.standard_normal(layer.lora_kernel_b.shape))
        block = int("".join(filter(str.isdigit, layer.path.split("/")[-3 if layer.name in ATTENTION else -2])))
        role = ATTENTION.get(layer.name)
        name = f"model.layers.{block}." + (f"self_attn.{role}_proj" if role else f"mlp.{MLP[layer.name]}_proj")
        before[f"{name}.weight"] = np.ascontiguousarray(as_matrix(plain, layer.name, heads_first=heads_first))
        after[f"{name}.weight"] = as_matrix(layer.kernel, layer.name, heads_first=heads_first)
    assert len(before) == 3 * 7
    backbone.save_lora_weights(str(tmp_path / "a.lora.h5"))
    config = {
        **{"model_type": family, "num_attention_heads": HEADS, "num_key_value_heads": KV},
        **{"hidden_size": HIDDEN, "num_hidden_layers": 3, "head_dim": more.get("head_dim", HIDDEN // HEADS)},
    }
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    write_tensors(base / "model.safetensors", before)
    loraformat.merge(base, tmp_path / "a.lora.h5", output=tmp_path / "merged")
    from safetensors.numpy import load_file

    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, want in after.items():
        assert np.abs(merged[name] - want).max() < 1e-5, name
        assert np.abs(before[name] - want).max() > 0.1
