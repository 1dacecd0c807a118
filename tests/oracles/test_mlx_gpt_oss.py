"""gpt-oss in mlx-lm: its layers with the adapter that we convert are those of the model that we merge PEFT's into."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat
from builders import write_tensors

mx = pytest.importorskip("mlx.core", reason="needs mlx and mlx-lm")
tuner = pytest.importorskip("mlx_lm.tuner.utils", reason="needs mlx-lm")
pytestmark = pytest.mark.oracle

EXPERTS, RANK, HIDDEN, MLP = 4, 2, 64, 96
NAME = "model.layers.0.mlp.experts"
SIZES: dict[str, Any] = {
    **{"model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    **{"vocab_size": 40, "hidden_size": HIDDEN, "intermediate_size": MLP, "head_dim": 16},
    **{
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def test_stacks_of_experts(tmp_path: Path) -> None:
    from mlx_lm.models import gpt_oss

    dice = np.random.default_rng(0)
    base = {
        f"{NAME}.gate_up_proj": dice.standard_normal((EXPERTS, HIDDEN, 2 * MLP)).astype(np.float32),
        f"{NAME}.down_proj": dice.standard_normal((EXPERTS, MLP, HIDDEN)).astype(np.float32),
    }
    inner, outer = f"base_model.model.{NAME}.base_layer", f"base_model.model.{NAME}"
    shapes = {
        f"{inner}.lora_A.weight": (EXPERTS * RANK, HIDDEN),
        f"{inner}.lora_B.weight": (2 * MLP, EXPERTS * RANK),
        f"{outer}.lora_A.weight": (EXPERTS * RANK, MLP),
        f"{outer}.lora_B.weight": (HIDDEN, EXPERTS * RANK),
    }
    factors = {name: dice.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for folder in ("model", "peft"):
        (tmp_path / folder).mkdir()
    write_tensors(tmp_path / "model" / "model.safetensors", base)
    (tmp_path / "model" / "config.json").write_text(json.dumps(SIZES))
    write_tensors(tmp_path / "peft" / "adapter_model.safetensors", factors)
    fields: dict[str, Any] = {"peft_type": "LORA", "peft_version": "0.21.2", "r": RANK, "lora_alpha": 4}
    fields |= {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": []}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(fields))
    loraformat.convert(tmp_path / "peft", "mlx", tmp_path / "mlx", base=tmp_path / "model")
    loraformat.merge(tmp_path / "model", tmp_path / "peft", output=tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")

    model = gpt_oss.Model(gpt_oss.ModelArgs.from_dict(SIZES))
    turned = {name: mx.array(array.transpose(0, 2, 1)) for name, array in base.items()}
    plain = {name if "weight" in name else f"{name}.weight": each for name, each in model.sanitize(turned).items()}
    model.load_weights(list(plain.items()), strict=False)
    model = tuner.load_adapters(model, str(tmp_path / "mlx"))
    experts = model.model.layers[0].mlp.experts
    want = {"down_proj": merged[f"{NAME}.down_proj"]}
    want |= {name: merged[f"{NAME}.gate_up_proj"][..., first::2] for first, name in enumerate(("gate_proj", "up_proj"))}
    for name, array in want.items():
        fused = np.array(getattr(experts, name).fuse().weight)
        assert np.abs(fused - array.transpose(0, 2, 1)).max() < 1e-4, name
