"""Control adapters of FLUX.1, whose first layer has more inputs than the model, against diffusers' fusing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat

torch = pytest.importorskip("torch", reason="needs torch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("peft", reason="needs peft")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

from safetensors.torch import load_file, save_file  # noqa: E402

OWN, WIDER, RANK = 64, 128, 3
BLOCK = "transformer_blocks.0"
MODULES = {
    "x_embedder": (32, WIDER),
    f"{BLOCK}.attn.to_q": (32, 32),
    f"{BLOCK}.ff.net.0.proj": (128, 32),
    "single_transformer_blocks.0.proj_mlp": (128, 32),
}


def make_base(folder: Path) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=OWN,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    )
    transformer.save_pretrained(folder)
    return transformer


def make_adapter(path: Path) -> dict[str, Any]:
    dice = torch.Generator().manual_seed(1)
    tensors = {}
    for module, (out, inner) in MODULES.items():
        tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(RANK, inner, generator=dice)
        tensors[f"transformer.{module}.lora_B.weight"] = torch.randn(out, RANK, generator=dice)
    tensors["transformer.x_embedder.lora_B.bias"] = torch.randn(32, generator=dice)
    save_file(tensors, path)
    return tensors


def fuse(transformer: Any, tensors: dict[str, Any]) -> Any:
    """Return the transformer as FluxControlPipeline fuses it."""
    pipeline = diffusers.FluxControlPipeline(None, None, None, None, None, None, transformer)
    pipeline.load_lora_weights(dict(tensors))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights(reset_to_overwritten_params=False)
    return pipeline.transformer


def test_a_merge_is_what_fusing_gives(tmp_path: Path) -> None:
    transformer = make_base(tmp_path / "base")
    tensors = make_adapter(tmp_path / "control.safetensors")
    loraformat.merge(tmp_path / "base", tmp_path / "control.safetensors", tmp_path / "out")
    fused = fuse(transformer, tensors).state_dict()
    merged = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert set(merged) == set(fused)
    for name, expected in fused.items():
        np.testing.assert_allclose(merged[name].numpy(), expected.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)
    assert merged["x_embedder.weight"].shape == (32, WIDER)


def test_the_model_loads_with_its_new_inputs(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "control.safetensors")
    loraformat.merge(tmp_path / "base", tmp_path / "control.safetensors", tmp_path / "out")
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    assert (loaded.config.in_channels, loaded.out_channels) == (WIDER, OWN)
    assert loaded.x_embedder.weight.shape == (32, WIDER)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["out_channels"] == OWN


def test_the_original_names_say_the_same(tmp_path: Path) -> None:
    """The adapter as ComfyUI has it, with `reshape_weight`, merged into the same base."""
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "control.safetensors")
    loraformat.convert(tmp_path / "control.safetensors", "dotted", tmp_path / "comfy.safetensors")
    written = load_file(tmp_path / "comfy.safetensors")
    assert written["diffusion_model.img_in.reshape_weight"].tolist() == [32, WIDER]
    for name in ("control", "comfy"):
        loraformat.merge(tmp_path / "base", tmp_path / f"{name}.safetensors", tmp_path / name)
    one, other = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("control", "comfy"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6)
