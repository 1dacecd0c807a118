"""More families of models, for the table of export paths."""

from typing import Any

import torch
import transformers
import zoo
from peft import LoraConfig
from torch import nn
from zoo import DECODER, ENCODER, TEXT_AXES, Specimen, _randomised, _tokens


def make_qwen2() -> nn.Module:
    config = transformers.Qwen2Config(**DECODER, tie_word_embeddings=True)
    return _randomised(lambda: transformers.Qwen2ForCausalLM(config))


def make_distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=103,
        dim=32,
        hidden_dim=52,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        num_labels=5,
        attn_implementation="eager",
    )
    return _randomised(lambda: transformers.DistilBertForSequenceClassification(config))


def make_qwen3() -> nn.Module:
    """Norms of queries and keys."""
    config = transformers.Qwen3Config(**DECODER, head_dim=10)
    return _randomised(lambda: transformers.Qwen3ForCausalLM(config))


def make_phi3() -> nn.Module:
    """Modules that hold q, k and v, and gate and up."""
    config = transformers.Phi3Config(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        pad_token_id=0,
        use_cache=False,
        attn_implementation="eager",
    )
    return _randomised(lambda: transformers.Phi3ForCausalLM(config))


def make_roberta() -> nn.Module:
    config = transformers.RobertaConfig(**ENCODER, pad_token_id=1)
    return _randomised(lambda: transformers.RobertaForSequenceClassification(config))


def make_t5(**more: Any) -> nn.Module:
    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 6, "d_ff": 52, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, use_cache=False, decoder_start_token_id=0, **more)
    return _randomised(lambda: transformers.T5ForConditionalGeneration(config))


def make_whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=99,
        num_mel_bins=12,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=52,
        decoder_ffn_dim=44,
        max_source_positions=10,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
        attn_implementation="eager",
    )
    return _randomised(lambda: transformers.WhisperForConditionalGeneration(config))


def make_unet() -> nn.Module:
    """Stable Diffusion's: convolutions, linear layers of time, attention to a text."""
    from diffusers import UNet2DConditionModel

    return _randomised(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 24),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=20,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )


def _latents() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(16)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 20, generator=generator),
    }


SMALL_MIXTURE = DECODER | {"head_dim": 10, "num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make_mixtral() -> nn.Module:
    """Experts `(experts, out, in)`, gate before up."""
    return _randomised(lambda: transformers.MixtralForCausalLM(_batched(transformers.MixtralConfig(**SMALL_MIXTURE))))


def make_gpt_oss() -> nn.Module:
    """Experts `(experts, in, out)`, gate and up in turns, biases."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "pad_token_id": 0}
    config = transformers.GptOssConfig(**(SMALL_MIXTURE | layers))
    return _randomised(lambda: transformers.GptOssForCausalLM(_batched(config)))


def _batched(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """Choose the only way of computing experts that both exporters follow for all inputs."""
    config._experts_implementation = "batched_mm"
    return config


def _two_sided() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(14)
    decoder = torch.randint(3, 99, (2, 5), generator=generator)
    return {"input_ids": _tokens(99)["input_ids"], "decoder_input_ids": decoder}


def _speech() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(15)
    decoder = torch.randint(3, 99, (2, 5), generator=generator)
    features = torch.randn(2, 12, 20, generator=generator)
    # Without a mask the model looks for several texts in one, which the older exporter cannot write down.
    return {
        "input_features": features,
        "decoder_input_ids": decoder,
        "decoder_attention_mask": torch.ones_like(decoder),
    }


zoo.SPECIMENS.update(
    (specimen.name, specimen)
    for specimen in (
        Specimen(
            "qwen2_tied",
            make_qwen2,
            lambda: _tokens(97),
            lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR),
            TEXT_AXES,
        ),
        Specimen(
            "unet",
            make_unet,
            _latents,
            lambda: LoraConfig(
                r=3,
                lora_alpha=6,
                target_modules=r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2|conv\d?|conv_shortcut|"
                r"conv_in|conv_out|linear_\d|time_emb_proj)",
            ),
            {"sample": {0: "batch"}, "timestep": {0: "batch"}, "encoder_hidden_states": {0: "batch"}},
            outputs=("out_sample",),
            learning_rate=5e-2,
        ),
        Specimen(
            "qwen3",
            make_qwen3,
            lambda: _tokens(97),
            lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR),
            TEXT_AXES,
        ),
        Specimen(
            "phi3",
            make_phi3,
            lambda: _tokens(97),
            lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
            TEXT_AXES,
        ),
        Specimen(
            "roberta",
            make_roberta,
            lambda: _tokens(103),
            lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["query", "key", "value", "dense"]),
            TEXT_AXES,
            learning_rate=5e-2,
        ),
        Specimen(
            "mixtral",
            make_mixtral,
            lambda: _tokens(97),
            lambda: LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"], target_parameters=EXPERTS),
            TEXT_AXES,
        ),
        Specimen(
            "gpt_oss",
            make_gpt_oss,
            lambda: _tokens(97),
            lambda: LoraConfig(r=3, lora_alpha=6, target_modules=["k_proj", "v_proj"], target_parameters=EXPERTS),
            TEXT_AXES,
        ),
        Specimen(
            "distilbert",
            make_distilbert,
            lambda: _tokens(103),
            lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["q_lin", "k_lin", "v_lin", "lin1", "lin2"]),
            TEXT_AXES,
            learning_rate=5e-2,
        ),
        Specimen(
            "t5",
            make_t5,
            _two_sided,
            lambda: LoraConfig(r=3, lora_alpha=6, target_modules=["q", "k", "v", "o", "wi", "wo"]),
            {"input_ids": {0: "batch", 1: "length"}, "decoder_input_ids": {0: "batch", 1: "steps"}},
        ),
        Specimen(
            "whisper",
            make_whisper,
            _speech,
            lambda: LoraConfig(
                r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
            ),
            {
                "input_features": {0: "batch"},
                "decoder_input_ids": {0: "batch", 1: "steps"},
                "decoder_attention_mask": {0: "batch", 1: "steps"},
            },
        ),
    )
)
