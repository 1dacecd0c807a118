"""Canonical LoRA of NeMo and Megatron-Bridge: parts of fused weights with factors of their own."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from laws.scheme_laws import SchemeLaws, find_against
from loraformat.conversion._engine import Rounding, Source, convert_source
from loraformat.schemes import Bundle, StatedScale
from loraformat.schemes.megatron_canonical import SCHEME
from loraformat.schemes.peft import SCHEME as PEFT
from schemes import decoders as d

LAYER = "decoder.layers.0"
IN, OUT = ".linear_in.weight", ".linear_out.weight"
CANONICAL = {
    **{f"{LAYER}.self_attention.linear_qkv.adapter_{letter}": d.SHAPES[letter] for letter in "qkv"},
    **{f"{LAYER}.mlp.linear_fc1.adapter_{role}": d.SHAPES[role] for role in ("gate", "up")},
    f"{LAYER}.mlp.linear_fc2.adapter": (d.HIDDEN, d.MLP),
}
UNFUSED = {
    f"model.{LAYER}.self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter": d.SHAPES["q"],
    f"model.{LAYER}.mlp.adapter_layer.lora_unfused_hto4h_adapter.gate_adapter": d.SHAPES["gate"],
}


def bundle_of(modules: d.Modules) -> Bundle:
    return Bundle(Path("adapter.safetensors"), d.factors(modules, IN, OUT), facts=d.LLAMA)


class TestMegatronCanonical(SchemeLaws):
    scheme = SCHEME
    stated = StatedScale(alpha=6)
    facts = d.LLAMA

    def examples(self) -> Mapping[str, Bundle]:
        return {"Megatron-Bridge": bundle_of(CANONICAL), "NeMo 1": bundle_of(UNFUSED)}


def test_the_parts_are_plain_modules_elsewhere() -> None:
    bundle = bundle_of(CANONICAL)
    source = Source(bundle.path, bundle, SCHEME.read(bundle, StatedScale(alpha=6)), "")
    converted = convert_source(source, PEFT, d.LLAMA, Rounding())
    assert not find_against(converted)
    for letter in "qkv":
        key = f"base_model.model.model.layers.0.self_attn.{letter}_proj.lora_B.weight"
        stored = bundle.tensors[f"{LAYER}.self_attention.linear_qkv.adapter_{letter}{OUT}"].read()
        assert np.array_equal(converted.written.tensors[key].read(), stored)
