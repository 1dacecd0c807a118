"""Adapters of HunyuanVideo 1.5, HunyuanImage 2.1 and PixArt in every spelling that trainers and ComfyUI have of them.

What stands where in diffusers is as its conversion scripts have it; the changes are compared in float64.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import loraformat
from loraformat.errors import LoraformatError
from loraformat.loading import load_adapter

H, W, RANK = 6, 10, 2
DICE: Final = np.random.default_rng(11)
Places = dict[str, tuple[int, list[str]]]
"""A module of the adapter: its parts of H rows, and where each stands in diffusers."""
REFINER = "txt_in.individual_token_refiner.blocks.1"
REFINED = "context_embedder.token_refiner.refiner_blocks.1"
ADDED = [f"transformer_blocks.{{}}.attn.add_{part}_proj" for part in "qkv"]
TO = [f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"]


def at(number: int, *paths: str) -> list[str]:
    return [path.format(number) for path in paths]


VIDEO_TENCENT: Places = {
    **{f"double_blocks.53.img_attn_{part}": (1, at(53, TO[n])) for n, part in enumerate("qkv")},
    **{f"double_blocks.0.txt_attn_{part}": (1, at(0, ADDED[n])) for n, part in enumerate("qkv")},
    "double_blocks.0.img_mlp.fc1": (4, ["transformer_blocks.0.ff.net.0.proj"]),
    f"{REFINER}.self_attn_qkv": (3, [f"{REFINED}.attn.to_{part}" for part in "qkv"]),
    "byt5_in.fc2": (1, ["context_embedder_2.linear_2"]),
}
VIDEO_COMFY: Places = {
    "double_blocks.53.img_attn.qkv": (3, at(53, *TO)),
    "double_blocks.0.txt_attn.qkv": (3, at(0, *ADDED)),
    "double_blocks.0.img_mod.lin": (6, ["transformer_blocks.0.norm1.linear"]),
    "time_in.in_layer": (1, ["time_embed.timestep_embedder.linear_1"]),
    "vision_in.proj.3": (1, ["image_embedder.linear_2"]),
}
SINGLE = [*(f"single_transformer_blocks.39.attn.to_{part}" for part in "qkv"), "single_transformer_blocks.39.proj_mlp"]
IMAGE: Places = {
    "double_blocks.19.img_attn_qkv": (3, at(19, *TO)),
    "single_blocks.39.linear1": (7, SINGLE),
    "single_blocks.39.modulation.linear": (3, ["single_transformer_blocks.39.norm.linear"]),
    "time_r_in.mlp.2": (1, ["time_guidance_embed.timestep_embedder_r.linear_2"]),
}
PIXART: Places = {
    "blocks.27.attn.qkv": (3, [f"transformer_blocks.27.attn1.to_{part}" for part in "qkv"]),
    "blocks.0.cross_attn.kv_linear": (2, [f"transformer_blocks.0.attn2.to_{part}" for part in "kv"]),
    "blocks.0.mlp.fc2": (1, ["transformer_blocks.0.ff.net.2"]),
    "csize_embedder.mlp.0": (1, ["adaln_single.emb.resolution_embedder.linear_1"]),
}
FILES = {
    "video of musubi-tuner": ("lora_unet_", VIDEO_TENCENT),
    "video of ComfyUI, flat": ("lora_unet_", VIDEO_COMFY),
    "video of ComfyUI": ("diffusion_model.", VIDEO_COMFY),
    "image of sd-scripts": ("lora_unet_", IMAGE),
    "PixArt of ComfyUI": ("diffusion_model.", PIXART),
}


def write(path: Path, prefix: str, places: Places) -> dict[str, NDArray[np.float64]]:
    """Write an adapter; return where in diffusers which change must be."""
    tensors: dict[str, NDArray[Any]] = {}
    expected = {}
    for module, (parts, names) in places.items():
        stem = f"{prefix}{module.replace('.', '_') if prefix.endswith('_') else module}"
        down, up = (DICE.standard_normal(shape).astype(np.float32) for shape in ((RANK, W), (parts * H, RANK)))
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": np.array(1.0)}
        change = 0.5 * up.astype(np.float64) @ down.astype(np.float64)
        ends = [H * (n + 1) for n in range(len(names) - 1)]
        expected |= dict(zip(names, np.split(change, ends), strict=True))
    save_file(tensors, path)
    return expected


@pytest.mark.parametrize("name", FILES)
def test_a_file_goes_into_a_model_of_diffusers(name: str, tmp_path: Path) -> None:
    expected = write(tmp_path / "a.safetensors", *FILES[name])
    base = {f"{module}.weight": np.ones(change.shape, np.float32) for module, change in expected.items()}
    save_file(base, tmp_path / "base.safetensors")
    loraformat.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for module, change in expected.items():
        np.testing.assert_allclose(merged[f"{module}.weight"], 1 + change, atol=1e-6, err_msg=module)


@pytest.mark.parametrize("name", FILES)
def test_a_file_comes_back_from_diffusers(name: str, tmp_path: Path) -> None:
    expected = write(tmp_path / "a.safetensors", *FILES[name])
    loraformat.convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors", verify=True)
    names = {target.name.removeprefix("transformer.") for target in load_adapter(tmp_path / "b.safetensors").targets}
    assert names == set(expected)
    scheme = "kohya" if FILES[name][0].endswith("_") else "dotted"
    loraformat.convert(tmp_path / "b.safetensors", scheme, tmp_path / "c.safetensors", verify=True)
    first, last = (load_file(tmp_path / f"{each}.safetensors") for each in "ac")
    assert set(first) == set(last)
    for key, tensor in first.items():
        np.testing.assert_array_equal(last[key], tensor)


def test_pixart_is_told_from_others_by_its_sizes(tmp_path: Path) -> None:
    """Its names in diffusers are LTX-Video's; a model of other sizes is none of PixArt's."""
    for inner, asked in ((1152, True), (2048, False)):
        names = ("transformer.transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.ff.net.2")
        tensors = {f"{name}.lora_A.weight": np.ones((1, inner), np.float32) for name in names}
        tensors |= {f"{name}.lora_B.weight": np.ones((H, 1), np.float32) for name in names}
        save_file(tensors, tmp_path / "a.safetensors")
        if asked:
            with pytest.raises(LoraformatError, match=r"LF316(?s:.*)PixArt"):
                loraformat.convert(tmp_path / "a.safetensors", "dotted", tmp_path / "b.safetensors")
        else:
            with pytest.raises(LoraformatError) as caught:
                loraformat.convert(tmp_path / "a.safetensors", "dotted", tmp_path / "b.safetensors")
            assert "PixArt" not in str(caught.value)
