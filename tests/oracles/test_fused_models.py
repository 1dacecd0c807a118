"""Small models of diffusers, adapted by `add_adapter` and fused by `fuse_lora`: a merge gives the same weights.

The adapter is what `save_lora_adapter` writes; it is merged as it is, and under the names of other schemes, into the
folder that `save_pretrained` wrote.
"""

from collections.abc import Callable, Mapping
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
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

from safetensors.torch import load_file, save_file  # noqa: E402

HEADS: Mapping[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
STACKS: Mapping[str, Any] = {"num_layers": 2, "num_single_layers": 2}


def unet(**options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        **{
            "block_out_channels": (32, 64),
            "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 24,
            "attention_head_dim": 4,
        }
        | options
    )


MODELS: Mapping[str, Callable[[], Any]] = {
    "sd1": unet,
    "a_unet_of_no_table": lambda: unet(addition_embed_type="text", addition_embed_type_num_heads=4),
    "sdxl": lambda: unet(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
    ),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, joint_attention_dim=24, caption_projection_dim=32,
        pooled_projection_dim=40, dual_attention_layers=(0,), **HEADS,
    ),
    "flux": lambda: diffusers.FluxTransformer2DModel(
        in_channels=4, joint_attention_dim=24, pooled_projection_dim=40, guidance_embeds=True,
        axes_dims_rope=(4, 4, 8), **HEADS, **STACKS,
    ),
    "flux2": lambda: diffusers.Flux2Transformer2DModel(
        in_channels=4, joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), **HEADS, **STACKS
    ),
    "chroma": lambda: diffusers.ChromaTransformer2DModel(
        in_channels=4, joint_attention_dim=24, axes_dims_rope=(4, 4, 8), approximator_num_channels=64,
        approximator_hidden_dim=40, approximator_layers=1, **HEADS, **STACKS,
    ),
    "wan": lambda: diffusers.WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=24, freq_dim=20, ffn_dim=40, num_layers=2, image_dim=12,
        added_kv_proj_dim=32, **HEADS,
    ),
    "qwen_image": lambda: diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=24, axes_dims_rope=(4, 4, 8), **HEADS
    ),
    "z_image": lambda: diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 4, 8], axes_lens=[16, 16, 16],
    ),
    "lumina2": lambda: diffusers.Lumina2Transformer2DModel(
        in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1,
        multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(16, 16, 16), cap_feat_dim=24,
    ),
    "ltx": lambda: diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=2, caption_channels=24, **HEADS
    ),
    "hunyuan_video": lambda: diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_refiner_layers=1, text_embed_dim=24, pooled_projection_dim=40,
        rope_axes_dim=(4, 4, 8), **HEADS, **STACKS,
    ),
    "mochi": lambda: diffusers.MochiTransformer3DModel(
        num_layers=2, pooled_projection_dim=24, in_channels=4, text_embed_dim=20, time_embed_dim=24, **HEADS
    ),
    "cogvideox": lambda: diffusers.CogVideoXTransformer3DModel(
        in_channels=4, out_channels=4, time_embed_dim=24, text_embed_dim=20, num_layers=2, sample_width=8,
        sample_height=8, sample_frames=9, **HEADS,
    ),
    "sana": lambda: diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=16,
        cross_attention_dim=32, caption_channels=24, sample_size=8, **HEADS,
    ),
    "auraflow": lambda: diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=24,
        caption_projection_dim=32, attention_head_dim=16, num_attention_heads=2, pos_embed_max_size=16,
    ),
    "kandinsky5": lambda: diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=24, in_text_dim2=20, time_dim=12, model_dim=32, ff_dim=40,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 4, 8),
    ),
}  # fmt: skip
MODULES = (torch.nn.Linear, torch.nn.Conv2d)
RANK, ALPHA = 3, 5
OTHERS = ("native", "dotted", "kohya")
"""Schemes that the adapter is converted to, before it is merged once more."""


def is_adapted(path: str, module: Any) -> bool:
    """Say whether PEFT can adapt a module, and the published model has it: Mochi's last block is its 48th."""
    return (
        isinstance(module, MODULES)
        and getattr(module, "groups", 1) == 1
        and path != "transformer_blocks.1.norm1_context.linear_1"
    )


def adapt(name: str, folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Return the folder of a model, the file of an adapter for it, and the weights that fusing gives."""
    from peft import LoraConfig

    torch.manual_seed(len(name))
    model = MODELS[name]()
    model.save_pretrained(folder / "base")
    modules = [path for path, module in model.named_modules() if is_adapted(path, module)]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, init_lora_weights=False))
    model.save_lora_adapter(folder / "adapter")
    model.fuse_lora()
    model.unload_lora()
    (adapter,) = (folder / "adapter").iterdir()
    return folder / "base", adapter, model.state_dict()


def compare(merged: Path, expected: Mapping[str, Any]) -> None:
    found = load_file(next(merged.glob("*.safetensors")))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name].numpy(), tensor.numpy(), rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_a_merge_is_what_fusing_gives(name: str, tmp_path: Path) -> None:
    base, adapter, expected = adapt(name, tmp_path)
    loraformat.merge(base, [adapter], tmp_path / "merged", warn_retained=0.0, min_retained=0.0)
    compare(tmp_path / "merged", expected)
    for scheme in OTHERS[: 1 if name == "a_unet_of_no_table" else None]:
        other = tmp_path / f"{scheme}.safetensors"
        loraformat.convert(adapter, scheme, other, base=base)
        loraformat.merge(base, [other], tmp_path / scheme, warn_retained=0.0, min_retained=0.0)
        compare(tmp_path / scheme, expected)


def test_differences_of_every_parameter(tmp_path: Path) -> None:
    """An extraction of Wan under its original names: modulations of three axes, norms, kernels, biases."""
    from loraformat.spellings import all_tables

    torch.manual_seed(2)
    model = MODELS["wan"]()
    model.save_pretrained(tmp_path / "base")
    (table,) = (table for table in all_tables() if table.name == "wan-transformer")
    paths = [(row.paths["native"][0], row.paths["diffusers"][0]) for row in table.rows]
    original = {theirs.format(i=block): native.format(i=block) for native, theirs in paths for block in range(2)}
    differences, expected = {}, {}
    for name, weight in model.state_dict().items():
        module, _, parameter = name.rpartition(".")
        native = original.get(name) or original[module]
        key = f"diffusion_model.{native}.{'diff_b' if parameter == 'bias' else 'diff'}"
        differences[key] = torch.randn_like(weight) / 8
        expected[name] = weight + differences[key]
    assert {len(each.shape) for each in differences.values()} == {1, 2, 3, 5}
    save_file(differences, tmp_path / "differences.safetensors")
    loraformat.merge(tmp_path / "base", [tmp_path / "differences.safetensors"], tmp_path / "merged")
    compare(tmp_path / "merged", expected)
