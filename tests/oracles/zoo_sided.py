"""More encoder-decoders: gated blocks, norms behind, another number of layers on each side."""

import transformers
import zoo
from peft import LoraConfig
from torch import nn
from zoo import Specimen, _randomised
from zoo_wide import _two_sided, make_t5

_AXES = {"input_ids": {0: "batch", 1: "length"}, "decoder_input_ids": {0: "batch", 1: "steps"}}


def make_t5_gated() -> nn.Module:
    """The later T5: two layers before the last one of a block, of which one goes through the activation."""
    return make_t5(num_decoder_layers=3, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def make_bart() -> nn.Module:
    """Norms stand behind attention and blocks, and the decoder reads what the last one of the encoder puts out."""
    config = transformers.BartConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=52,
        decoder_ffn_dim=44,
        max_position_embeddings=40,
        use_cache=False,
        attn_implementation="eager",
        decoder_start_token_id=0,
    )
    return _randomised(lambda: transformers.BartForConditionalGeneration(config))


zoo.SPECIMENS.update(
    (specimen.name, specimen)
    for specimen in (
        Specimen(
            "t5_gated",
            make_t5_gated,
            _two_sided,
            lambda: LoraConfig(r=3, lora_alpha=6, target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wo"]),
            _AXES,
        ),
        Specimen(
            "bart",
            make_bart,
            _two_sided,
            lambda: LoraConfig(
                r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
            ),
            _AXES,
        ),
    )
)
