"""Writes the tables of HunyuanVideo 1.5, HunyuanImage 2.1 and PixArt; the README says what they mean.

    python spec/names/make_hunyuan_names.py

Names are facts about others' models: diffusers' conversion scripts (scripts/convert_hunyuan_video1_5_to_diffusers.py,
convert_hunyuan_image_to_diffusers.py, convert_pixart_alpha_to_diffusers.py), the models of sd-scripts and musubi-tuner
and their converters to ComfyUI's names.
"""

from typing import Any

from make_names import BLOCK, DOUBLE, Row, table
from make_transformer_names import ADDED, QKV, hunyuan_video, rows, schemes, split, three, write

PIXART_INPUTS = [4, 256, 384, 1152, 4096, 4608]
"""Of all published models. Their names in diffusers are those of many others."""


def embedder(stem: str, diffusers: str) -> list[Row]:
    """Return the two layers of one embedder."""
    layers = (("in_layer", 0, 1), ("out_layer", 2, 2))
    return three(*((f"{stem}.{a}", f"{stem}.mlp.{b}", f"{diffusers}.linear_{c}") for a, b, c in layers))


def keep(found: list[Row], *beginnings: str) -> list[Row]:
    """Return the rows of HunyuanVideo whose names in ComfyUI begin so."""
    return [row for row in found if str(row["paths"]["comfy"]).startswith(beginnings)]


def hunyuan_image() -> list[Row]:
    found = keep(hunyuan_video(), "double_blocks", "single_blocks", "txt_in", "img_in", "final_layer")
    embed = "time_guidance_embed"
    found += embedder("time_in", f"{embed}.timestep_embedder")
    found += embedder("time_r_in", f"{embed}.timestep_embedder_r")
    found += embedder("guidance_in", f"{embed}.guidance_embedder")
    return found + second_text()


def second_text() -> list[Row]:
    names = ((f"byt5_in.fc{each}", f"byt5_in.fc{each}", f"context_embedder_2.linear_{each}") for each in (1, 2, 3))
    return three(*names)


def hunyuan_video_1_5() -> list[Row]:
    """Return the rows; Tencent has q, k and v of a double block apart, ComfyUI in one."""
    found: list[Row] = []
    for stream, parts in (("img", QKV), ("txt", ADDED)):
        apart = [f"{DOUBLE}.{stream}_attn_{part}" for part in "qkv"]
        row = split({"comfy": f"{DOUBLE}.{stream}_attn.qkv"}, f"{BLOCK}.attn", parts)
        found.append({**row, "paths": {**row["paths"], "original": apart}})
    inner = keep(hunyuan_video(), "double_blocks", "txt_in", "img_in", "final_layer")
    found += [row for row in inner if not str(row["paths"]["comfy"]).startswith("double") or "shares" not in row]
    found += embedder("time_in", "time_embed.timestep_embedder")
    found += embedder("time_r_in", "time_embed.timestep_embedder_r")
    vision = ((f"vision_in.proj.{a}", f"vision_in.proj.{a}", f"image_embedder.linear_{b}") for a, b in ((1, 1), (3, 2)))
    return found + second_text() + three(*vision)


def pixart() -> list[Row]:
    block, attention = "blocks.{i}", f"{BLOCK}.attn2"
    found = [
        split({"native": f"{block}.attn.qkv"}, f"{BLOCK}.attn1", QKV),
        split({"native": f"{block}.cross_attn.kv_linear"}, attention, QKV[1:]),
    ]
    pairs = [
        (f"{block}.attn.proj", f"{BLOCK}.attn1.to_out.0"),
        (f"{block}.cross_attn.q_linear", f"{attention}.to_q"),
        (f"{block}.cross_attn.proj", f"{attention}.to_out.0"),
        (f"{block}.mlp.fc1", f"{BLOCK}.ff.net.0.proj"),
        (f"{block}.mlp.fc2", f"{BLOCK}.ff.net.2"),
        ("x_embedder.proj", "pos_embed.proj"),
        ("t_block.1", "adaln_single.linear"),
        ("final_layer.linear", "proj_out"),
    ]
    pairs += [(f"y_embedder.y_proj.fc{each}", f"caption_projection.linear_{each}") for each in (1, 2)]
    outer = "adaln_single.emb"
    for native, diffusers in (("t", "timestep"), ("csize", "resolution"), ("ar", "aspect_ratio")):
        layers = ((0, 1), (2, 2))
        pairs += [(f"{native}_embedder.mlp.{a}", f"{outer}.{diffusers}_embedder.linear_{b}") for a, b in layers]
    return found + rows("native", pairs)


def main() -> None:
    """Write the tables."""
    hunyuan: dict[str, Any] = schemes("comfy", "original")
    stacks = {"double_blocks": 20, "single_blocks": 40, "transformer_blocks": 20, "single_transformer_blocks": 40}
    image, video = "HunyuanImageTransformer2DModel", "HunyuanVideo15Transformer3DModel"
    write("hunyuan-image-transformer", "HunyuanImage 2.1", hunyuan_image(), image, hunyuan, stacks)
    deep = {"double_blocks": 54, "transformer_blocks": 54}
    write("hunyuan-video-1-5-transformer", "HunyuanVideo 1.5", hunyuan_video_1_5(), video, hunyuan, deep)
    fields = {"inputs": PIXART_INPUTS, "classes": ["PixArtTransformer2DModel"], "schemes": schemes("native")}
    table("pixart-transformer", "PixArt", ["transformer"], pixart(), **fields)


if __name__ == "__main__":
    main()
