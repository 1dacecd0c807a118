"""Small decoders of transformers with adapters of PEFT, all factors random: what other libraries must agree with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "use_cache": False,
}
"""Heads of 10, so that queries have 40 rows, keys 20, and no matrix is square."""

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(model_type: str, seed: int = 0, **fields: Any) -> Any:
    """Return a model of this type, its weights random; a field of None is left out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    given = {name: value for name, value in (SIZES | fields).items() if value is not None}
    config = AutoConfig.for_model(model_type, **given)
    return AutoModelForCausalLM.from_config(config).float().eval()


def make_adapter(model: Any, folder: Path, *, seed: int = 1, **lora: Any) -> Any:
    """Give `model` an adapter with random factors, save it into `folder`, and return the adapted model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    fields = {"r": 3, "lora_alpha": 12, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | lora
    adapted = get_peft_model(model, LoraConfig(**fields)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
        elif "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted


def save_config(model: Any, folder: Path) -> Path:
    """Write the model's `config.json` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    fields = model.config.to_dict() | {"architectures": [type(model).__name__]}
    path.write_text(json.dumps(fields, default=str), encoding="utf-8")
    return path


def logits(model: Any, tokens: list[int]) -> Any:
    """Return the model's logits for one text, float64."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().numpy()


TOKENS = [3, 14, 15, 9, 26, 5, 35, 8]
Maker = Callable[..., Any]
