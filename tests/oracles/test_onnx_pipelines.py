"""A pipeline of diffusers as Optimum exports it: one adapter of UNet and text encoder, merged into their graphs.

Needs optimum-onnx and diffusers: see `test_optimum.py`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "diffusers", "onnxruntime", "optimum.exporters.onnx"):
    pytest.importorskip(_package, reason=f"these tests need {_package}")

BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4}


def make_pipeline(folder: Path) -> Any:
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    letters = [chr(97 + index) for index in range(26)]
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in letters), *letters]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"vocab_size": len(words), "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    text = transformers.CLIPTextConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            **BLOCKS, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
        ),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=transformers.CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
        ),
        unet=diffusers.UNet2DConditionModel(
            **BLOCKS,
            sample_size=8,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
        ).eval(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def adapt(pipeline: Any) -> dict[str, dict[str, Any]]:
    """Put an adapter beside UNet and text encoder; return its tensors by component."""
    import torch
    from peft import LoraConfig, get_peft_model_state_dict

    found = {}
    for component, modules in (("unet", ["to_q", "to_v", "conv1"]), ("text_encoder", ["q_proj", "fc1"])):
        model = getattr(pipeline, component)
        model.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=modules))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        found[component] = get_peft_model_state_dict(model)
    return found


def write_kohya(path: Path, found: dict[str, dict[str, Any]]) -> Path:
    """Write the adapter as kohya's trainer does, each module's path flattened."""
    from safetensors.torch import save_file

    prefixes, ends = {"unet": "lora_unet", "text_encoder": "lora_te"}, {"lora_A": "lora_down", "lora_B": "lora_up"}
    flat = {}
    for component, tensors in found.items():
        for name, tensor in tensors.items():
            module, role = name.removesuffix(".weight").rsplit(".", 1)
            flat[f"{prefixes[component]}_{module.replace('.', '_')}.{ends[role]}.weight"] = tensor.contiguous()
    save_file(flat, path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, dict[str, Any]]]:
    from optimum.exporters.onnx import main_export
    from zoo import quiet

    root = tmp_path_factory.mktemp("pipeline")
    pipeline = make_pipeline(root)
    with quiet():
        pipeline.save_pretrained(root / "torch")
        main_export(
            str(root / "torch"), root / "onnx", task="text-to-image", library_name="diffusers", do_validation=False
        )
    return root / "onnx", pipeline, adapt(pipeline)


@pytest.mark.parametrize("scheme", ["diffusers", "kohya"])
def test_each_part_of_an_adapter_goes_into_its_graph(
    exported: tuple[Path, Any, dict[str, dict[str, Any]]], tmp_path: Path, scheme: str
) -> None:
    import torch
    from zoo import run_onnx

    import loraformat

    base, pipeline, tensors = exported
    if scheme == "kohya":
        adapter, stated = write_kohya(tmp_path / "style.safetensors", tensors), {"alpha": 3.0}
    else:
        pipeline.save_lora_weights(
            tmp_path, unet_lora_layers=tensors["unet"], text_encoder_lora_layers=tensors["text_encoder"]
        )
        adapter, stated = tmp_path / "pytorch_lora_weights.safetensors", {"alpha": 3.0}
    receipt = loraformat.merge(base, [adapter], tmp_path / "out", **stated)
    assert {weight.name.partition("/")[0] for weight in receipt.weights} == {"unet", "text_encoder"}
    assert receipt.adapters[0].targets == sum(len(found) for found in tensors.values()) // 2

    rng = np.random.default_rng(0)
    ids = rng.integers(2, 50, (2, 16))
    states = rng.standard_normal((2, 16, 12)).astype(np.float32)
    sample = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    with torch.no_grad():
        wanted = {
            "text_encoder": pipeline.text_encoder(torch.from_numpy(ids))[0].numpy(),
            "unet": pipeline.unet(torch.from_numpy(sample), 7, torch.from_numpy(states))[0].numpy(),
        }
    feeds = {
        "text_encoder": {"input_ids": ids},
        "unet": {"sample": sample, "timestep": np.array(7, np.float32), "encoder_hidden_states": states},
    }
    for part, inputs in feeds.items():
        before, after = (
            next(iter(run_onnx(root / part / "model.onnx", inputs).values())) for root in (base, tmp_path / "out")
        )
        assert np.abs(after - wanted[part]).max() <= 1e-4 < np.abs(before - wanted[part]).max() / 100
    names = sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file())
    changed = [name for name in names if (base / name).read_bytes() != (tmp_path / "out" / name).read_bytes()]
    assert changed == ["text_encoder/model.onnx", "unet/model.onnx"]
