"""Pipelines of diffusers load what conversion writes, in its own form and in kohya's, and we read what they save.

The models are small and real, their other components left out; each adapted layer must change its weight as the layer
of the pipeline that saved the file does.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import loraformat

torch = pytest.importorskip("torch", reason="needs torch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("peft", reason="needs peft")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore::FutureWarning")]

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Case:
    """One pipeline.

    Attributes:
        pipeline: its class.
        component: the model that is adapted.
        build: makes the model.
        modules: ends of the names of adapted modules.
        kohya: whether diffusers reads kohya's form of it, in any size; FLUX it reads in its own width alone.
        others: components that it must have.
    """

    pipeline: str
    component: str
    build: Callable[[], Any]
    modules: list[str]
    kohya: bool
    others: Mapping[str, Any]


def _unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=4, **more
    )


def _sd1() -> Any:
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return _unet(down_block_types=down, up_block_types=up, cross_attention_dim=24)


def _sdxl() -> Any:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    text = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    sizes = {"cross_attention_dim": 24, "transformer_layers_per_block": (1, 2), "use_linear_projection": True}
    return _unet(down_block_types=down, up_block_types=up, **sizes, **text)


def _flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    )


def _sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
    )


def _wan() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=20,
        ffn_dim=40,
        num_layers=2,
    )


def _qwen() -> Any:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        axes_dims_rope=(8, 4, 4),
    )


def _parts(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


ENCODERS = ("vae", "text_encoder", "tokenizer")
TWO = (*ENCODERS, "text_encoder_2", "tokenizer_2")
CASES = {
    "Stable Diffusion 1.5": Case(
        "StableDiffusionPipeline",
        "unet",
        _sd1,
        [*ATTENTION, "ff.net.2", "proj_in", "conv1"],
        True,
        _parts(*ENCODERS, "safety_checker", "feature_extractor"),
    ),
    "Stable Diffusion XL": Case(
        "StableDiffusionXLPipeline", "unet", _sdxl, [*ATTENTION, "ff.net.0.proj", "proj_in"], False, _parts(*TWO)
    ),
    "FLUX.1": Case(
        "FluxPipeline", "transformer", _flux, [*ATTENTION, "add_q_proj", "proj_mlp", "proj_out"], False, _parts(*TWO)
    ),
    "Stable Diffusion 3": Case(
        "StableDiffusion3Pipeline",
        "transformer",
        _sd3,
        [*ATTENTION, "add_k_proj", "ff.net.2"],
        False,
        _parts(*TWO, "text_encoder_3", "tokenizer_3"),
    ),
    "Wan": Case(
        "WanPipeline", "transformer", _wan, [*ATTENTION, "ffn.net.0.proj", "ffn.net.2"], True, _parts(*ENCODERS)
    ),
    "Qwen-Image": Case(
        "QwenImagePipeline", "transformer", _qwen, [*ATTENTION, "add_v_proj", "img_mlp.net.2"], True, _parts(*ENCODERS)
    ),
}


def assemble(case: Case) -> Any:
    """Return the pipeline around a fresh model."""
    torch.manual_seed(2)
    scheduler = diffusers.DDIMScheduler() if case.component == "unet" else diffusers.FlowMatchEulerDiscreteScheduler()
    options = {"requires_safety_checker": False} if case.pipeline == "StableDiffusionPipeline" else {}
    model = {case.component: case.build()}
    return getattr(diffusers, case.pipeline)(scheduler=scheduler, **model, **case.others, **options)


def adapt(case: Case, folder: Path) -> dict[str, Any]:
    """Give a model an adapter of random numbers, save it as the pipeline does, and return the change of each layer."""
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = assemble(case)
    model = getattr(pipeline, case.component)
    ranks = {"to_out.0": 3}
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=case.modules, rank_pattern=ranks, init_lora_weights=False, use_rslora=False
    )
    model.add_adapter(config)
    layers = {f"{case.component}_lora_layers": get_peft_model_state_dict(model)}
    metadata = {f"{case.component}_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    type(pipeline).save_lora_weights(str(folder), **layers, **metadata)
    return changes(model)


def changes(model: Any) -> dict[str, Any]:
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            (adapter,) = layer.scaling
            found[name] = layer.get_delta_weight(adapter).detach()
    return found


def load(case: Case, path: Path) -> dict[str, Any]:
    """Return the change of each layer after the pipeline has loaded a file."""
    pipeline = assemble(case)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return changes(getattr(pipeline, case.component))


def compare(found: Mapping[str, Any], expected: Mapping[str, Any], **near: float) -> None:
    assert set(found) == set(expected)
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, **near)


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_loads_what_we_write_and_we_read_what_it_saves(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    trained = adapt(case, tmp_path / "saved")
    saved = tmp_path / "saved" / "pytorch_lora_weights.safetensors"
    assert trained
    assert min(float(change.abs().max()) for change in trained.values()) > 0.001
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"_class_name": type(case.build()).__name__}), encoding="utf-8")
    for scheme in ("kohya", "dotted", "peft"):
        output, back = tmp_path / scheme, tmp_path / f"{scheme}.safetensors"
        done = loraformat.convert(saved, scheme, output, base=config, verify=True)
        assert done.proof is not None
        assert (done.proof.relative, done.account.refused) == (0.0, ())
        loraformat.convert(output, "diffusers", back, base=config, verify=True)
        compare(load(case, back), trained, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kohya])
def test_a_pipeline_loads_kohyas_form_as_we_write_it(name: str, tmp_path: Path) -> None:
    """Its own converter folds the scale into the factors, so that the last digits differ."""
    case = CASES[name]
    trained = adapt(case, tmp_path / "saved")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"_class_name": type(case.build()).__name__}), encoding="utf-8")
    saved = tmp_path / "saved" / "pytorch_lora_weights.safetensors"
    loraformat.convert(saved, "kohya", tmp_path / "kohya.safetensors", base=config)
    compare(load(case, tmp_path / "kohya.safetensors"), trained, rtol=1e-5, atol=1e-6)
