"""Decoders that onnxruntime-genai's builder knows; its attention wants heads of a multiple of 16."""

from typing import Any, Final

import torch
import transformers
import zoo
from peft import LoraConfig
from torch import nn
from zoo import TEXT_AXES, Specimen, _randomised, _tokens
from zoo_wide import EXPERTS

_SIZES: Final = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "attn_implementation": "eager",
}
_LINEAR: Final = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_FUSED: Final = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
_GPT_OSS: Final = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32}
_LFM2: Final = {
    "hidden_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "num_dense_layers": 1,
    "layer_types": ["full_attention", "conv"],
}


def _make(model_type: str, **fields: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model(model_type, **(_SIZES | fields))
    return _randomised(lambda: transformers.AutoModelForCausalLM.from_config(config))


def _specimen(name: str, model_type: str, lora: dict[str, Any], **fields: Any) -> Specimen:
    return Specimen(
        f"built_{name}",
        lambda: _make(model_type, **fields),
        lambda: _tokens(_SIZES["vocab_size"]),
        lambda: LoraConfig(r=3, lora_alpha=6, **lora),
        TEXT_AXES,
    )


WHISPER: Final = "built_whisper"
_MELS, _FRAMES = 80, 3000
"""The builder's encoder takes 30 seconds."""


def make_whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=99,
        num_mel_bins=_MELS,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=52,
        decoder_ffn_dim=44,
        max_source_positions=_FRAMES // 2,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
        attn_implementation="eager",
    )
    return _randomised(lambda: transformers.WhisperForConditionalGeneration(config))


def _speech() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(17)
    tokens = torch.randint(3, 99, (1, 5), generator=generator)
    return {"input_features": torch.randn(1, _MELS, _FRAMES, generator=generator), "decoder_input_ids": tokens}


zoo.SPECIMENS[WHISPER] = Specimen(
    WHISPER,
    make_whisper,
    _speech,
    lambda: LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    {},
)

BUILT: Final = {
    specimen.name: specimen
    for specimen in (
        _specimen("llama", "llama", {"target_modules": _LINEAR}),
        _specimen("qwen2_tied", "qwen2", {"target_modules": _LINEAR}, tie_word_embeddings=True),
        _specimen("phi3", "phi3", {"target_modules": _FUSED}, hidden_size=64, original_max_position_embeddings=64),
        _specimen("qwen3", "qwen3", {"target_modules": _LINEAR}),
        _specimen(
            "phi",
            "phi",
            {"target_modules": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]},
            hidden_size=64,
            num_key_value_heads=4,
            partial_rotary_factor=1.0,
        ),
        _specimen(
            "gpt_oss",
            "gpt_oss",
            {"target_modules": _LINEAR[:4], "target_parameters": EXPERTS},
            layer_types=["full_attention", "full_attention"],
            **_GPT_OSS,
        ),
        _specimen(
            "lfm2_moe",
            "lfm2_moe",
            {
                "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "w1", "w2", "w3"],
                "target_parameters": [name.replace("mlp", "feed_forward") for name in EXPERTS],
            },
            **_LFM2,
        ),
    )
}
zoo.SPECIMENS.update(BUILT)

WIDE: Final = "built_wide_llama"
"""Rows of an even number of blocks, as k-quant wants them, and adapters of all that the builder quantises."""
zoo.SPECIMENS[WIDE] = _specimen(
    "wide_llama",
    "llama",
    {"target_modules": [*_LINEAR, "embed_tokens", "lm_head"]},
    hidden_size=64,
    intermediate_size=128,
)
