"""Every converter of diffusers' loaders names a layout that is out there: ours gives the same changes for each.

A file is made under the names that the converter is for, read by the pipeline's own loader (`lora_state_dict`) and by
ours, and both must name the same modules and make the same ΔW of them. Where diffusers is known to be wrong the
difference is stated (`docs/peers.md`), and shown to be still there.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from loraformat.adapter import Target
from loraformat.base_facts import NO_FACTS
from loraformat.conversion import respell_by
from loraformat.loading import load_adapter
from loraformat.spellings import Reading

torch = pytest.importorskip("torch", reason="needs torch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
pytestmark = pytest.mark.oracle

from diffusers.loaders import lora_pipeline as pipelines  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

Shapes = Mapping[str, tuple[int, int]]
H, W = 96, 80
"""A hidden size that all converters can divide, and another: no matrix is square."""
A, B = "lora_A.weight", "lora_B.weight"
DOWN, UP = "lora_down.weight", "lora_up.weight"


def flat(prefix: str) -> Callable[[str], str]:
    return lambda path: f"{prefix}{path.replace('.', '_')}"


def behind(prefix: str) -> Callable[[str], str]:
    return lambda path: f"{prefix}{path}"


@dataclass(frozen=True)
class Layout:
    """Files of one layout.

    Attributes:
        loader: diffusers' class for the pipeline.
        modules: what is adapted.
        name: from a module to how the file calls it.
        down: what A is called.
        up: what B is called.
        alpha: the alpha of every module, or None for files without.
        rank: how many rows A has.
        wrong: modules, as diffusers calls them, that it gets wrong.
        options: what our reading must be told.
        via: a scheme to convert to first, for files that are diffusers' own but for the names: these would be kept.
    """

    loader: str
    modules: Shapes
    name: Callable[[str], str]
    down: str = A
    up: str = B
    alpha: float | None = None
    rank: int = 3
    wrong: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)
    via: str = ""

    def make(self) -> dict[str, Any]:
        dice = torch.Generator().manual_seed(7)
        tensors = {}
        for module, (out, inner) in self.modules.items():
            key = self.name(module)
            tensors[f"{key}.{self.down}"] = torch.randn(self.rank, inner, generator=dice)
            tensors[f"{key}.{self.up}"] = torch.randn(out, self.rank, generator=dice)
            if self.alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(self.alpha)
        return tensors


def blocks(*names: str, count: int = 2) -> Iterator[str]:
    for number in range(count):
        for name in names:
            yield name.replace("{i}", str(number))


def shaped(paths: Iterator[str], shape: tuple[int, int] = (H, W)) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(paths, shape)


def flux2(h: int = H) -> Shapes:
    double, single = "double_blocks.{i}", "single_blocks.{i}"
    return {
        **shaped(blocks(f"{double}.img_attn.qkv", f"{double}.txt_attn.qkv"), (3 * h, h)),
        **shaped(blocks(f"{double}.img_attn.proj", f"{double}.txt_attn.proj"), (h, h)),
        **shaped(blocks(f"{double}.img_mlp.0", f"{double}.txt_mlp.0"), (6 * h, h)),
        **shaped(blocks(f"{double}.img_mlp.2", f"{double}.txt_mlp.2"), (h, 3 * h)),
        **shaped(blocks(f"{single}.linear1"), (9 * h, h)),
        **shaped(blocks(f"{single}.linear2"), (h, 4 * h)),
        "img_in": (h, 128),
        "txt_in": (h, 44),
        "time_in.in_layer": (h, 56),
        "time_in.out_layer": (h, W),
        "final_layer.linear": (28, h),
    }


FLUX2_MORE: Shapes = {
    "guidance_in.in_layer": (H, 56),
    "guidance_in.out_layer": (H, W),
    "final_layer.adaLN_modulation.1": (2 * H, H),
    "single_stream_modulation.lin": (3 * H, W),
    "double_stream_modulation_img.lin": (6 * H, W),
    "double_stream_modulation_txt.lin": (6 * H, W),
}
FLUX3: Shapes = shaped(
    blocks(
        *(
            f"{block}.{{i}}.{name}"
            for block in (
                "content_mode_blocks.image",
                "content_mode_blocks.image_cond",
                "txt_mode_blocks",
                "single_blocks",
            )
            for name in ("q_proj", "k_proj", "v_proj", "attn_out", "mlp_in", "mlp_out")
        )
    )
)


def hunyuan_video(h: int = 3072) -> Shapes:
    double, single, token = "double_blocks.{i}", "single_blocks.{i}", "txt_in.individual_token_refiner.blocks.{i}"
    return {
        **shaped(blocks(f"{double}.img_attn_qkv", f"{double}.txt_attn_qkv", count=1), (3 * h, h)),
        **shaped(blocks(f"{double}.img_attn_proj", f"{double}.txt_attn_proj", count=1), (h, h)),
        **shaped(blocks(f"{double}.img_mod.linear", f"{double}.txt_mod.linear", count=1), (6 * h, h)),
        **shaped(blocks(f"{double}.img_mlp.fc1", f"{double}.txt_mlp.fc1", count=1), (4 * h, h)),
        **shaped(blocks(f"{double}.img_mlp.fc2", f"{double}.txt_mlp.fc2", count=1), (h, 4 * h)),
        **shaped(blocks(f"{single}.linear1", count=1), (7 * h, h)),
        **shaped(blocks(f"{single}.linear2", count=1), (h, 5 * h)),
        **shaped(blocks(f"{single}.modulation.linear", count=1), (3 * h, h)),
        **shaped(
            blocks(f"{token}.self_attn_proj", f"{token}.mlp.fc1", f"{token}.mlp.fc2", f"{token}.adaLN_modulation.1")
        ),
        **{f"{name}.mlp.{part}": (H, W) for name in ("time_in", "guidance_in", "txt_in.t_embedder") for part in (0, 2)},
        **{f"txt_in.c_embedder.linear_{part}": (H, W) for part in (1, 2)},
        **{f"vector_in.{part}_layer": (H, W) for part in ("in", "out")},
        "txt_in.input_embedder": (H, W),
        "final_layer.linear": (64, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }


WAN_BLOCK = [f"blocks.{{i}}.{each}_attn.{name}" for each in ("self", "cross") for name in "qkvo"]
WAN: Shapes = shaped(blocks(*WAN_BLOCK, "blocks.{i}.ffn.0", "blocks.{i}.ffn.2"))
WAN_I2V: Shapes = {**WAN, **shaped(blocks("blocks.{i}.cross_attn.k_img", "blocks.{i}.cross_attn.v_img"))}
WAN_ENDS: Shapes = {
    **WAN_I2V,
    "time_projection.1": (6 * H, W),
    "head.head": (28, H),
    **{f"{name}_embedding.{part}": (H, W) for name in ("text", "time") for part in (0, 2)},
    **{f"img_emb.proj.{part}": (H, W) for part in (1, 3)},
}
QWEN: Shapes = shaped(
    blocks(
        *(f"transformer_blocks.{{i}}.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
        *(f"transformer_blocks.{{i}}.attn.add_{name}_proj" for name in "qkv"),
        *(f"transformer_blocks.{{i}}.{each}_mlp.net.{layer}" for each in ("img", "txt") for layer in ("0.proj", "2")),
        *(f"transformer_blocks.{{i}}.{each}_mod.1" for each in ("img", "txt")),
    )
)
QWEN_ENDS: Shapes = {
    **QWEN,
    **dict.fromkeys(("img_in", "txt_in", "proj_out", "norm_out.linear"), (H, W)),
    **{f"time_text_embed.timestep_embedder.linear_{each}": (H, W) for each in (1, 2)},
}
SINGLE_STREAM = ("layers.{i}", "noise_refiner.{i}", "context_refiner.{i}")
LUMINA2: Shapes = {
    **shaped(blocks(*(f"{block}.attention.qkv" for block in SINGLE_STREAM)), (3840, 2304)),
    **shaped(blocks(*(f"{block}.attention.out" for block in SINGLE_STREAM))),
    **shaped(blocks(*(f"{block}.feed_forward.w{each}" for block in SINGLE_STREAM for each in (1, 2, 3)))),
    **shaped(blocks(*(f"{block}.adaLN_modulation.1" for block in SINGLE_STREAM[:2]))),
}
Z_INNER = [
    *(f"attention.to_{name}" for name in "qkv"),
    "attention.to_out.0",
    *(f"feed_forward.w{each}" for each in (1, 2, 3)),
]
Z_IMAGE: Shapes = shaped(blocks(*(f"{block}.{name}" for block in SINGLE_STREAM for name in Z_INNER)))
Z_IMAGE_ENDS: Shapes = {
    **Z_IMAGE,
    **shaped(blocks("layers.{i}.adaLN_modulation.0", "noise_refiner.{i}.adaLN_modulation.0")),
}
Z_FUSED: Shapes = {
    **shaped(blocks(*(f"{block}.attention.qkv" for block in SINGLE_STREAM)), (3 * H, H)),
    **shaped(blocks(*(f"{block}.attention.out" for block in SINGLE_STREAM))),
    **shaped(blocks(*(f"{block}.feed_forward.w2" for block in SINGLE_STREAM))),
}
IDEOGRAM4: Shapes = {
    **shaped(blocks("layers.{i}.attention.qkv"), (3 * H, W)),
    **shaped(blocks("layers.{i}.attention.o", *(f"layers.{{i}}.feed_forward.w{each}" for each in (1, 2, 3)))),
    **shaped(blocks("layers.{i}.adaln_modulation"), (4 * H, W)),
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LTX: Shapes = shaped(
    blocks(
        *(f"transformer_blocks.{{i}}.{each}.{name}" for each in ("attn1", "attn2") for name in ATTENTION),
        *(f"transformer_blocks.{{i}}.ff.net.{layer}" for layer in ("0.proj", "2")),
    )
)
LTX2_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
LTX2: Shapes = {
    **shaped(
        blocks(
            *(f"transformer_blocks.{{i}}.{each}.{name}" for each in LTX2_ATTENTIONS for name in ATTENTION),
            *(f"transformer_blocks.{{i}}.{ff}.net.{layer}" for ff in ("ff", "audio_ff") for layer in ("0.proj", "2")),
        )
    ),
    **dict.fromkeys(("patchify_proj", "audio_patchify_proj", "proj_out", "audio_proj_out"), (H, W)),
    **{
        f"{name}.{layer}": (H, W)
        for name in (
            *("adaln_single", "audio_adaln_single", "prompt_adaln_single", "audio_prompt_adaln_single"),
            *("av_ca_video_scale_shift_adaln_single", "av_ca_audio_scale_shift_adaln_single"),
            *("av_ca_a2v_gate_adaln_single", "av_ca_v2a_gate_adaln_single"),
        )
        for layer in ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
    },
}
CONNECTORS: Shapes = {"text_embedding_projection.aggregate_embed": (H, W)}


def ltx2_name(path: str) -> str:
    return path if path in CONNECTORS else f"diffusion_model.{path}"


ANIMA_ATTENTION = [f"{each}_attn.{name}_proj" for each in ("self", "cross") for name in ("q", "k", "v", "output")]
ANIMA_MODULATIONS = [
    f"adaln_modulation_{name}.{each}" for name in ("self_attn", "cross_attn", "mlp") for each in (1, 2)
]
ANIMA: Shapes = {
    **shaped(
        blocks(*(f"blocks.{{i}}.{name}" for name in (*ANIMA_ATTENTION, *ANIMA_MODULATIONS, "mlp.layer1", "mlp.layer2")))
    ),
    **{f"final_layer.{name}": (H, W) for name in ("adaln_modulation.1", "adaln_modulation.2", "linear")},
    "x_embedder.proj.1": (H, W),
    **{f"llm_adapter.blocks.0.{each}_attn.{name}_proj": (H, W) for each in ("self", "cross") for name in "qkvo"},
}
KREA2: Shapes = {
    **shaped(
        blocks(
            *(
                f"{block}.{name}"
                for block in ("blocks.{i}", "txtfusion.layerwise_blocks.{i}", "txtfusion.refiner_blocks.{i}")
                for name in (
                    *(f"attn.{each}" for each in ("wq", "wk", "wv", "wo", "gate")),
                    *(f"mlp.{each}" for each in ("gate", "up", "down")),
                )
            )
        )
    ),
    **dict.fromkeys(("first", "last.linear", "tmlp.0", "tmlp.2", "tproj.1", "txtmlp.1", "txtmlp.3"), (H, W)),
}
MINIMAX: Shapes = {
    **shaped(blocks("blocks.{i}.attn.qkv_proj", "token_refiner.blocks.{i}.attn.qkv_proj"), (3 * H, W)),
    **shaped(
        blocks(
            *(
                f"{block}.{name}"
                for block in ("blocks.{i}", "token_refiner.blocks.{i}")
                for name in ("attn.out_proj", "mlp.fc1", "mlp.fc2")
            ),
            "blocks.{i}.adaln_proj.linear",
        )
    ),
    **dict.fromkeys(("video_patch_proj", "audio_patch_proj", "condition_proj", "final_layer.video_out"), (H, W)),
    **dict.fromkeys(("time_embedder.proj_in", "time_embedder.proj_out", "final_layer.adaln_proj.linear"), (H, W)),
}
MINIMAX_HEADS: Shapes = {
    name: (3 * 5 * 128, W) if name.endswith("qkv_proj") else shape for name, shape in MINIMAX.items()
}
ACE_STEP: Shapes = shaped(
    blocks(*(f"layers.{{i}}.{each}_attn.{name}_proj" for each in ("self", "cross") for name in "qkvo"))
)
HIDREAM: Shapes = shaped(
    blocks(
        *(
            f"{kind}_stream_blocks.{{i}}.block.{name}"
            for kind in ("double", "single")
            for name in (
                "attn1.to_q",
                "attn1.to_out",
                "ff_i.shared_experts.w1",
                "ff_i.experts.3.w2",
                "adaLN_modulation.1",
            )
        ),
        "double_stream_blocks.{i}.block.attn1.to_k_t",
        "double_stream_blocks.{i}.block.ff_t.w3",
    )
)
MIXTURE: Shapes = {
    **{f"transformer_blocks.0.attn.{name}": (H, W) for name in ("to_q", "add_k_proj", "to_out.0", "to_add_out")},
    **{f"single_transformer_blocks.1.attn.{name}": (H, W) for name in ("to_q", "to_k", "to_v")},
    **dict.fromkeys(("context_embedder", "x_embedder", "proj_out", "norm_out.linear"), (H, W)),
    "time_text_embed.guidance_embedder.linear_1": (H, W),
}
NORM_OUT = frozenset({"transformer.norm_out.linear"})
COMFY, KOHYA = behind("diffusion_model."), flat("lora_unet_")
DOTTED_KOHYA: Mapping[str, Any] = {"down": DOWN, "up": UP, "alpha": 2.0}

LAYOUTS: Mapping[str, Layout] = {
    "flux2_ai_toolkit": Layout("Flux2", {**flux2(), **FLUX2_MORE}, COMFY, wrong=NORM_OUT),
    "flux2_kohya": Layout("Flux2", flux2(), KOHYA, **DOTTED_KOHYA),
    "flux2_peft": Layout("Flux2", flux2(), behind("base_model.model.")),
    "flux3": Layout("Flux3", FLUX3, COMFY),
    "hunyuan_video": Layout("HunyuanVideo", hunyuan_video(), str, rank=2, wrong=NORM_OUT),
    "hunyuan_video_prefixed": Layout(
        "HunyuanVideo", hunyuan_video(), behind("transformer."), rank=2, via="dotted", wrong=NORM_OUT
    ),
    "hunyuan_video_of_comfy_prefix": Layout("HunyuanVideo", hunyuan_video(), COMFY, rank=2, wrong=NORM_OUT),
    "wan_comfy": Layout("Wan", WAN_ENDS, COMFY),
    "wan_comfy_alphas": Layout("Wan", WAN_I2V, COMFY, **DOTTED_KOHYA),
    "wan_musubi": Layout("Wan", WAN_I2V, KOHYA, **DOTTED_KOHYA),
    "skyreels_musubi": Layout("SkyReelsV2", WAN, KOHYA, **DOTTED_KOHYA),
    "helios": Layout("Helios", WAN, COMFY),
    "qwen_image_comfy": Layout("QwenImage", QWEN, COMFY),
    "qwen_image_comfy_alphas": Layout("QwenImage", QWEN, COMFY, A, B, 2.0),
    "qwen_image_kohya": Layout("QwenImage", QWEN_ENDS, KOHYA, **DOTTED_KOHYA),
    "qwen_image_diffsynth": Layout("QwenImage", QWEN, str, "lora_A.default.weight", "lora_B.default.weight"),
    "qwen_image_bare": Layout("QwenImage", QWEN, str, **DOTTED_KOHYA),
    "lumina2": Layout("Lumina2", LUMINA2, COMFY, rank=2),
    "z_image_ai_toolkit": Layout("ZImage", Z_IMAGE_ENDS, COMFY),
    "z_image_kohya": Layout("ZImage", Z_IMAGE, KOHYA, **DOTTED_KOHYA),
    "z_image_diffsynth": Layout("ZImage", Z_IMAGE, str, "lora_A.default.weight", "lora_B.default.weight"),
    "z_image_dots": Layout("ZImage", Z_IMAGE, COMFY, "lora.down.weight", "lora.up.weight", 2.0),
    "z_image_dots_fused": Layout("ZImage", Z_FUSED, COMFY, "lora.down.weight", "lora.up.weight", 2.0),
    "ideogram4_comfy": Layout("Ideogram4", IDEOGRAM4, COMFY),
    "ideogram4_kohya": Layout("Ideogram4", IDEOGRAM4, behind("conditional_transformer."), **DOTTED_KOHYA),
    "ltx": Layout("LTXVideo", LTX, COMFY),
    "ltx2": Layout("LTX2", LTX2, COMFY),
    "ltx2_connectors": Layout("LTX2", {**LTX2, **CONNECTORS}, ltx2_name),
    "anima": Layout("Anima", ANIMA, COMFY),
    "krea2_comfy": Layout("Krea2", KREA2, COMFY),
    "krea2_ai_toolkit": Layout("Krea2", KREA2, behind("base_model.model.")),
    "minimax_h3_comfy": Layout("MiniMaxH3", MINIMAX, COMFY),
    "minimax_h3_bare": Layout("MiniMaxH3", MINIMAX, str, **DOTTED_KOHYA),
    "minimax_h3_musubi": Layout("MiniMaxH3", MINIMAX, KOHYA, **DOTTED_KOHYA),
    "minimax_h3_diffsynth": Layout("MiniMaxH3", MINIMAX_HEADS, str, "lora_A.default.weight", "lora_B.default.weight"),
    "ace_step": Layout("AceStep", ACE_STEP, behind("base_model.model."), options={"scale": 1.0}),
    "hidream": Layout("HiDreamImage", HIDREAM, COMFY),
    "ernie": Layout("ErnieImage", shaped(blocks("layers.{i}.self_attention.to_q", "layers.{i}.mlp.gate_proj")), COMFY),
    "flux1_mixture": Layout("Flux", MIXTURE, flat("lora_transformer_"), **DOTTED_KOHYA),
}


def theirs(layout: Layout, tensors: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Return module to ΔW as diffusers' loader reads a file: its converters fold alphas."""
    found = getattr(pipelines, f"{layout.loader}LoraLoaderMixin").lora_state_dict(dict(tensors))
    state = found[0] if isinstance(found, tuple) else found
    modules = sorted({key.partition(".lora_")[0] for key in state})
    return {module: multiply(state[f"{module}.{B}"].numpy(), state[f"{module}.{A}"].numpy()) for module in modules}


def multiply(up: np.ndarray[Any, Any], down: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return ΔW at a hundred rows and columns, the first and the last among them: some models are large."""
    rows, columns = (
        np.unique(np.linspace(0, size - 1, min(size, 131)).astype(int)) for size in (len(up), down.shape[1])
    )
    return up.astype(np.float64)[rows] @ down.astype(np.float64)[:, columns]


def ours(tensors: Mapping[str, Any], folder: Path, layout: Layout) -> dict[str, Target]:
    """Return what our conversion to diffusers makes of a file, read from the file that it wrote."""
    source = folder / "in.safetensors"
    save_file(dict(tensors), source)
    if layout.via:
        source = loraformat.convert(source, layout.via, folder / "via.safetensors").output
    loraformat.convert(source, "diffusers", folder / "out.safetensors", **layout.options)
    return {target.name: target for target in load_adapter(folder / "out.safetensors").targets}


def change(target: Target) -> np.ndarray[Any, Any]:
    up, down = (target.factors[role].read() for role in (B, A))
    return target.scale * multiply(up, down)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_what_diffusers_reads(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    tensors = layout.make()
    mine, peers = ours(tensors, tmp_path, layout), theirs(layout, tensors)
    assert set(mine) == set(peers)
    for module, expected in peers.items():
        size = float(np.abs(expected).max())
        close = np.allclose(change(mine[module]), expected, rtol=0, atol=1e-5 * size)
        assert close is (module not in layout.wrong), module


def lokr(modules: Shapes, name: Callable[[str], str], alpha: float) -> dict[str, Any]:
    """Return a LoKr of each module, its second factor in two, and every third one whole, where alpha counts nothing."""
    dice = torch.Generator().manual_seed(5)
    tensors = {}
    for index, (module, (out, inner)) in enumerate(modules.items()):
        key = name(module)
        tensors[f"{key}.lokr_w1"] = torch.randn(4, 2, generator=dice)
        if index % 3:
            tensors[f"{key}.lokr_w2_a"] = torch.randn(out // 4, 3, generator=dice)
            tensors[f"{key}.lokr_w2_b"] = torch.randn(3, inner // 2, generator=dice)
        else:
            tensors[f"{key}.lokr_w2"] = torch.randn(out // 4, inner // 2, generator=dice)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def kron(factors: Mapping[str, np.ndarray[Any, Any]], scale: float) -> np.ndarray[Any, Any]:
    second = factors.get("lokr_w2")
    second = factors["lokr_w2_a"] @ factors["lokr_w2_b"] if second is None else second
    return scale * np.kron(factors["lokr_w1"].astype(np.float64), second.astype(np.float64))


FLUX2_LYCORIS: Shapes = {
    **{f"transformer_blocks.0.attn.{name}": (H, W) for name in ("to_q", "to_out.0", "add_k_proj", "to_add_out")},
    **{f"transformer_blocks.1.{ff}.linear_{end}": (H, W) for ff in ("ff", "ff_context") for end in ("in", "out")},
    **{f"single_transformer_blocks.1.attn.{name}": (H, W) for name in ("to_qkv_mlp_proj", "to_out")},
}
LOKR: Mapping[str, tuple[str, Shapes, Callable[[str], str]]] = {
    "z_image": ("ZImage", Z_IMAGE, COMFY),
    "flux2_bfl": ("Flux2", flux2(), COMFY),
    "flux2_lycoris": ("Flux2", FLUX2_LYCORIS, flat("lycoris_")),
}


@pytest.mark.parametrize("name", LOKR)
def test_lokr_gives_what_diffusers_reads(name: str, tmp_path: Path) -> None:
    """diffusers takes a LoKr of a fused weight to its own fused module (`attn.to_qkv`), since it cannot be split."""
    loader, modules, called = LOKR[name]
    tensors = lokr(modules, called, 1.5)
    save_file(tensors, tmp_path / "in.safetensors")
    spelled = respell_by(load_adapter(tmp_path / "in.safetensors"), _fused, NO_FACTS)[0]
    found = getattr(pipelines, f"{loader}LoraLoaderMixin").lora_state_dict(dict(tensors))
    groups: dict[str, dict[str, Any]] = {}
    for key, tensor in (found[0] if isinstance(found, tuple) else found).items():
        module, _, role = key.rpartition(".")
        groups.setdefault(module, {})[role] = tensor.numpy()
    assert {target.name for target in spelled.targets} == set(groups)
    for target in spelled.targets:
        mine = kron({role: factor.read() for role, factor in target.factors.items()}, target.scale)
        np.testing.assert_allclose(mine, kron(groups[target.name], 1.0), rtol=1e-5, atol=1e-6)


def _fused(reading: Reading, component: str) -> str:
    return "fused" if "fused" in reading.table.spellings and reading.spelling == "bfl" else "diffusers"
