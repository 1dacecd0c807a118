"""More families of models, for the table of export paths."""

import torch
import transformers
import zoo
from peft import LoraConfig
from torch import nn
from zoo import TEXT_AXES, Specimen, _randomised, _tokens


def make_qwen2() -> nn.Module:
    config = transformers.Qwen2Config(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="eager",
    )
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


def make_t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=99,
        d_model=32,
        d_kv=6,
        d_ff=52,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        use_cache=False,
        decoder_start_token_id=0,
    )
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


SMALL_MIXTURE = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
    "attn_implementation": "eager",
}
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
    return {"input_features": torch.randn(2, 12, 20, generator=generator), "decoder_input_ids": decoder}


zoo.SPECIMENS.update(
    (specimen.name, specimen)
    for specimen in (
        Specimen(
            "qwen2_tied",
            make_qwen2,
            lambda: _tokens(97),
            lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]),
            TEXT_AXES,
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
            lambda: LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]),
            {"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "steps"}},
        ),
    )
)
