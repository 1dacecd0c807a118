"""Checkpoints that hold a whole pipeline: targets of its components are found where such files keep them.

The names are those of Stable Diffusion's, SDXL's and ComfyUI's own files; what is merged is compared with numpy.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import loraformat
from builders import lora_factors, write_tensors
from loraformat.errors import LoraformatError

Array = NDArray[Any]
OUT, IN, RANK, ALPHA = 12, 8, 4, 2.0
UNET = "model.diffusion_model"
BIG = "conditioner.embedders.1.model.transformer.resblocks.3"
FIRST = "conditioner.embedders.0.transformer"
LAYER = "text_model_encoder_layers_3"
CASES = {
    "SDXL": {
        "lora_unet_input_blocks_4_1_proj_in": f"{UNET}.input_blocks.4.1.proj_in",
        f"lora_te1_{LAYER}_mlp_fc1": f"{FIRST}.text_model.encoder.layers.3.mlp.fc1",
        f"lora_te2_{LAYER}_mlp_fc1": f"{BIG}.mlp.c_fc",
        f"lora_te2_{LAYER}_self_attn_out_proj": f"{BIG}.attn.out_proj",
    },
    "Stable Diffusion 2": {
        f"lora_te_{LAYER}_mlp_fc2": "cond_stage_model.model.transformer.resblocks.3.mlp.c_proj",
        f"lora_te_{LAYER}_self_attn_out_proj": "cond_stage_model.model.transformer.resblocks.3.attn.out_proj",
    },
    "Stable Diffusion 1": {
        f"lora_te_{LAYER}_mlp_fc2": "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc2"
    },
    "Wan": {"lora_unet_blocks_0_self_attn_q": f"{UNET}.blocks.0.self_attn.q"},
    "Wan of ComfyUI": {"diffusion_model.blocks.0.self_attn.q": f"{UNET}.blocks.0.self_attn.q"},
    "FLUX with its text encoders": {
        "lora_unet_double_blocks_0_img_attn_qkv": f"{UNET}.double_blocks.0.img_attn.qkv",
        f"lora_te1_{LAYER}_mlp_fc1": "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
        ),
    },
    "no table: HunyuanVideo": {"lora_unet_double_blocks_0_img_attn_qkv_x": f"{UNET}.double_blocks.0.img_attn_qkv.x"},
    "a language model as text encoder": {
        "lora_unet_layers_0_attention_out": f"{UNET}.layers.0.attention.out",
        "lora_te_layers_0_self_attn_q_proj": "text_encoders.qwen3_06b.transformer.model.layers.0.self_attn.q_proj",
    },
}


def write_kohya(path: Path, modules: Mapping[str, tuple[int, int]]) -> dict[str, Array]:
    """Write LoRA of rank 4 and alpha 2 for each module and return what each adds."""
    rng = np.random.default_rng(7)
    tensors: dict[str, Array] = {}
    added = {}
    for name, (out, inner) in modules.items():
        a, b = lora_factors(rng, out, inner, RANK)
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        tensors[f"{name}.alpha"] = np.array(ALPHA, np.float32)
        added[name] = (b @ a * (ALPHA / RANK)).astype(np.float32)
    write_tensors(path, tensors)
    return added


def merge(tmp_path: Path, base: Mapping[str, Array], **wishes: Any) -> dict[str, Array]:
    write_tensors(tmp_path / "base.safetensors", base)
    merged = tmp_path / "merged.safetensors"
    loraformat.merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", merged, **wishes)
    return load_file(merged)


@pytest.mark.parametrize("modules", CASES.values(), ids=CASES)
def test_components_are_found(modules: Mapping[str, str], tmp_path: Path) -> None:
    added = write_kohya(tmp_path / "lora.safetensors", dict.fromkeys(modules, (OUT, IN)))
    rng = np.random.default_rng(8)
    base = {f"{place}.weight": rng.standard_normal((OUT, IN)).astype(np.float32) for place in modules.values()}
    merged = merge(tmp_path, base)
    for name, place in modules.items():
        weight = f"{place}.weight"
        np.testing.assert_allclose(merged[weight], base[weight] + added[name], rtol=1e-6, atol=1e-6)


def test_parts_of_open_clip_s_attention(tmp_path: Path) -> None:
    names = [f"lora_te2_{LAYER}_self_attn_{part}_proj" for part in ("v", "q")]
    added = write_kohya(tmp_path / "lora.safetensors", dict.fromkeys(names, (IN, IN)))
    weight = f"{BIG}.attn.in_proj_weight"
    base = {weight: np.random.default_rng(8).standard_normal((3 * IN, IN)).astype(np.float32)}
    expected = base[weight] + np.concatenate([added[names[1]], np.zeros((IN, IN), np.float32), added[names[0]]])
    np.testing.assert_allclose(merge(tmp_path, base)[weight], expected, rtol=1e-6, atol=1e-6)


def test_flat_names_that_the_base_lacks_may_be_left_out(tmp_path: Path) -> None:
    unet, other = "lora_unet_layers_0_attention_out", "lora_te_layers_0_self_attn_qkv_x"
    added = write_kohya(tmp_path / "lora.safetensors", dict.fromkeys((unet, other), (OUT, IN)))
    base = {f"{UNET}.layers.0.attention.out.weight": np.ones((OUT, IN), np.float32)}
    with pytest.raises(LoraformatError, match=f"LF314.*{other}(?s:.*)--allow-unmatched"):
        merge(tmp_path, base)
    merged = merge(tmp_path, base, allow_unmatched=["lora_te_*"])
    np.testing.assert_allclose(merged[f"{UNET}.layers.0.attention.out.weight"], 1 + added[unet], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "ahead", ["", "model.", "model.language_model.", "text_encoders.of_next_year.transformer.model."]
)
def test_a_language_model_by_itself_is_the_text_encoder(ahead: str, tmp_path: Path) -> None:
    added = write_kohya(tmp_path / "lora.safetensors", {"lora_te_layers_0_self_attn_q_proj": (OUT, IN)})
    place = f"{ahead}layers.0.self_attn.q_proj.weight"
    merged = merge(tmp_path, {place: np.ones((OUT, IN), np.float32)})[place]
    np.testing.assert_allclose(merged, 1 + next(iter(added.values())), rtol=1e-6, atol=1e-6)


SPELLINGS = {
    "SD1 in one file": (
        {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (OUT, IN)},
        f"{UNET}.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    ),
    "SDXL of diffusers": (
        {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (OUT, IN)},
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "FLUX in one file, of parts": (
        {f"lora_transformer_transformer_blocks_0_attn_to_{part}": (IN, IN) for part in "qkv"},
        f"{UNET}.double_blocks.0.img_attn.qkv",
    ),
}


@pytest.mark.parametrize(("modules", "place"), SPELLINGS.values(), ids=SPELLINGS)
def test_the_base_s_own_spelling(modules: Mapping[str, tuple[int, int]], place: str, tmp_path: Path) -> None:
    added = write_kohya(tmp_path / "lora.safetensors", modules)
    expected = np.concatenate(list(added.values()))
    base = {f"{place}.weight": np.random.default_rng(8).standard_normal(expected.shape).astype(np.float32)}
    merged = merge(tmp_path, base)[f"{place}.weight"]
    np.testing.assert_allclose(merged, base[f"{place}.weight"] + expected, rtol=1e-5, atol=1e-5)
    given = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    assert loraformat.verify(tmp_path / "merged.safetensors", given[0], [given[1]]).holds
    (verdict,) = loraformat.validate(given[1], base=given[0])
    assert not [problem for problem in verdict.problems if problem.severity == "error"]


def test_names_that_are_the_same_in_both_spellings(tmp_path: Path) -> None:
    places = {
        "lora_transformer_context_embedder": f"{UNET}.context_embedder.weight",
        "lora_transformer_transformer_blocks_0_ff_context_net_2": f"{UNET}.joint_blocks.0.context_block.mlp.fc2.weight",
    }
    added = write_kohya(tmp_path / "lora.safetensors", dict.fromkeys(places, (OUT, IN)))
    merged = merge(tmp_path, dict.fromkeys(places.values(), np.ones((OUT, IN), np.float32)))
    for name, weight in places.items():
        np.testing.assert_allclose(merged[weight], 1 + added[name], rtol=1e-6, atol=1e-6)


def test_a_base_of_another_model_is_still_refused(tmp_path: Path) -> None:
    names = ("attn1_to_q", "attn1_to_k")
    modules = [f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{name}" for name in names]
    write_kohya(tmp_path / "lora.safetensors", dict.fromkeys(modules, (OUT, IN)))
    half = {f"{UNET}.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": np.ones((OUT, IN), np.float32)}
    with pytest.raises(LoraformatError, match=r"LF401.*unet\.down_blocks"):
        merge(tmp_path, half)
