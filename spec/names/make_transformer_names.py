"""Writes the tables of transformers that `make_names.py` does not; the README says what they mean.

    python spec/names/make_transformer_names.py

Names are facts about others' models: diffusers' converters of checkpoints and of adapters (single_file_utils.py and
lora_conversion_utils.py in its loaders), and ComfyUI's names of HunyuanVideo. `tests/oracles` compares them with both.
"""

from typing import Any

from make_names import (
    BLOCK,
    DOUBLE,
    FLUX_ASPECTS,
    SINGLE,
    SINGLE_BLOCK,
    Row,
    comfy,
    pair,
    put_aspects,
    same,
    table,
    two_stacks,
)

Pairs = list[tuple[str, str]]
SWAPPED = {"diffusers": {"rule": "halves-swapped"}}
QKV, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
PLAIN = {"lora_unet": "transformer"}


def split(paths: dict[str, str], stem: str, parts: tuple[str, ...], shares: list[int] | None = None) -> Row:
    """Return the row of a weight that diffusers has in parts; `paths` has the other spellings."""
    return {
        "paths": {**paths, "diffusers": [f"{stem}.{part}" for part in parts]},
        "shares": shares or [1] * len(parts),
    }


def rows(first: str, pairs: Pairs) -> list[Row]:
    return pair(first, "diffusers", *pairs)


def swapped(first: str, pairs: Pairs) -> list[Row]:
    """Return rows of modules whose halves diffusers has in the other order."""
    return [{**row, "orders": SWAPPED} for row in rows(first, pairs)]


def norms(first: str, pairs: Pairs) -> list[Row]:
    """Return rows of norms whose parameter is called `scale` in the first spelling."""
    return [{**row, "parameters": {first: "scale"}} for row in rows(first, pairs)]


def embedders(outer: str, *names: tuple[str, str]) -> Pairs:
    """Return the two layers of embedders in BFL's manner."""
    layers = (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    return [(f"{bfl}.{one}", f"{outer}.{each}_embedder.{two}") for bfl, each in names for one, two in layers]


def schemes(spelling: str, *also: str, **prefixes: dict[str, str]) -> dict[str, Any]:
    """Return how schemes spell a model: kohya's and dotted files as the original repository does."""
    return {
        "kohya": {"spelling": spelling, "also": list(also), "prefixes": prefixes.get("kohya", PLAIN)},
        "dotted": {
            "spelling": spelling,
            "also": list(also),
            "prefixes": prefixes.get("dotted", comfy("transformer", {})),
        },
        "diffusers": {"spelling": "diffusers"},
        "peft": {"spelling": "diffusers"},
    }


# --- FLUX.2, FLUX.3 --------------------------------------------------------------------------------------------------


def flux2() -> list[Row]:
    attention = f"{BLOCK}.attn"
    inner = [("mlp.0", "linear_in"), ("mlp.2", "linear_out")]
    found = [
        split({"bfl": f"{DOUBLE}.img_attn.qkv", "fused": f"{attention}.to_qkv"}, attention, QKV),
        split({"bfl": f"{DOUBLE}.txt_attn.qkv", "fused": f"{attention}.to_added_qkv"}, attention, ADDED),
    ]
    one_to_one = [
        (f"{DOUBLE}.img_attn.proj", f"{attention}.to_out.0"),
        (f"{DOUBLE}.txt_attn.proj", f"{attention}.to_add_out"),
        *((f"{DOUBLE}.img_{one}", f"{BLOCK}.ff.{two}") for one, two in inner),
        *((f"{DOUBLE}.txt_{one}", f"{BLOCK}.ff_context.{two}") for one, two in inner),
        (f"{SINGLE}.linear1", f"{SINGLE_BLOCK}.attn.to_qkv_mlp_proj"),
        (f"{SINGLE}.linear2", f"{SINGLE_BLOCK}.attn.to_out"),
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        ("final_layer.linear", "proj_out"),
        *embedders("time_guidance_embed", ("time_in", "timestep"), ("guidance_in", "guidance")),
        *((f"{each}.lin", f"{each}.linear") for each in ("single_stream_modulation", "double_stream_modulation_img")),
        ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    ]
    found += rows("bfl", one_to_one)
    put_aspects(found, "bfl", {"mlp.0": [6, 1], "mlp.2": [1, 3], "linear1": [9, 1], "linear2": [1, 4]})
    found += swapped("bfl", [("final_layer.adaLN_modulation.1", "norm_out.linear")])
    found += norms("bfl", flux_norms(attention))
    for row in found:  # The projections of a double block may be fused in diffusers as well.
        paths = row["paths"]
        paths.setdefault("fused", paths["diffusers"])
        if "orders" in row:
            row["orders"] = row["orders"] | {"fused": SWAPPED["diffusers"]}
    return found


def flux_norms(attention: str) -> Pairs:
    double = [
        (f"{DOUBLE}.{stream}_attn.norm.{name}_norm", f"{attention}.norm_{added}{name[0]}")
        for stream, added in (("img", ""), ("txt", "added_"))
        for name in ("query", "key")
    ]
    return double + [(f"{SINGLE}.norm.{name}_norm", f"{SINGLE_BLOCK}.attn.norm_{name[0]}") for name in ("query", "key")]


def flux3() -> list[Row]:
    inner = [(f"{name}_proj", f"attn.to_{name}") for name in "qkv"]
    inner += [("attn_out", "attn.to_out.0"), ("mlp_in", "ff.linear_in"), ("mlp_out", "ff.linear_out")]
    modes = ("image", "image_cond", "video", "video_cond", "audio", "audio_cond")
    blocks = [(f"content_mode_blocks.{mode}.{{i}}", f"mode_blocks.{mode}.{{i}}") for mode in modes]
    blocks += [("txt_mode_blocks.{i}", "txt_mode_blocks.{i}"), (SINGLE, SINGLE_BLOCK)]
    pairs = [(f"{one}.{a}", f"{two}.{b}") for one, two in blocks for a, b in inner]
    pairs += [("txt_in", "context_embedder"), ("final_layer.image.linear", "proj_out")]
    pairs += [(f"time_in.{one}_layer", f"timestep_embedder.linear_{two}") for one, two in (("in", 1), ("out", 2))]
    for mode in modes:
        pairs.append((f"emb_in.{mode}", f"x_embedders.{mode}"))
    for mode in (*modes, "txt"):
        for each in ("early_stream_modulations", "single_stream_modulations"):
            pairs.append((f"{each}.{mode}.lin", f"{each}.{mode}.linear"))
    return rows("bfl", pairs) + swapped("bfl", [("final_layer.image.adaLN_modulation.1", "norm_out.linear")])


# --- HunyuanVideo ----------------------------------------------------------------------------------------------------


def hunyuan_video() -> list[Row]:
    """Return the rows in ComfyUI's names, those of Tencent's repository, and diffusers'."""
    attention, refiner = f"{BLOCK}.attn", "context_embedder.token_refiner.refiner_blocks.{i}"
    words = "txt_in.individual_token_refiner.blocks.{i}"
    found: list[Row] = []
    for stream, parts in (("img", QKV), ("txt", ADDED)):
        fused = {"comfy": f"{DOUBLE}.{stream}_attn.qkv", "original": f"{DOUBLE}.{stream}_attn_qkv"}
        found.append(split(fused, attention, parts))
    paths = {"comfy": f"{SINGLE}.linear1", "original": f"{SINGLE}.linear1"}
    found.append(split(paths, SINGLE_BLOCK, (*(f"attn.{part}" for part in QKV), "proj_mlp"), [1, 1, 1, 4]))
    found.append(
        split({"comfy": f"{words}.self_attn.qkv", "original": f"{words}.self_attn_qkv"}, f"{refiner}.attn", QKV)
    )
    for stream, added in (("img", ""), ("txt", "_context")):
        out = "to_add_out" if added else "to_out.0"
        found += three((f"{DOUBLE}.{stream}_attn.proj", f"{DOUBLE}.{stream}_attn_proj", f"{attention}.{out}"))
        found += three((f"{DOUBLE}.{stream}_mod.lin", f"{DOUBLE}.{stream}_mod.linear", f"{BLOCK}.norm1{added}.linear"))
        for index, layer in ((0, "net.0.proj"), (2, "net.2")):
            fc = f"{DOUBLE}.{stream}_mlp.fc{index // 2 + 1}"
            found += three((f"{DOUBLE}.{stream}_mlp.{index}", fc, f"{BLOCK}.ff{added}.{layer}"))
    found += three(
        (f"{SINGLE}.linear2", f"{SINGLE}.linear2", f"{SINGLE_BLOCK}.proj_out"),
        (f"{SINGLE}.modulation.lin", f"{SINGLE}.modulation.linear", f"{SINGLE_BLOCK}.norm.linear"),
        (f"{words}.self_attn.proj", f"{words}.self_attn_proj", f"{refiner}.attn.to_out.0"),
        (f"{words}.mlp.0", f"{words}.mlp.fc1", f"{refiner}.ff.net.0.proj"),
        (f"{words}.mlp.2", f"{words}.mlp.fc2", f"{refiner}.ff.net.2"),
        (f"{words}.adaLN_modulation.1", f"{words}.adaLN_modulation.1", f"{refiner}.norm_out.linear"),
        ("txt_in.input_embedder", "txt_in.input_embedder", "context_embedder.proj_in"),
        ("img_in.proj", "img_in.proj", "x_embedder.proj"),
        ("final_layer.linear", "final_layer.linear", "proj_out"),
    )
    for part, layer, linear in ((0, "in_layer", "linear_1"), (2, "out_layer", "linear_2")):
        embed, text = "time_text_embed", "context_embedder.time_text_embed"
        found += three(
            (f"time_in.{layer}", f"time_in.mlp.{part}", f"{embed}.timestep_embedder.{linear}"),
            (f"guidance_in.{layer}", f"guidance_in.mlp.{part}", f"{embed}.guidance_embedder.{linear}"),
            (f"vector_in.{layer}", f"vector_in.{layer}", f"{embed}.text_embedder.{linear}"),
            (f"txt_in.t_embedder.{layer}", f"txt_in.t_embedder.mlp.{part}", f"{text}.timestep_embedder.{linear}"),
            (f"txt_in.c_embedder.{layer}", f"txt_in.c_embedder.{linear}", f"{text}.text_embedder.{linear}"),
        )
    put_aspects(found, "comfy", FLUX_ASPECTS)
    last = "final_layer.adaLN_modulation.1"
    found += [{**row, "orders": SWAPPED} for row in three((last, last, "norm_out.linear"))]
    return found


def three(*triples: tuple[str, str, str]) -> list[Row]:
    return [{"paths": {"comfy": one, "original": two, "diffusers": three}} for one, two, three in triples]


# --- Lumina 2, Z-Image, Ideogram -------------------------------------------------------------------------------------


def lumina2() -> list[Row]:
    found: list[Row] = []
    for block in ("layers.{i}", "noise_refiner.{i}", "context_refiner.{i}"):
        found.append(split({"native": f"{block}.attention.qkv"}, f"{block}.attn", QKV, [3, 1, 1]))
        pairs = [("attention.out", "attn.to_out.0"), ("attention.q_norm", "attn.norm_q")]
        pairs += [("attention.k_norm", "attn.norm_k"), ("attention_norm2", "norm2")]
        pairs += [(f"feed_forward.w{each}", f"feed_forward.linear_{each}") for each in (1, 2, 3)]
        pairs += [(f"ffn_norm{each}", f"ffn_norm{each}") for each in (1, 2)]
        if block.startswith("context"):
            pairs.append(("attention_norm1", "norm1"))
        else:
            pairs += [("attention_norm1", "norm1.norm"), ("adaLN_modulation.1", "norm1.linear")]
        found += rows("native", [(f"{block}.{one}", f"{block}.{two}") for one, two in pairs])
    outer = "time_caption_embed"
    return found + rows(
        "native",
        [
            ("x_embedder", "x_embedder"),
            ("t_embedder.mlp.0", f"{outer}.timestep_embedder.linear_1"),
            ("t_embedder.mlp.2", f"{outer}.timestep_embedder.linear_2"),
            ("cap_embedder.0", f"{outer}.caption_embedder.0"),
            ("cap_embedder.1", f"{outer}.caption_embedder.1"),
            ("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
            ("final_layer.linear", "norm_out.linear_2"),
        ],
    )


def fused_aspect(rows: list[Row], aspect: list[int]) -> list[Row]:
    """Say how many rows the fused weights have for how many columns."""
    put_aspects(rows, "native", {"attention.qkv": aspect})
    return rows


def z_image() -> list[Row]:
    found: list[Row] = []
    unchanged = [*(f"feed_forward.w{each}" for each in (1, 2, 3)), "attention_norm1", "attention_norm2"]
    unchanged += ["ffn_norm1", "ffn_norm2", "adaLN_modulation.0"]
    for block in ("layers.{i}", "noise_refiner.{i}", "context_refiner.{i}"):
        found.append(split({"native": f"{block}.attention.qkv"}, f"{block}.attention", QKV))
        pairs = [(f"attention.{one}", f"attention.{two}") for one, two in (("out", "to_out.0"), ("q_norm", "norm_q"))]
        pairs += [("attention.k_norm", "attention.norm_k"), *((name, name) for name in unchanged)]
        found += rows("native", [(f"{block}.{one}", f"{block}.{two}") for one, two in pairs])
    pairs = [(name, name) for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")]
    pairs += [("x_embedder", "all_x_embedder.2-1")]
    pairs += [(f"final_layer.{each}", f"all_final_layer.2-1.{each}") for each in ("linear", "adaLN_modulation.1")]
    return found + rows("native", pairs)


def ideogram4() -> list[Row]:
    block = "layers.{i}"
    unchanged = [*(f"feed_forward.w{each}" for each in (1, 2, 3)), "adaln_modulation"]
    outside = ("input_proj", "llm_cond_proj", "t_embedding.mlp_in", "t_embedding.mlp_out", "adaln_proj")
    return [
        split({"native": f"{block}.attention.qkv"}, f"{block}.attention", QKV),
        *rows("native", [(f"{block}.attention.o", f"{block}.attention.to_out.0")]),
        *same(["native", "diffusers"], *(f"{block}.{name}" for name in unchanged), *outside),
        *same(["native", "diffusers"], "final_layer.linear", "final_layer.adaln_modulation"),
    ]


# --- LTX, Mochi, AuraFlow, Cosmos ------------------------------------------------------------------------------------

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADALN = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")


def attentions(*names: str) -> Pairs:
    pairs = [(f"{BLOCK}.{name}.{each}", f"{BLOCK}.{name}.{each}") for name in names for each in ATTENTION]
    return pairs + [(f"{BLOCK}.{name}.{one}_norm", f"{BLOCK}.{name}.norm_{one}") for name in names for one in "qk"]


def ltx() -> list[Row]:
    pairs = attentions("attn1", "attn2")
    pairs += [(f"{BLOCK}.ff.net.{each}",) * 2 for each in ("0.proj", "2")]
    pairs += [(f"adaln_single.{each}", f"time_embed.{each}") for each in ADALN]
    pairs += [(f"caption_projection.linear_{each}",) * 2 for each in (1, 2)]
    return rows("native", [("patchify_proj", "proj_in"), *pairs, ("proj_out", "proj_out")])


def ltx2() -> list[Row]:
    own, crossed = ("attn1", "attn2"), ("audio_to_video_attn", "video_to_audio_attn")
    names = [*own, *(f"audio_{name}" for name in own), *crossed]
    pairs = attentions(*names)
    pairs += [(f"{BLOCK}.{name}.to_gate_logits",) * 2 for name in names]
    pairs += [(f"{BLOCK}.{ff}.net.{each}",) * 2 for ff in ("ff", "audio_ff") for each in ("0.proj", "2")]
    pairs += [("patchify_proj", "proj_in"), ("audio_patchify_proj", "audio_proj_in")]
    modulations = [
        ("adaln_single", "time_embed"),
        ("audio_adaln_single", "audio_time_embed"),
        ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
        ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
        ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
        ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
        ("prompt_adaln_single", "prompt_adaln"),
        ("audio_prompt_adaln_single", "audio_prompt_adaln"),
    ]
    pairs += [(f"{one}.{each}", f"{two}.{each}") for one, two in modulations for each in ADALN]
    for stream in ("", "audio_"):
        pairs += [(f"{stream}caption_projection.linear_{each}",) * 2 for each in (1, 2)]
        pairs.append((f"{stream}proj_out",) * 2)
    return rows("native", pairs)


def mochi() -> list[Row]:
    native, attention = "blocks.{i}", f"{BLOCK}.attn1"
    pairs = [
        (f"{native}.attn.proj_x", f"{attention}.to_out.0"),
        (f"{native}.attn.proj_y", f"{attention}.to_add_out"),
        (f"{native}.mod_x", f"{BLOCK}.norm1.linear"),
        (f"{native}.mlp_x.w2", f"{BLOCK}.ff.net.2"),
        (f"{native}.mlp_y.w2", f"{BLOCK}.ff_context.net.2"),
        ("x_embedder.proj", "patch_embed.proj"),
        *((f"t_embedder.mlp.{one}", f"time_embed.timestep_embedder.linear_{two}") for one, two in ((0, 1), (2, 2))),
        *((f"t5_y_embedder.{each}", f"time_embed.pooler.{each}") for each in ("to_kv", "to_q", "to_out")),
        ("t5_yproj", "time_embed.caption_proj"),
        ("final_layer.linear", "proj_out"),
    ]
    return [
        split({"native": f"{native}.attn.qkv_x"}, attention, QKV),
        split({"native": f"{native}.attn.qkv_y"}, attention, ADDED),
        *rows("native", pairs),
        # The last of the 48 blocks only scales its text stream, and has a module of another name for it.
        *rows("native", [("blocks.47.mod_y", "transformer_blocks.47.norm1_context.linear_1")]),
        *rows("native", [(f"{native}.mod_y", f"{BLOCK}.norm1_context.linear")]),
        *swapped("native", [(f"{native}.mlp_x.w1", f"{BLOCK}.ff.net.0.proj")]),
        *swapped("native", [(f"{native}.mlp_y.w1", f"{BLOCK}.ff_context.net.0.proj")]),
        *swapped("native", [("final_layer.mod", "norm_out.linear")]),
    ]


def auraflow() -> list[Row]:
    double, joint, single = "double_layers.{i}", "joint_transformer_blocks.{i}", "single_layers.{i}"
    layers = (("c_fc1", "linear_1"), ("c_fc2", "linear_2"), ("c_proj", "out_projection"))
    parts = (*zip("qkv", QKV, strict=True), ("o", "to_out.0"))
    added = (*zip("qkv", ADDED, strict=True), ("o", "to_add_out"))
    pairs = [
        (f"{double}.{mlp}.{a}", f"{joint}.{ff}.{b}")
        for mlp, ff in (("mlpX", "ff"), ("mlpC", "ff_context"))
        for a, b in layers
    ]
    pairs += [(f"{double}.modX.1", f"{joint}.norm1.linear"), (f"{double}.modC.1", f"{joint}.norm1_context.linear")]
    pairs += [(f"{double}.attn.w2{a}", f"{joint}.attn.{b}") for a, b in parts]
    pairs += [(f"{double}.attn.w1{a}", f"{joint}.attn.{b}") for a, b in added]
    pairs += [(f"{single}.mlp.{a}", f"{SINGLE_BLOCK}.ff.{b}") for a, b in layers]
    pairs += [(f"{single}.attn.w1{a}", f"{SINGLE_BLOCK}.attn.{b}") for a, b in parts]
    pairs += [
        (f"{single}.modCX.1", f"{SINGLE_BLOCK}.norm1.linear"),
        ("t_embedder.mlp.0", "time_step_proj.linear_1"),
        ("t_embedder.mlp.2", "time_step_proj.linear_2"),
        ("cond_seq_linear", "context_embedder"),
        ("final_linear", "proj_out"),
        ("init_x_linear", "pos_embed.proj"),
    ]
    return rows("native", pairs) + swapped("native", [("modF.1", "norm_out.linear")])


def cosmos() -> list[Row]:
    native = "blocks.{i}"
    pairs: Pairs = []
    for one, two in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        pairs += [(f"{native}.{one}.{name}_proj", f"{BLOCK}.{two}.to_{name}") for name in "qkv"]
        pairs += [(f"{native}.{one}.{name}_norm", f"{BLOCK}.{two}.norm_{name}") for name in "qk"]
        pairs.append((f"{native}.{one}.output_proj", f"{BLOCK}.{two}.to_out.0"))
    for norm, name in ((1, "self_attn"), (2, "cross_attn"), (3, "mlp")):
        pairs += [(f"{native}.adaln_modulation_{name}.{n}", f"{BLOCK}.norm{norm}.linear_{n}") for n in (1, 2)]
    pairs += [(f"{native}.mlp.layer1", f"{BLOCK}.ff.net.0.proj"), (f"{native}.mlp.layer2", f"{BLOCK}.ff.net.2")]
    pairs += [(f"final_layer.adaln_modulation.{n}", f"norm_out.linear_{n}") for n in (1, 2)]
    pairs += [(f"t_embedder.1.linear_{n}", f"time_embed.t_embedder.linear_{n}") for n in (1, 2)]
    pairs += [("t_embedding_norm", "time_embed.norm"), ("x_embedder.proj.1", "patch_embed.proj")]
    return rows("native", [*pairs, ("final_layer.linear", "proj_out")])


def anima_conditioner() -> list[Row]:
    block = "blocks.{i}"
    attention = [
        f"{name}.{each}" for name in ("self_attn", "cross_attn") for each in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    return same(["native"], *(f"{block}.{each}" for each in (*attention, "mlp.0", "mlp.2")), "embed", "out_proj")


# --- Krea 2, MiniMax-H3, ACE-Step ------------------------------------------------------------------------------------


def krea2() -> list[Row]:
    attention = (("wq", "to_q"), ("wk", "to_k"), ("wv", "to_v"), ("wo", "to_out.0"), ("gate", "to_gate"))
    blocks = [("blocks.{i}", BLOCK)]
    blocks += [
        (f"txtfusion.{each}.{{i}}", f"text_fusion.{each}.{{i}}") for each in ("layerwise_blocks", "refiner_blocks")
    ]
    pairs = [(f"{one}.attn.{a}", f"{two}.attn.{b}") for one, two in blocks for a, b in attention]
    pairs += [(f"{one}.mlp.{each}", f"{two}.ff.{each}") for one, two in blocks for each in ("gate", "up", "down")]
    pairs += [
        ("first", "img_in"),
        ("last.linear", "final_layer.linear"),
        ("tmlp.0", "time_embed.linear_1"),
        ("tmlp.2", "time_embed.linear_2"),
        ("tproj.1", "time_mod_proj"),
        ("txtmlp.1", "txt_in.linear_1"),
        ("txtmlp.3", "txt_in.linear_2"),
        ("txtfusion.projector", "text_fusion.projector"),
    ]
    return rows("native", pairs)


def minimax_h3() -> list[Row]:
    found: list[Row] = []
    for one, two in (("blocks.{i}", BLOCK), ("token_refiner.blocks.{i}", "token_refiner.refiner_blocks.{i}")):
        found.append(split({"native": f"{one}.attn.qkv_proj"}, f"{two}.attn", QKV))
        found += rows(
            "native", [(f"{one}.attn.out_proj", f"{two}.attn.to_out.0"), (f"{one}.mlp.fc2", f"{two}.ff.net.2")]
        )
        found += swapped("native", [(f"{one}.mlp.fc1", f"{two}.ff.net.0.proj")])
    return found + rows(
        "native",
        [
            ("blocks.{i}.adaln_proj.linear", f"{BLOCK}.adaln_proj.linear"),
            ("video_patch_proj", "proj_in"),
            ("audio_patch_proj", "audio_proj_in"),
            ("condition_proj", "context_embedder"),
            ("time_embedder.proj_in", "time_embedder.linear_1"),
            ("time_embedder.proj_out", "time_embedder.linear_2"),
            ("final_layer.adaln_proj.linear", "norm_out.linear"),
            ("final_layer.video_out", "proj_out"),
            ("final_layer.audio_out", "audio_proj_out"),
        ],
    )


def ace_step() -> list[Row]:
    block = "layers.{i}"
    parts = (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("o_proj", "to_out.0"))
    pairs = [(f"{block}.{each}.{a}", f"{block}.{each}.{b}") for each in ("self_attn", "cross_attn") for a, b in parts]
    pairs += [(f"{block}.mlp.{each}_proj",) * 2 for each in ("gate", "up", "down")]
    outside = [
        f"{embed}.{each}" for embed in ("time_embed", "time_embed_r") for each in ("linear_1", "linear_2", "time_proj")
    ]
    pairs += [(name, name) for name in (*outside, "condition_embedder")]
    return [*rows("native", pairs), *same(["diffusers"], "proj_in_conv", "proj_out_conv")]


# --- Models that all call by diffusers' names ------------------------------------------------------------------------


def cogvideox() -> list[Row]:
    inner = [f"attn1.{each}" for each in (*ATTENTION, "norm_q", "norm_k")]
    inner += ["norm1.linear", "norm2.linear", "ff.net.0.proj", "ff.net.2"]
    outside = ["patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out"]
    outside += [f"time_embedding.linear_{each}" for each in (1, 2)] + [
        "ofs_embedding.linear_1",
        "ofs_embedding.linear_2",
    ]
    return same(["diffusers"], *(f"{BLOCK}.{name}" for name in inner), *outside)


def sana() -> list[Row]:
    inner = [f"{name}.{each}" for name in ("attn1", "attn2") for each in ATTENTION]
    inner += [f"ff.conv_{each}" for each in ("inverted", "depth", "point")]
    outside = ["patch_embed.proj", "caption_projection.linear_1", "caption_projection.linear_2", "proj_out"]
    outside += [f"time_embed.{each}" for each in ADALN]
    return same(["diffusers"], *(f"{BLOCK}.{name}" for name in inner), *outside)


def hidream() -> list[Row]:
    attention = [f"attn1.{each}{stream}" for each in ("to_q", "to_k", "to_v", "to_out") for stream in ("", "_t")]
    expert = ("w1", "w2", "w3")
    feed = [f"ff_i.{each}" for each in expert] + [f"ff_i.shared_experts.{each}" for each in expert]
    feed += [f"ff_i.experts.{{j}}.{each}" for each in expert] + ["ff_i.gate", *(f"ff_t.{each}" for each in expert)]
    inner = [*attention, *feed, "adaLN_modulation.1"]
    blocks = [f"{kind}_stream_blocks.{{i}}.block" for kind in ("double", "single")]
    outside = [
        "caption_projection.{i}.linear",
        "x_embedder.proj",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ]
    outside += [f"t_embedder.timestep_embedder.linear_{each}" for each in (1, 2)]
    outside += [f"p_embedder.pooled_embedder.linear_{each}" for each in (1, 2)]
    return same(["diffusers"], *(f"{block}.{name}" for block in blocks for name in inner), *outside)


def ernie_image() -> list[Row]:
    inner = [f"self_attention.{each}" for each in (*ATTENTION, "norm_q", "norm_k")]
    inner += [f"mlp.{each}" for each in ("gate_proj", "up_proj", "linear_fc2")]
    outside = ["x_embedder.proj", "text_proj", "time_embedding.linear_1", "time_embedding.linear_2"]
    outside += ["adaLN_modulation.1", "final_norm.linear", "final_linear"]
    return same(["diffusers"], *(f"layers.{{i}}.{name}" for name in inner), *outside)


def cogview4() -> list[Row]:
    inner = [f"attn1.{each}" for each in ATTENTION] + ["norm1.linear", "ff.net.0.proj", "ff.net.2"]
    outside = ["patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out"]
    outside += [
        f"time_condition_embed.{each}_embedder.linear_{n}" for each in ("timestep", "condition") for n in (1, 2)
    ]
    return same(["diffusers"], *(f"{BLOCK}.{name}" for name in inner), *outside)


def kandinsky5() -> list[Row]:
    parts = ("to_query", "to_key", "to_value", "out_layer")
    text = [f"text_transformer_blocks.{{i}}.{each}" for each in ("feed_forward.in_layer", "feed_forward.out_layer")]
    text += [f"text_transformer_blocks.{{i}}.{name}" for name in ("text_modulation.out_layer",)]
    text += [f"text_transformer_blocks.{{i}}.self_attention.{each}" for each in parts]
    visual = [f"{name}.{each}" for name in ("self_attention", "cross_attention") for each in parts]
    visual += ["feed_forward.in_layer", "feed_forward.out_layer", "visual_modulation.out_layer"]
    outside = [f"time_embeddings.{each}_layer" for each in ("in", "out")]
    outside += ["text_embeddings.in_layer", "pooled_text_embeddings.in_layer", "visual_embeddings.in_layer"]
    outside += ["out_layer.modulation.out_layer", "out_layer.out_layer"]
    return same(["diffusers"], *text, *(f"visual_transformer_blocks.{{i}}.{name}" for name in visual), *outside)


def main() -> None:
    """Write the tables."""
    write("flux2-transformer", "FLUX.2", flux2(), "Flux2Transformer2DModel", schemes("bfl"), two_stacks(8, 48))
    write("flux3-transformer", "FLUX.3", flux3(), "Flux3Transformer2DModel", schemes("bfl"))
    hunyuan = schemes("comfy", "original")
    depths = two_stacks(20, 40)
    write(
        "hunyuan-video-transformer", "HunyuanVideo", hunyuan_video(), "HunyuanVideoTransformer3DModel", hunyuan, depths
    )
    write(
        "lumina2-transformer",
        "Lumina 2",
        fused_aspect(lumina2(), [5, 3]),
        "Lumina2Transformer2DModel",
        schemes("native"),
    )
    image = schemes("diffusers", "native")
    write("z-image-transformer", "Z-Image", fused_aspect(z_image(), [3, 1]), "ZImageTransformer2DModel", image)
    write(
        "ideogram4-transformer",
        "Ideogram 4",
        fused_aspect(ideogram4(), [3, 1]),
        "Ideogram4Transformer2DModel",
        schemes("native"),
    )
    write("ltx-transformer", "LTX-Video", ltx(), "LTXVideoTransformer3DModel", schemes("native"))
    write("ltx2-transformer", "LTX-2", ltx2(), "LTX2VideoTransformer3DModel", schemes("native"))
    write("mochi-transformer", "Mochi", mochi(), "MochiTransformer3DModel", schemes("native"))
    write("auraflow-transformer", "AuraFlow", auraflow(), "AuraFlowTransformer2DModel", schemes("native"))
    write("cosmos-transformer", "Cosmos-Predict2, Anima", cosmos(), "CosmosTransformer3DModel", schemes("native"))
    write("krea2-transformer", "Krea 2", krea2(), "Krea2Transformer2DModel", schemes("native"))
    write("minimax-h3-transformer", "MiniMax-H3", minimax_h3(), "MiniMaxH3Transformer3DModel", schemes("native"))
    write("ace-step-transformer", "ACE-Step", ace_step(), "AceStepTransformer1DModel", schemes("native"))
    alike = schemes("diffusers")
    write("cogvideox-transformer", "CogVideoX", cogvideox(), "CogVideoXTransformer3DModel", alike)
    write("cogview4-transformer", "CogView4", cogview4(), "CogView4Transformer2DModel", alike)
    write("ernie-image-transformer", "ERNIE-Image", ernie_image(), "ErnieImageTransformer2DModel", alike)
    write("sana-transformer", "Sana", sana(), "SanaTransformer2DModel", alike)
    write("hidream-transformer", "HiDream", hidream(), "HiDreamImageTransformer2DModel", alike)
    write("kandinsky5-transformer", "Kandinsky 5", kandinsky5(), "Kandinsky5Transformer3DModel", alike)
    named = {name: {"spelling": "native"} for name in ("kohya", "dotted", "diffusers", "peft")}
    fields = {"classes": ["AnimaTextConditioner"], "schemes": named}
    table("anima-text-conditioner", "Anima's text conditioner", ["text_conditioner"], anima_conditioner(), **fields)
    projection = [("aggregate_embed", "text_proj_in")]
    named = schemes("native", kohya={}, dotted={"text_embedding_projection": "connectors"})
    fields = {"classes": ["LTX2TextConnectors"], "schemes": named}
    table("ltx2-connectors", "LTX-2's projection of texts", ["connectors"], rows("native", projection), **fields)


WIDTHS = {"Lumina 2": [2304, 9216], "Z-Image": [3840, 10240], "Ideogram 4": [4608, 12288]}
"""Sizes of the published models, of those that share names of single-stream blocks."""


def write(
    name: str, title: str, modules: list[Row], model: str, named: dict[str, Any], depths: dict[str, int] | None = None
) -> None:
    """Write one table of a transformer."""
    fields: dict[str, Any] = {"widths": WIDTHS[title]} if title in WIDTHS else {}
    fields |= {"depths": depths} if depths else {}
    table(name, title, ["transformer"], modules, **fields, classes=[model], schemes=named)


if __name__ == "__main__":
    main()
