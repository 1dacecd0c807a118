"""Names that libraries changed: found in both directions, and never one module for another."""

import pytest

from loraformat.renames import generalise, list_names

PAIRS = [
    ("language_model.model.layers.0.q", "model.language_model.layers.0.q"),
    ("language_model.model.embed_tokens", "model.language_model.embed_tokens"),
    ("model.layers.0.q", "model.language_model.layers.0.q"),
    ("lm_head", "language_model.lm_head"),
    ("text_model.encoder.layers.0.q", "encoder.layers.0.q"),
    ("vision_model.post_layernorm", "post_layernorm"),
    ("embed_out", "lm_head"),
    ("model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.mlp.experts.3.gate_proj"),
    ("model.layers.0.block_sparse_moe.experts.3.w3", "model.layers.0.mlp.experts.3.up_proj"),
    ("model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
    (
        "language_model.model.layers.1.block_sparse_moe.experts.0.w2",
        "model.language_model.layers.1.mlp.experts.0.down_proj",
    ),
]


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_both_directions(old: str, new: str) -> None:
    assert new in list(list_names(old))
    assert old in list(list_names(new))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("text_model.encoder.layers.0.q", "vision_model.encoder.layers.0.q"),
        ("model.layers.0.mlp.experts.3.gate_proj", "model.layers.0.mlp.experts.3.w3"),
        ("model.layers.0.mlp.experts.3.gate_proj", "model.layers.0.mlp.experts.3.up_proj"),
        ("model.layers.10.q", "model.layers.1.q"),
        ("xlm_head", "xlanguage_model.lm_head"),
    ],
)
def test_never_another_module(name: str, other: str) -> None:
    assert other not in list(list_names(name))


@pytest.mark.parametrize("name", ["transformer.h.0.attn.c_attn", "q", "", "model", "model.layersx.0", "mlp"])
def test_names_that_nobody_changed(name: str) -> None:
    assert list(list_names(name)) == []


def test_a_name_of_many_parts_comes_to_an_end() -> None:
    assert len(list(list_names("model." * 400 + "layers.mlp." * 400 + "x"))) < 50


@pytest.mark.parametrize("encoder", ["qwen25_7b", "llama", "an_encoder_of_next_year"])
def test_a_language_model_in_one_file_is_found_whatever_it_is_called(encoder: str) -> None:
    name = f"text_encoders.{encoder}.transformer.model.layers.0.mlp.up_proj"
    assert generalise(name) in list(list_names("text_encoder.layers.0.mlp.up_proj"))
    assert generalise("text_encoders.transformer.model.layers.0") == "text_encoders.transformer.model.layers.0"
