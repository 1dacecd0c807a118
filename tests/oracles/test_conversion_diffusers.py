"""diffusers reads what conversion writes, its own converters agree with ours about ΔW, and its models have our names.

Where diffusers is known to be wrong, the difference is expected and stated (`PEER_BUGS`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from loraformat.adapter import Factor, Target
from loraformat.conversion import read_base_facts
from loraformat.loading import load_adapter
from loraformat.schemes import StatedScale
from loraformat.spellings import all_tables

torch = pytest.importorskip("torch", reason="needs torch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
pytestmark = pytest.mark.oracle

from diffusers.loaders import lora_conversion_utils as peer  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

TABLES = {table.name: table for table in all_tables()}
H = 3072
FLUX = {
    "double_blocks.0.img_attn.qkv": (3 * H, H),
    "double_blocks.0.txt_attn.proj": (H, H),
    "double_blocks.1.img_mlp.2": (H, 4 * H),
    "double_blocks.1.txt_mod.lin": (6 * H, H),
    "single_blocks.0.linear1": (7 * H, H),
    "single_blocks.0.linear2": (H, 5 * H),
    "single_blocks.1.modulation.lin": (3 * H, H),
}
SD1 = {
    "unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (320, 320),
    "unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_k": (1280, 768),
    "unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": (10240, 1280),
    "te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
    "te_text_model_encoder_layers_11_self_attn_out_proj": (768, 768),
}
SDXL = {
    "unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (640, 640),
    "unet_middle_block_1_transformer_blocks_9_attn2_to_v": (1280, 2048),
    "unet_output_blocks_1_1_transformer_blocks_3_ff_net_2": (1280, 5120),
    "te1_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
    "te1_text_model_encoder_layers_0_self_attn_out_proj": (768, 768),
    "te2_text_model_encoder_layers_31_self_attn_out_proj": (1280, 1280),
}
WAN = {f"blocks.0.{attention}.{name}": (96, 80) for attention in ("self_attn", "cross_attn") for name in "qkvo"}
WAN |= {"blocks.0.ffn.0": (96, 80), "blocks.0.ffn.2": (80, 96)}
WHOLE_FLUX = {
    **{f"double_blocks.{block}.{stream}_attn.qkv": (3 * H, H) for block in range(19) for stream in ("img", "txt")},
    **{f"double_blocks.{block}.{stream}_attn.proj": (H, H) for block in range(19) for stream in ("img", "txt")},
    **{f"double_blocks.{block}.{stream}_mlp.0": (4 * H, H) for block in range(19) for stream in ("img", "txt")},
    **{f"double_blocks.{block}.{stream}_mlp.2": (H, 4 * H) for block in range(19) for stream in ("img", "txt")},
    **{f"double_blocks.{block}.{stream}_mod.lin": (6 * H, H) for block in range(19) for stream in ("img", "txt")},
    **{f"single_blocks.{block}.linear1": (7 * H, H) for block in range(38)},
    **{f"single_blocks.{block}.linear2": (H, 5 * H) for block in range(38)},
    **{f"single_blocks.{block}.modulation.lin": (3 * H, H) for block in range(38)},
}
ENDS_OF_FLUX = {
    **{
        f"{name}.{layer}": (H, 256)
        for name in ("time_in", "guidance_in", "vector_in")
        for layer in ("in_layer", "out_layer")
    },
    "img_in": (H, 128),
    "txt_in": (H, 4096),
    "final_layer.linear": (64, H),
    "final_layer.adaLN_modulation.1": (2 * H, H),
}
"""FLUX.1 as its converters want it: whole."""
NORMS = [
    *(
        f"double_blocks.{n}.{stream}_attn.norm.{of}_norm"
        for n in range(19)
        for stream in ("img", "txt")
        for of in ("query", "key")
    ),
    *(f"single_blocks.{n}.norm.{of}_norm" for n in range(38) for of in ("query", "key")),
]
PEER_BUGS = {
    "norm_out": "diffusers 0.42 swaps the halves of lora_A of BFL's final modulation as well (swap_scale_shift)",
    "final_layer": "diffusers 0.42 drops the alpha of kohya's final_layer modules (lora_conversion_utils)",
}


def make(
    modules: Mapping[str, tuple[int, ...]],
    down: str,
    up: str,
    *,
    alpha: float | None = None,
    prefix: str = "",
    rank: int = 4,
) -> dict[str, Any]:
    dice = torch.Generator().manual_seed(7)
    tensors = {}
    for name, (out, inner) in modules.items():
        tensors[f"{prefix}{name}.{down}"] = torch.randn(rank, inner, generator=dice)
        tensors[f"{prefix}{name}.{up}"] = torch.randn(out, rank, generator=dice)
        if alpha is not None:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    return tensors


def change(target: Target) -> np.ndarray[Any, Any]:
    down, up = _pair(target.factors)
    return target.scale * _multiply(up, down)


def _multiply(up: np.ndarray[Any, Any], down: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return ΔW at a few hundred rows and columns, the first and the last among them: whole, it takes gigabytes."""
    left, right = (each.reshape(each.shape[0], -1).astype(np.float64) for each in (up, down))
    return left[_some(left.shape[0])] @ right[:, _some(right.shape[1])]


def _some(size: int) -> np.ndarray[Any, Any]:
    return np.unique(np.linspace(0, size - 1, min(size, 331)).astype(int))


def _pair(factors: Mapping[str, Factor]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return factors["lora_A.weight"].read(), factors["lora_B.weight"].read()


def theirs(state: Mapping[str, Any], alphas: Mapping[str, float] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Return module to ΔW of a state dict of diffusers: alphas are beside it, or folded in."""
    found = {}
    for down, up in ((".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight")):
        for key in state:
            if key.endswith(down):
                module = key.removesuffix(down)
                right, left = state[key].double().numpy(), state[module + up].double().numpy()
                scale = (alphas or {}).get(f"{module}.alpha", right.shape[0]) / right.shape[0]
                found[module] = scale * _multiply(left, right)
    return found


def converted(tensors: Mapping[str, Any], folder: Path, **options: Any) -> dict[str, Target]:
    """Return what our conversion to diffusers makes of a file, read from the file that it wrote."""
    save_file(dict(tensors), folder / "in.safetensors")
    loraformat.convert(folder / "in.safetensors", "diffusers", folder / "out.safetensors", verify=True, **options)
    return {target.name: target for target in load_adapter(folder / "out.safetensors").targets}


def compare(ours: Mapping[str, Target], peers: Mapping[str, np.ndarray[Any, Any]]) -> None:
    assert set(ours) == set(peers)
    for name, target in ours.items():
        expected = peers[name]
        size = float(np.abs(expected).max())
        np.testing.assert_allclose(change(target), expected, rtol=0, atol=1e-6 * size, err_msg=name)


def test_kohya_flux(tmp_path: Path) -> None:
    """Fused weights fall into their parts; alpha 10.67 of rank 4 is no power of two."""
    flat = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in FLUX.items()}
    tensors = make(flat, "lora_down.weight", "lora_up.weight", alpha=10.67)
    compare(converted(tensors, tmp_path), theirs(peer._convert_kohya_flux_lora_to_diffusers(dict(tensors))))


def test_kohya_flux_of_equal_blocks_is_taken_apart(tmp_path: Path) -> None:
    """B of a fused qkv that is block-diagonal: kohya's rule, which diffusers has too, gives each part its own rank."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    up = torch.zeros(3 * H, 6)
    for part in range(3):
        up[part * H : (part + 1) * H, 2 * part : 2 * part + 2] = torch.randn(H, 2)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(6, H),
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(6.0),
    }
    ours = converted(tensors, tmp_path)
    assert {target.rank for target in ours.values()} == {2}
    compare(ours, theirs(peer._convert_kohya_flux_lora_to_diffusers(dict(tensors))))


def test_kohya_stable_diffusion(tmp_path: Path) -> None:
    flat = {f"lora_{name}": shape for name, shape in SD1.items()}
    tensors = make(flat, "lora_down.weight", "lora_up.weight", alpha=3.0)
    compare(
        converted(tensors, tmp_path), theirs(*_rename(*peer._convert_non_diffusers_lora_to_diffusers(dict(tensors))))
    )


def _rename(state: Mapping[str, Any], alphas: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, float]]:
    """Put diffusers' old names into its new ones, with its own functions."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    def move(keys: Mapping[str, Any]) -> dict[str, Any]:
        unet = {key: each for key, each in keys.items() if key.startswith("unet.")}
        texts = {key: each for key, each in keys.items() if key not in unet}
        return convert_unet_state_dict_to_peft(unet) | (convert_state_dict_to_peft(texts) if texts else {})

    renamed = move({key.removesuffix(".alpha"): alpha for key, alpha in alphas.items() if ".down.weight" in key})
    renamed |= {key.removesuffix(".alpha"): alpha for key, alpha in alphas.items() if ".down.weight" not in key}
    return move(state), {f"{key.removesuffix('.lora_A.weight')}.alpha": alpha for key, alpha in renamed.items()}


def test_kohya_sdxl(tmp_path: Path) -> None:
    class Config:
        layers_per_block = 2

    flat = {f"lora_{name}": shape for name, shape in SDXL.items()}
    tensors = make(flat, "lora_down.weight", "lora_up.weight", alpha=3.0)
    mapped = peer._maybe_map_sgm_blocks_to_diffusers(dict(tensors), Config())
    compare(converted(tensors, tmp_path), theirs(*_rename(*peer._convert_non_diffusers_lora_to_diffusers(mapped))))


def test_xlabs(tmp_path: Path) -> None:
    modules = {
        "double_blocks.0.processor.qkv_lora1": (3 * H, H),
        "double_blocks.0.processor.proj_lora2": (H, H),
        "single_blocks.1.processor.qkv_lora": (3 * H, H),
        "single_blocks.1.processor.proj_lora": (H, 5 * H),
    }
    tensors = make(modules, "down.weight", "up.weight")
    ours = converted(tensors, tmp_path, scale=1.0)
    peers = theirs(peer._convert_xlabs_flux_lora_to_diffusers(dict(tensors)))
    silent = {name for name, target in ours.items() if not change(target).any()}
    assert silent == {"transformer.single_transformer_blocks.1.proj_mlp"}, "the part of linear1 that XLabs leaves alone"
    compare({name: target for name, target in ours.items() if name not in silent}, peers)


def test_bfl_control(tmp_path: Path) -> None:
    """The last layer's modulation is (shift, scale) of BFL and (scale, shift) of diffusers: rows of B alone."""
    tensors = make(WHOLE_FLUX | ENDS_OF_FLUX, "lora_A.weight", "lora_B.weight", rank=2)
    for index, name in enumerate(NORMS):
        tensors[f"{name}.scale"] = torch.full((128,), float(index))
    ours = converted(tensors, tmp_path)
    state = peer._convert_bfl_flux_control_lora_to_diffusers(dict(tensors))
    norms = {name: ours.pop(name) for name in list(ours) if ours[name].kind == "replace"}
    peers = theirs(state)
    last = "final_layer.adaLN_modulation.1"
    down, up = (tensors[f"{last}.{role}.weight"].double().numpy() for role in ("lora_A", "lora_B"))
    swapped = np.concatenate([up[H:], up[:H]])
    mine, wrong = change(ours.pop("transformer.norm_out.linear")), peers.pop("transformer.norm_out.linear")
    np.testing.assert_allclose(mine, _multiply(swapped, down), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        wrong, _multiply(swapped, down[::-1]), rtol=1e-6, err_msg=PEER_BUGS["norm_out"], atol=1e-6
    )
    compare(ours, peers)
    assert len(norms) == len(NORMS)
    for name, target in norms.items():
        np.testing.assert_array_equal(target.factors["weight"].read(), state[f"{name}.weight"].numpy())


def test_fal(tmp_path: Path) -> None:
    modules = WHOLE_FLUX | {"final_layer.linear": (64, H)}
    tensors = make(modules, "lora_A.weight", "lora_B.weight", prefix="base_model.model.", rank=1)
    compare(converted(tensors, tmp_path), theirs(peer._convert_fal_kontext_lora_to_diffusers(dict(tensors))))


def test_wan_of_comfy(tmp_path: Path) -> None:
    tensors = make(WAN, "lora_down.weight", "lora_up.weight", prefix="diffusion_model.")
    compare(converted(tensors, tmp_path), theirs(peer._convert_non_diffusers_wan_lora_to_diffusers(dict(tensors))))


def test_wan_of_musubi(tmp_path: Path) -> None:
    flat = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in WAN.items()}
    tensors = make(flat, "lora_down.weight", "lora_up.weight", alpha=3.0)
    compare(converted(tensors, tmp_path), theirs(peer._convert_musubi_wan_lora_to_diffusers(dict(tensors))))


def test_a_known_bug_of_the_peer_is_still_there(tmp_path: Path) -> None:
    """Where diffusers loses the alpha of kohya's final layer, we keep it; the ratio of both is alpha / rank."""
    name = "lora_unet_final_layer_linear"
    tensors = make({name: (64, H)}, "lora_down.weight", "lora_up.weight", alpha=2.0)
    tensors |= make(
        {"lora_unet_double_blocks_0_img_attn_proj": (H, H)}, "lora_down.weight", "lora_up.weight", alpha=2.0
    )
    ours = change(converted(tensors, tmp_path)["transformer.proj_out"])
    state = peer._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    peers = {key.removeprefix("transformer."): each for key, each in theirs(state).items()}["proj_out"]
    np.testing.assert_allclose(ours, 0.5 * peers, rtol=1e-5, atol=1e-6, err_msg=PEER_BUGS["final_layer"])


def _tiny_unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    )


def test_a_model_loads_the_file_with_its_scales(tmp_path: Path) -> None:
    """`load_lora_adapter` takes ranks and alphas from the annotation; each layer then acts as the source says."""
    modules = {
        "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (32, 32),
        "down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k": (32, 24),
        "mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": (512, 64),
    }
    tensors = {}
    for index, (name, shape) in enumerate(modules.items()):
        one = {f"lora_unet_{name}": shape}
        tensors |= make(one, "lora_down.weight", "lora_up.weight", alpha=3.0 + index, rank=2 + index)
    ours = converted(tensors, tmp_path)
    unet = _tiny_unet()
    state, metadata = diffusers.loaders.StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(tmp_path), weight_name="out.safetensors", return_lora_metadata=True
    )[0::2]
    unet.load_lora_adapter(state, prefix="unet", metadata=metadata, network_alphas=None)
    layers = dict(unet.named_modules())
    for name, target in ours.items():
        layer = layers[name.removeprefix("unet.")]
        (adapter,) = layer.scaling
        found = layer.get_delta_weight(adapter).detach().double().numpy()
        some = found[_some(found.shape[0])][:, _some(found.shape[1])]
        np.testing.assert_allclose(some, change(target), rtol=1e-5, atol=1e-5)


def test_what_a_model_saves_is_read(tmp_path: Path) -> None:
    """`save_lora_adapter` writes no component, and an annotation without one."""
    from peft import LoraConfig

    unet = _tiny_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_k"], init_lora_weights=False))
    unet.save_lora_adapter(str(tmp_path), weight_name="saved.safetensors")
    adapter = load_adapter(tmp_path / "saved.safetensors")
    assert (adapter.scheme, {target.scale for target in adapter.targets}) == ("diffusers", {2.5})
    layers = dict(unet.named_modules())
    for target in adapter.targets:
        layer = layers[target.name.removeprefix("unet.")]
        (name,) = layer.scaling
        np.testing.assert_allclose(layer.get_delta_weight(name).detach().numpy(), change(target), rtol=1e-5, atol=1e-6)


MODELS: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "sd1-unet": ("diffusers", lambda: diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)),
    "sdxl-unet": (
        "diffusers",
        lambda: diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
    ),
    "flux1-transformer": (
        "diffusers",
        lambda: diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True),
    ),
    "sd3-transformer": ("diffusers", lambda: diffusers.SD3Transformer2DModel(num_layers=3, dual_attention_layers=(0,))),
    "wan-transformer": (
        "diffusers",
        lambda: diffusers.WanTransformer3DModel(num_layers=2, image_dim=1280, added_kv_proj_dim=5120),
    ),
    "qwen-image-transformer": ("diffusers", lambda: diffusers.QwenImageTransformer2DModel(num_layers=2)),
    "hunyuan-image-transformer": (
        "diffusers",
        lambda: diffusers.HunyuanImageTransformer2DModel(
            num_layers=2, num_single_layers=2, text_embed_2_dim=1472, guidance_embeds=True, use_meanflow=True
        ),
    ),
    "hunyuan-video-1-5-transformer": (
        "diffusers",
        lambda: diffusers.HunyuanVideo15Transformer3DModel(num_layers=2, use_meanflow=True),
    ),
    "pixart-transformer": (
        "diffusers",
        lambda: diffusers.PixArtTransformer2DModel(num_layers=2, sample_size=128, caption_channels=4096),
    ),
    "flux2-transformer": ("diffusers", lambda: diffusers.Flux2Transformer2DModel(num_layers=2, num_single_layers=2)),
    "hunyuan-video-transformer": (
        "diffusers",
        lambda: diffusers.HunyuanVideoTransformer3DModel(num_layers=2, num_single_layers=2),
    ),
    "ltx2-transformer": ("diffusers", lambda: diffusers.LTX2VideoTransformer3DModel(num_layers=2)),
    "mochi-transformer": ("diffusers", diffusers.MochiTransformer3DModel),
    "anima-text-conditioner": ("native", lambda: diffusers.AnimaTextConditioner()),
    **{
        f"{name}-transformer": ("diffusers", getattr(diffusers, model))
        for name, model in {
            "ace-step": "AceStepTransformer1DModel",
            "auraflow": "AuraFlowTransformer2DModel",
            "cogvideox": "CogVideoXTransformer3DModel",
            "cogview4": "CogView4Transformer2DModel",
            "cosmos": "CosmosTransformer3DModel",
            "ernie-image": "ErnieImageTransformer2DModel",
            "flux3": "Flux3Transformer2DModel",
            "ideogram4": "Ideogram4Transformer2DModel",
            "kandinsky5": "Kandinsky5Transformer3DModel",
            "krea2": "Krea2Transformer2DModel",
            "ltx": "LTXVideoTransformer3DModel",
            "lumina2": "Lumina2Transformer2DModel",
            "minimax-h3": "MiniMaxH3Transformer3DModel",
            "sana": "SanaTransformer2DModel",
            "z-image": "ZImageTransformer2DModel",
        }.items()
    },
    "chroma": ("diffusers", lambda: diffusers.ChromaTransformer2DModel(num_layers=2, num_single_layers=2)),
    "vace": ("diffusers", lambda: diffusers.WanVACETransformer3DModel(num_layers=2, vace_layers=[0, 1])),
    "hidream-transformer": (
        "diffusers",
        lambda: diffusers.HiDreamImageTransformer2DModel(
            patch_size=2, num_layers=1, num_single_layers=1, caption_channels=[64, 48], llama_layers=[0, 1]
        ),
    ),
}
SHARED = {"chroma": "flux1-transformer", "vace": "wan-transformer"}
"""Models that have the table of another."""


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
@pytest.mark.parametrize("name", MODELS)
def test_a_table_has_every_module_of_the_real_model(name: str) -> None:
    spelling, build = MODELS[name]
    with torch.device("meta"):
        model = build()
    table = TABLES[SHARED.get(name, name)]
    weighty = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d)
    ]
    missing = [path for path in weighty if len(table.find(path, spelling)) != 1]
    assert not missing
    flat = [path for path in weighty if len(table.find(path.replace(".", "_"), spelling, flat=True)) != 1]
    assert not flat


def test_text_encoders_are_in_their_tables() -> None:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        Gemma2Config,
        Gemma2Model,
        Qwen3Config,
        Qwen3Model,
        T5Config,
        T5EncoderModel,
    )

    with torch.device("meta"):
        clip = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=2))
        t5 = T5EncoderModel(T5Config(num_layers=2, feed_forward_proj="gated-gelu"))
        qwen, gemma = Qwen3Model(Qwen3Config(num_hidden_layers=2)), Gemma2Model(Gemma2Config(num_hidden_layers=2))
    decoders = (("decoder-text-encoder", qwen), ("decoder-text-encoder", gemma))
    for name, model in (("clip-text-encoder", clip), ("t5-encoder", t5), *decoders):
        table = TABLES[name]
        linear = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        assert linear
        assert not [path for path in linear if not table.find(path, "transformers")]


def test_a_folder_of_diffusers_as_the_base(tmp_path: Path) -> None:
    """Names that two models have are told apart by the base's own class."""
    (tmp_path / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}', encoding="utf-8")
    assert read_base_facts(tmp_path / "config.json").architecture == "SD3Transformer2DModel"
    tensors = make(
        {"transformer_blocks.0.attn.to_q": (64, 48)}, "lora_A.weight", "lora_B.weight", prefix="transformer."
    )
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.convert(tmp_path / "in.safetensors", "dotted", tmp_path / "out.safetensors")
    assert caught.value.codes == ("LF316",)
    loraformat.convert(
        tmp_path / "in.safetensors", "dotted", tmp_path / "out.safetensors", base=tmp_path / "config.json", verify=True
    )
    assert set(load_file(tmp_path / "out.safetensors")) == {
        f"diffusion_model.joint_blocks.0.x_block.attn.qkv.{role}" for role in ("lora_A.weight", "lora_B.weight")
    }
    assert load_adapter(tmp_path / "out.safetensors", stated=StatedScale()).targets[0].rank == 4
