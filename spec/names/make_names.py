"""Writes the tables of diffusion models in this folder; the README says what they mean.

    python spec/names/make_names.py

Names are facts about others' models: diffusers (docs and state dicts of its models), the repositories of
Stability-AI/generative-models, black-forest-labs/flux, Stability-AI/sd3.5, Wan-Video/Wan2.1. `tests/oracles` compares
them with the modules of diffusers' own models.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Row = dict[str, Any]


def same(spellings: list[str], *paths: str) -> list[Row]:
    return [{"paths": dict.fromkeys(spellings, path)} for path in paths]


def pair(first: str, second: str, *rows: tuple[str, str]) -> list[Row]:
    return [{"paths": {first: one, second: two}} for one, two in rows]


# --- UNets -----------------------------------------------------------------------------------------------------------

RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
ATTENTION = (
    "norm",
    "proj_in",
    *(f"transformer_blocks.{{i}}.{name}" for name in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")),
    *(
        f"transformer_blocks.{{i}}.{attention}.{name}"
        for attention in ("attn1", "attn2")
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    "proj_out",
)


def unet(attended: list[bool], label: bool) -> list[Row]:
    """Return the rows of a UNet; `attended` says which levels have attention."""
    blocks: list[tuple[str, str, tuple[tuple[str, str], ...]]] = []
    attention = tuple((name, name) for name in ATTENTION)
    levels = len(attended)
    for level, has_attention in enumerate(attended):
        for each in range(2):
            block = f"input_blocks.{3 * level + each + 1}"
            blocks.append((f"{block}.0", f"down_blocks.{level}.resnets.{each}", RESNET))
            if has_attention:
                blocks.append((f"{block}.1", f"down_blocks.{level}.attentions.{each}", attention))
        if level < levels - 1:
            blocks.append((f"input_blocks.{3 * level + 3}.0", f"down_blocks.{level}.downsamplers.0", (("op", "conv"),)))
    blocks.append(("middle_block.0", "mid_block.resnets.0", RESNET))
    blocks.append(("middle_block.1", "mid_block.attentions.0", attention))
    blocks.append(("middle_block.2", "mid_block.resnets.1", RESNET))
    for level, has_attention in enumerate(reversed(attended)):
        for each in range(3):
            block = f"output_blocks.{3 * level + each}"
            blocks.append((f"{block}.0", f"up_blocks.{level}.resnets.{each}", RESNET))
            if has_attention:
                blocks.append((f"{block}.1", f"up_blocks.{level}.attentions.{each}", attention))
        if level < levels - 1:
            place = 2 if has_attention else 1
            upsampler = (f"output_blocks.{3 * level + 2}.{place}", f"up_blocks.{level}.upsamplers.0")
            blocks.append((*upsampler, (("conv", "conv"),)))
    ends = [
        ("input_blocks.0.0", "conv_in"),
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ]
    if label:
        ends += [("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2")]
    inner = [(f"{sgm}.{one}", f"{diffusers}.{two}") for sgm, diffusers, names in blocks for one, two in names]
    return pair("sgm", "diffusers", *ends, *inner)


CLIP_NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]
CLIP_NAMES += ["layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2"]
CLIP_NAMES = [f"encoder.layers.{{i}}.{name}" for name in CLIP_NAMES]
CLIP_NAMES += ["embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm"]
# transformers 5 has a CLIPTextModel without the inner module, and saves it so.
CLIP = pair("transformers", "transformers-5", *((f"text_model.{name}", name) for name in CLIP_NAMES))
CLIP += same(["transformers", "transformers-5"], "text_projection")
T5 = same(
    ["transformers"],
    *(f"encoder.block.{{i}}.layer.0.SelfAttention.{name}" for name in ("q", "k", "v", "o", "relative_attention_bias")),
    *(f"encoder.block.{{i}}.layer.1.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1", "wo")),
    "encoder.block.{i}.layer.0.layer_norm",
    "encoder.block.{i}.layer.1.layer_norm",
    "encoder.final_layer_norm",
    "encoder.embed_tokens",
    "shared",
)

DECODER = same(
    ["transformers"],
    *(f"layers.{{i}}.self_attn.{name}_proj" for name in "qkvo"),
    *(f"layers.{{i}}.mlp.{name}_proj" for name in ("gate", "up", "down")),
    "embed_tokens",
)
"""A language model that encodes texts, without a head: Qwen3 of Anima, Gemma 2 of Lumina."""

# --- Flux.1 ----------------------------------------------------------------------------------------------------------

DOUBLE, BLOCK = "double_blocks.{i}", "transformer_blocks.{i}"
SINGLE, SINGLE_BLOCK = "single_blocks.{i}", "single_transformer_blocks.{i}"
SWAPPED = {"diffusers": {"rule": "halves-swapped"}}


FLUX_ASPECTS = {"mlp.0": [4, 1], "mlp.2": [1, 4], "linear1": [7, 1], "linear2": [1, 5]}


def put_aspects(rows: list[Row], spelling: str, aspects: dict[str, list[int]]) -> None:
    """Say of the rows with some ends of paths how many rows the weight has for how many columns."""
    for row in rows:
        path = row["paths"][spelling]
        row |= next(({"aspect": aspect} for end, aspect in aspects.items() if path.endswith(end)), {})


def fused(bfl: str, parts: list[str], shares: list[int]) -> Row:
    omi = [f"{bfl}.{part}" for part in range(len(parts))]
    return {"paths": {"bfl": bfl, "diffusers": parts, "omi": omi}, "shares": shares}


def norm(bfl: str, diffusers: str) -> Row:
    return {"paths": {"bfl": bfl, "diffusers": diffusers}, "parameters": {"bfl": "scale"}}


def flux() -> list[Row]:
    attention = f"{BLOCK}.attn"
    rows = [
        fused(f"{DOUBLE}.img_attn.qkv", [f"{attention}.{name}" for name in ("to_q", "to_k", "to_v")], [1, 1, 1]),
        fused(
            f"{DOUBLE}.txt_attn.qkv",
            [f"{attention}.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")],
            [1, 1, 1],
        ),
        fused(
            f"{SINGLE}.linear1",
            [f"{SINGLE_BLOCK}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
            [1, 1, 1, 4],
        ),
    ]
    one_to_one = [
        (f"{DOUBLE}.img_attn.proj", f"{attention}.to_out.0"),
        (f"{DOUBLE}.txt_attn.proj", f"{attention}.to_add_out"),
        (f"{DOUBLE}.img_mlp.0", f"{BLOCK}.ff.net.0.proj"),
        (f"{DOUBLE}.img_mlp.2", f"{BLOCK}.ff.net.2"),
        (f"{DOUBLE}.txt_mlp.0", f"{BLOCK}.ff_context.net.0.proj"),
        (f"{DOUBLE}.txt_mlp.2", f"{BLOCK}.ff_context.net.2"),
        (f"{DOUBLE}.img_mod.lin", f"{BLOCK}.norm1.linear"),
        (f"{DOUBLE}.txt_mod.lin", f"{BLOCK}.norm1_context.linear"),
        (f"{SINGLE}.linear2", f"{SINGLE_BLOCK}.proj_out"),
        (f"{SINGLE}.modulation.lin", f"{SINGLE_BLOCK}.norm.linear"),
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        ("final_layer.linear", "proj_out"),
    ]
    for bfl, diffusers in (("time_in", "timestep"), ("guidance_in", "guidance"), ("vector_in", "text")):
        for layer, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
            one_to_one.append((f"{bfl}.{layer}", f"time_text_embed.{diffusers}_embedder.{linear}"))
    rows += [{"paths": {"bfl": one, "diffusers": two, "omi": one}} for one, two in one_to_one]
    put_aspects(rows, "bfl", FLUX_ASPECTS)
    last = "final_layer.adaLN_modulation.1"
    rows.append({"paths": {"bfl": last, "diffusers": "norm_out.linear", "omi": last}, "orders": SWAPPED})
    for stream, added in (("img", ""), ("txt", "added_")):
        for name in ("query", "key"):
            norms = f"{DOUBLE}.{stream}_attn.norm.{name}_norm", f"{attention}.norm_{added}{name[0]}"
            rows.append(norm(*norms))
    rows += [norm(f"{SINGLE}.norm.{name}_norm", f"{SINGLE_BLOCK}.attn.norm_{name[0]}") for name in ("query", "key")]
    return rows


def name_as_diffsynth(rows: list[Row]) -> list[Row]:
    """Give rows of FLUX.1 the names that DiffSynth-Studio has; of its blocks, which it fuses as BFL does."""
    streams = (("img", "a"), ("txt", "b"))
    names = {f"{DOUBLE}.{img}_attn.qkv": f"blocks.{{i}}.attn.{a}_to_qkv" for img, a in streams}
    names |= {f"{DOUBLE}.{img}_attn.proj": f"blocks.{{i}}.attn.{a}_to_out" for img, a in streams}
    names |= {f"{DOUBLE}.{img}_mod.lin": f"blocks.{{i}}.norm1_{a}.linear" for img, a in streams}
    names |= {f"{DOUBLE}.{img}_mlp.{n}": f"blocks.{{i}}.ff_{a}.{n}" for img, a in streams for n in (0, 2)}
    names |= {f"{SINGLE}.linear1": f"{SINGLE}.to_qkv_mlp", f"{SINGLE}.linear2": f"{SINGLE}.proj_out"}
    names |= {f"{SINGLE}.modulation.lin": f"{SINGLE}.norm.linear"}
    for row in rows:
        if row["paths"]["bfl"] in names:
            row["paths"]["diffsynth"] = names[row["paths"]["bfl"]]
    return rows


def chroma_guidance() -> list[Row]:
    """Return what Chroma has in the place of FLUX.1's embeddings and modulations."""
    outer = "distilled_guidance_layer"
    layers = [("in_proj", "in_proj"), ("out_proj", "out_proj")]
    layers += [(f"layers.{{i}}.{bfl}_layer", f"layers.{{i}}.linear_{n}") for bfl, n in (("in", 1), ("out", 2))]
    paths = [(f"{outer}.{bfl}", f"{outer}.{diffusers}") for bfl, diffusers in layers]
    rows: list[Row] = [{"paths": {"bfl": bfl, "diffusers": diffusers, "omi": bfl}} for bfl, diffusers in paths]
    return [*rows, norm(f"{outer}.norms.{{i}}", f"{outer}.norms.{{i}}")]


def two_stacks(double: int, single: int) -> dict[str, int]:
    """Return the depths of a model with BFL's two stacks of blocks."""
    first, second = ("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks")
    return dict.fromkeys(first, double) | dict.fromkeys(second, single)


# --- Stable Diffusion 3 ----------------------------------------------------------------------------------------------


def sd3() -> list[Row]:
    joint = "joint_blocks.{i}"
    rows: list[Row] = []
    for block, parts in (
        ("x_block.attn", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        ("context_block.attn", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
        ("x_block.attn2", ["attn2.to_q", "attn2.to_k", "attn2.to_v"]),
    ):
        paths = {"mmdit": f"{joint}.{block}.qkv", "diffusers": [f"{BLOCK}.{part}" for part in parts]}
        rows.append({"paths": paths, "shares": [1, 1, 1]})
    rows += pair(
        "mmdit",
        "diffusers",
        (f"{joint}.x_block.attn.proj", f"{BLOCK}.attn.to_out.0"),
        (f"{joint}.x_block.attn2.proj", f"{BLOCK}.attn2.to_out.0"),
        (f"{joint}.context_block.attn.proj", f"{BLOCK}.attn.to_add_out"),
        (f"{joint}.x_block.adaLN_modulation.1", f"{BLOCK}.norm1.linear"),
        (f"{joint}.x_block.mlp.fc1", f"{BLOCK}.ff.net.0.proj"),
        (f"{joint}.x_block.mlp.fc2", f"{BLOCK}.ff.net.2"),
        (f"{joint}.context_block.mlp.fc1", f"{BLOCK}.ff_context.net.0.proj"),
        (f"{joint}.context_block.mlp.fc2", f"{BLOCK}.ff_context.net.2"),
        ("x_embedder.proj", "pos_embed.proj"),
        ("context_embedder", "context_embedder"),
        ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
        ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
        ("final_layer.linear", "proj_out"),
    )
    context = {"mmdit": f"{joint}.context_block.adaLN_modulation.1", "diffusers": f"{BLOCK}.norm1_context.linear"}
    # The last block only has a shift and a scale, which the two spellings order otherwise.
    rows.append({"paths": context, "orders": {"diffusers": {"rule": "halves-swapped-where-there-are-two"}}})
    rows.append(
        {"paths": {"mmdit": "final_layer.adaLN_modulation.1", "diffusers": "norm_out.linear"}, "orders": SWAPPED}
    )
    return rows


# --- Wan, Qwen-Image -------------------------------------------------------------------------------------------------


def wan() -> list[Row]:
    inner = [("norm3", "norm2"), ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2")]
    inner.append(("modulation", "scale_shift_table"))
    for native, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        inner += [
            (f"{native}.{one}", f"{diffusers}.{two}")
            for one, two in (
                *zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True),
                ("norm_q", "norm_q"),
                ("norm_k", "norm_k"),
            )
        ]
    inner += [
        ("cross_attn.k_img", "attn2.add_k_proj"),
        ("cross_attn.v_img", "attn2.add_v_proj"),
        ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ]
    condition = "condition_embedder"
    return pair(
        "native",
        "diffusers",
        *(
            (f"{block}.{{i}}.{one}", f"{block}.{{i}}.{two}")
            for block in ("blocks", "vace_blocks")
            for one, two in inner
        ),
        ("vace_blocks.{i}.before_proj", "vace_blocks.{i}.proj_in"),
        ("vace_blocks.{i}.after_proj", "vace_blocks.{i}.proj_out"),
        ("vace_patch_embedding", "vace_patch_embedding"),
        ("patch_embedding", "patch_embedding"),
        ("text_embedding.0", f"{condition}.text_embedder.linear_1"),
        ("text_embedding.2", f"{condition}.text_embedder.linear_2"),
        ("time_embedding.0", f"{condition}.time_embedder.linear_1"),
        ("time_embedding.2", f"{condition}.time_embedder.linear_2"),
        ("time_projection.1", f"{condition}.time_proj"),
        ("img_emb.proj.0", f"{condition}.image_embedder.norm1"),
        ("img_emb.proj.1", f"{condition}.image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", f"{condition}.image_embedder.ff.net.2"),
        ("img_emb.proj.4", f"{condition}.image_embedder.norm2"),
        ("head.head", "proj_out"),
        ("head.modulation", "scale_shift_table"),
    )


def qwen_image() -> list[Row]:
    attention = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    attention += ["norm_q", "norm_k", "norm_added_q", "norm_added_k"]
    streams = [f"{stream}_{name}" for stream in ("img", "txt") for name in ("mod.1", "mlp.net.0.proj", "mlp.net.2")]
    return same(
        ["diffusers"],
        *(f"{BLOCK}.attn.{name}" for name in attention),
        *(f"{BLOCK}.{name}" for name in streams),
        "img_in",
        "txt_in",
        "txt_norm",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "norm_out.linear",
        "proj_out",
    )


def table(name: str, title: str, components: list[str], modules: list[Row], **fields: Any) -> None:
    spellings = list(dict.fromkeys(spelling for row in modules for spelling in row["paths"]))
    record = {"table": name, "title": title, "components": components, "spellings": spellings, **fields}
    lines = json.dumps(record, indent=1)[:-2]
    rows = ",\n  ".join(json.dumps(row) for row in modules)
    (HERE / f"{name}.json").write_text(f'{lines},\n "modules": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


def schemes(spelling: str, kohya: dict[str, str], comfy: dict[str, str]) -> dict[str, Any]:
    return {
        "kohya": {"spelling": spelling, "prefixes": kohya},
        "dotted": {"spelling": spelling, "prefixes": comfy},
        "diffusers": {"spelling": "diffusers"},
        "peft": {"spelling": "diffusers"},
    }


ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
SECOND_T5 = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}
TEXTS = {name: {"spelling": "transformers"} for name in ("kohya", "dotted", "diffusers", "omi")}


def comfy(denoiser: str, encoders: dict[str, str]) -> dict[str, str]:
    named = {f"text_encoders.{name}.transformer": component for component, name in encoders.items()}
    return {"diffusion_model": denoiser, **named}


def ordered_unet(inner: list[str]) -> list[list[Any]]:
    """Return the adapted modules of Stable Diffusion 1's UNet as torch walks it, each with its outputs."""
    places = [(f"down_blocks.{level}", 320 << level, 2) for level in range(3)]
    places += [(f"up_blocks.{level}", 1280 >> (level - 1), 3) for level in range(1, 4)]
    places.append(("mid_block", 1280, 1))
    return [
        [f"{block}.attentions.{each}.transformer_blocks.0.{name}", width * (8 if "net" in name else 1)]
        for block, width, count in places
        for each in range(count)
        for name in inner
    ]


def orders() -> None:
    """Write the orders in which cloneofsimo/lora numbers modules."""
    first, second = ([f"{name}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")] for name in ("attn1", "attn2"))
    gate = ["ff.net.0.proj"]
    encoder = [
        [f"text_model.encoder.layers.{layer}.self_attn.{name}", 768]
        for layer in range(12)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]
    listed = [
        {"component": "unet", "modules": ordered_unet(first + gate + second)},
        {"component": "unet", "modules": ordered_unet(first + second + gate)},
        {"component": "unet", "modules": ordered_unet(first + second)},
        {"component": "text_encoder", "modules": encoder},
    ]
    rows = ",\n ".join(json.dumps(each) for each in listed)
    (HERE / "orders").mkdir(exist_ok=True)
    (HERE / "orders" / "sd1-cloneofsimo.json").write_text(f'{{"orders": [\n {rows}\n]}}\n', encoding="utf-8")


def main() -> None:
    """Write the tables."""
    orders()
    one = {"text_encoder": "clip_l"}
    two = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    sd1 = schemes("diffusers", {"lora_unet": "unet", "lora_te": "text_encoder"}, comfy("unet", one))
    sd1["dotted"]["spelling"] = "sgm"
    rows = unet([True, True, True, False], label=False)
    classes = ["UNet2DConditionModel"]
    table("sd1-unet", "Stable Diffusion 1 and 2", ["unet"], rows, widths=[768, 1024], classes=classes, schemes=sd1)
    kohya = {"lora_unet": "unet", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
    sdxl = schemes("sgm", kohya, comfy("unet", two))
    table(
        "sdxl-unet",
        "Stable Diffusion XL",
        ["unet"],
        unet([False, True, True], label=True),
        widths=[2048, 2816],
        classes=classes,
        schemes=sdxl,
    )
    kohya = {"lora_unet": "transformer", "lora_te1": "text_encoder", "lora_te3": "text_encoder_2"}
    flux1 = schemes("bfl", kohya, comfy("transformer", SECOND_T5)) | {"omi": {"spelling": "omi"}}
    flux1["dotted"]["also"] = ["diffsynth"]
    table(
        "flux1-transformer",
        "FLUX.1, Chroma",
        ["transformer"],
        name_as_diffsynth(flux()) + chroma_guidance(),
        widths=[3072, 12288, 15360],
        depths=two_stacks(19, 38),
        classes=["FluxTransformer2DModel", "ChromaTransformer2DModel"],
        schemes=flux1,
    )
    kohya = {"lora_unet": "transformer", **{f"lora_te{n}": e for n, e in enumerate(ENCODERS, 1)}}
    table(
        "sd3-transformer",
        "Stable Diffusion 3",
        ["transformer"],
        sd3(),
        widths=[1536, 2432],
        classes=["SD3Transformer2DModel"],
        schemes=schemes("mmdit", kohya, comfy("transformer", ENCODERS)),
    )
    plain = {"lora_unet": "transformer"}
    table(
        "wan-transformer",
        "Wan 2.1 and 2.2",
        ["transformer", "transformer_2"],
        wan(),
        classes=["WanTransformer3DModel"],
        schemes=schemes("native", plain, comfy("transformer", {})),
    )
    table(
        "qwen-image-transformer",
        "Qwen-Image",
        ["transformer"],
        qwen_image(),
        widths=[3072, 12288],
        classes=["QwenImageTransformer2DModel"],
        schemes=schemes("diffusers", plain, comfy("transformer", {})),
    )
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    classes = ["CLIPTextModel", "CLIPTextModelWithProjection"]
    texts = TEXTS | {"diffusers": {"spelling": "transformers", "also": ["transformers-5"]}}
    table("clip-text-encoder", "the text encoder of CLIP", encoders, CLIP, classes=classes, schemes=texts)
    table("t5-encoder", "the encoder of T5", encoders[1:], T5, classes=["T5EncoderModel"], schemes=TEXTS)
    decoders = ["Qwen3Model", "Gemma2Model"]
    title = "a language model as text encoder (Qwen3, Gemma 2)"
    table("decoder-text-encoder", title, encoders, DECODER, classes=decoders, schemes=TEXTS)


if __name__ == "__main__":
    main()
