"""Tensors of adapters of diffusion models, under any scheme's names. Sizes are small, and no matrix is square."""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from builders import MemoryFactor
from loraformat.adapter import Factor

BFLOAT16 = ml_dtypes.bfloat16
Modules = Mapping[str, tuple[int, ...]]
"""Module to the shape of its weight, `(out, in, *kernel)`."""

FLUX_BFL: Modules = {
    "double_blocks.0.img_attn.qkv": (18, 5),
    "double_blocks.0.txt_attn.proj": (6, 5),
    "double_blocks.0.img_mlp.0": (24, 5),
    "single_blocks.11.linear1": (42, 5),
    "single_blocks.11.linear2": (6, 29),
    "final_layer.adaLN_modulation.1": (12, 5),
}
FLUX_DIFFUSERS: Modules = {
    "transformer_blocks.0.attn.to_q": (6, 5),
    "transformer_blocks.0.attn.to_k": (6, 5),
    "transformer_blocks.0.attn.to_v": (6, 5),
    "transformer_blocks.0.attn.to_out.0": (6, 7),
    "transformer_blocks.0.norm1.linear": (36, 5),
    "single_transformer_blocks.11.attn.to_q": (6, 5),
    "single_transformer_blocks.11.proj_mlp": (24, 5),
    "norm_out.linear": (12, 5),
}
SD1_DIFFUSERS: Modules = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 5),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (8, 768),
    "down_blocks.1.attentions.1.proj_in": (8, 5, 1, 1),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (16, 5),
    "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0": (8, 5),
    "down_blocks.0.resnets.0.conv1": (8, 5, 3, 3),
    "up_blocks.0.upsamplers.0.conv": (8, 5, 3, 3),
}
SDXL_SGM: Modules = {
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q": (8, 5),
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k": (8, 2048),
    "middle_block.1.transformer_blocks.9.ff.net.2": (8, 33),
    "output_blocks.2.2.conv": (8, 5, 3, 3),
    "label_emb.0.0": (8, 5),
}
SD3_MMDIT: Modules = {
    "joint_blocks.0.x_block.attn.qkv": (18, 6),
    "joint_blocks.0.context_block.attn.qkv": (18, 6),
    "joint_blocks.23.context_block.adaLN_modulation.1": (12, 6),
    "joint_blocks.0.context_block.adaLN_modulation.1": (36, 6),
    "joint_blocks.0.x_block.mlp.fc1": (24, 1536),
}
WAN_NATIVE: Modules = {
    "blocks.0.self_attn.q": (6, 5),
    "blocks.0.cross_attn.k_img": (6, 5),
    "blocks.29.ffn.2": (6, 9),
    "text_embedding.0": (6, 9),
    "head.head": (4, 6),
}
QWEN: Modules = {
    "transformer_blocks.0.attn.to_q": (6, 5),
    "transformer_blocks.0.attn.add_k_proj": (6, 5),
    "transformer_blocks.59.img_mlp.net.0.proj": (24, 5),
    "transformer_blocks.0.txt_mod.1": (36, 5),
}
CLIP: Modules = {
    "text_model.encoder.layers.0.self_attn.q_proj": (6, 5),
    "text_model.encoder.layers.11.mlp.fc1": (24, 5),
}
T5: Modules = {
    "encoder.block.0.layer.0.SelfAttention.q": (6, 5),
    "encoder.block.23.layer.1.DenseReluDense.wi_0": (24, 5),
}


def behind(prefix: str, modules: Modules) -> Modules:
    """Return the modules behind a prefix."""
    return {f"{prefix}{name}": shape for name, shape in modules.items()}


def flat(prefix: str, modules: Modules) -> Modules:
    """Return the modules as flat schemes call them."""
    return {f"{prefix}_{name.replace('.', '_')}": shape for name, shape in modules.items()}


def tensors(arrays: Mapping[str, Any]) -> dict[str, Factor]:
    """Return factors in memory."""
    return {name: MemoryFactor(name, np.asarray(array)) for name, array in arrays.items()}


def lora(
    modules: Modules,
    down: str,
    up: str,
    *,
    rank: int = 2,
    dtype: Any = np.float32,
    alpha: float | None = None,
    alpha_dtype: Any = None,
    ranks: Sequence[int] = (),
) -> dict[str, Factor]:
    """Return LoRA factors of modules, whose names end with `down` and `up`, and with `alpha` one beside each."""
    dice = np.random.default_rng(len(modules))
    arrays: dict[str, Any] = {}
    for index, (name, (out, inner, *kernel)) in enumerate(modules.items()):
        own = ranks[index % len(ranks)] if ranks else rank
        arrays[f"{name}.{down}"] = dice.standard_normal((own, inner, *kernel)).astype(dtype)
        arrays[f"{name}.{up}"] = dice.standard_normal((out, own, *(1 for _ in kernel))).astype(dtype)
        if alpha is not None:
            arrays[f"{name}.alpha"] = np.array(alpha, dtype=alpha_dtype or dtype)
    return tensors(arrays)
