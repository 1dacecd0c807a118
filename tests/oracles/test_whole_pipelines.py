"""Whole pipelines of diffusers: merging into the folder gives what `load_lora_weights` and `fuse_lora` give."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from models import files_below

torch = pytest.importorskip("torch", reason="needs torch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("peft", reason="needs peft")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

RANK, ALPHA = 3, 5
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "unet": ("to_q", "to_v", "to_out.0", "ff.net.0.proj", "conv1"),
    "transformer": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "proj_out"),
    "text_encoder": ("q_proj", "fc1"),
    "text_encoder_2": ("q_proj", "fc1"),
}


def text_encoder(hidden: int, kind: str = "CLIPTextModel") -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=hidden, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=24, bos_token_id=97, eos_token_id=98, pad_token_id=98,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def unet(**options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=4, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    )  # fmt: skip


def tokenizer(folder: Path) -> Any:
    folder.mkdir()
    (folder / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def sd(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(24), tokenizer=tokenizer(folder), unet=unet(cross_attention_dim=24),
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl(folder: Path) -> Any:
    words = tokenizer(folder)
    denoiser = unet(
        cross_attention_dim=56, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=72,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=text_encoder(24), text_encoder_2=text_encoder(32, "CLIPTextModelWithProjection"),
        tokenizer=words, tokenizer_2=words, unet=denoiser, scheduler=diffusers.DDIMScheduler(),
    )  # fmt: skip


def flux(folder: Path) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4, joint_attention_dim=24, pooled_projection_dim=40, axes_dims_rope=(4, 4, 8),
        num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        vae=vae(), text_encoder=text_encoder(24), tokenizer=tokenizer(folder), transformer=transformer,
        text_encoder_2=None, tokenizer_2=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


PIPELINES: Mapping[str, Callable[[Path], Any]] = {"sd": sd, "sdxl": sdxl, "flux": flux}
ABSENT: Mapping[str, Mapping[str, Any]] = {"flux": {"text_encoder_2": None, "tokenizer_2": None}}


def write_adapter(pipeline: Any, path: Path) -> Path:
    """Write what trainers of diffusers write: random factors for every component, made by PEFT's own names."""
    from peft import LoraConfig, get_peft_model_state_dict

    state, metadata = {}, {}
    for component in list_parts(pipeline):
        model, modules = getattr(pipeline, component), list(COMPONENTS[component])
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, init_lora_weights=False)
        model.add_adapter(config)
        found = get_peft_model_state_dict(model)
        state |= {f"{component}.{key}": value.contiguous() for key, value in found.items()}
        metadata[component] = config
    from diffusers.loaders.lora_base import _pack_dict_with_prefix

    packed = {}
    for component, config in metadata.items():
        fields = config.to_dict()
        fields["target_modules"] = sorted(fields["target_modules"])
        packed |= _pack_dict_with_prefix(fields, component)
    diffusers.StableDiffusionPipeline.write_lora_layers(
        state, str(path.parent), True, path.name, None, True, lora_adapter_metadata=packed
    )
    return path


def list_parts(pipeline: Any) -> list[str]:
    return [component for component in COMPONENTS if getattr(pipeline, component, None) is not None]


def check_same(merged: Any, fused: Any, before: Any) -> None:
    for component in (*list_parts(fused), "vae"):
        found, expected = getattr(merged, component).state_dict(), getattr(fused, component).state_dict()
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            np.testing.assert_allclose(found[name].numpy(), tensor.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
        first = getattr(before, component).state_dict()
        assert any(not torch.equal(first[name], found[name]) for name in found) == (component != "vae")


@pytest.mark.parametrize("name", PIPELINES)
def test_the_folder_is_what_fusing_gives(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    pipeline = PIPELINES[name](tmp_path / "words")
    base = tmp_path / "base"
    pipeline.save_pretrained(base)
    adapter = write_adapter(pipeline, tmp_path / "style.safetensors")

    def read(folder: Path) -> Any:
        return type(pipeline).from_pretrained(folder, **ABSENT.get(name, {}))

    fused = read(base)
    fused.load_lora_weights(str(tmp_path), weight_name=adapter.name)
    fused.fuse_lora(components=list_parts(fused))
    fused.unload_lora_weights()
    loraformat.convert(adapter, "kohya", tmp_path / "kohya.safetensors", base=base)
    for source in (adapter, tmp_path / "kohya.safetensors"):
        output = tmp_path / f"merged-{source.stem}"
        receipt = loraformat.merge(base, [source], output, warn_retained=0.0, min_retained=0.0)
        respelled = any(problem.code == "LF325" for problem in receipt.problems)
        assert respelled == (name == "flux" and source != adapter)
        check_same(read(output), fused, read(base))
        assert loraformat.verify(output, base, [source]).holds
        before, after = files_below(base), files_below(output)
        assert set(after) == {*before, "merge_receipt.json"}
        changed = {file.partition("/")[0] for file in before if before[file] != after[file]}
        assert changed == set(list_parts(fused))
