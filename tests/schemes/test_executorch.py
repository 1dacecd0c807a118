"""ExecuTorch: Meta's names, torchtune's tensors, rotary rows as the family has them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from laws.scheme_laws import SchemeLaws, find_against
from loraformat.base_facts import BaseFacts
from loraformat.conversion._engine import Rounding, Source, convert_source
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.executorch import SCHEME
from loraformat.schemes.peft import SCHEME as PEFT
from schemes import decoders as d

A, B = ".lora_a.weight", ".lora_b.weight"
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
NAMES = {
    **{letter: f"layers.{{i}}.attention.w{letter}" for letter in "qkvo"},
    **{role: f"layers.{{i}}.feed_forward.w{n}" for n, role in ((1, "gate"), (2, "down"), (3, "up"))},
}


def bundle_of(facts: BaseFacts = d.LLAMA) -> Bundle:
    return Bundle(Path("adapter_model.pt"), d.factors(d.blocks(NAMES), A, B), {}, CONFIG, facts)


class TestExecutorch(SchemeLaws):
    scheme = SCHEME
    facts = d.LLAMA

    def examples(self) -> Mapping[str, Bundle]:
        return {"blocks": bundle_of()}


def rows_in_peft(facts: BaseFacts, name: str) -> Any:
    bundle = bundle_of(facts)
    source = Source(bundle.path, bundle, SCHEME.read(bundle, NOT_STATED), "")
    converted = convert_source(source, PEFT, facts, Rounding())
    assert not find_against(converted)
    return converted.written.tensors[f"base_model.model.{name}.lora_B.weight"].read()


def test_rows_are_interleaved_in_llama_alone() -> None:
    """Meta's pairs (2j, 2j + 1) of a head are the halves j and j + half of transformers."""
    stored = bundle_of().tensors[f"layers.0.attention.wq{B}"].read()
    half = d.HEAD_DIM // 2
    halves = stored.reshape(d.HEADS, half, 2, 3).swapaxes(1, 2).reshape(d.Q, 3)
    assert np.array_equal(rows_in_peft(d.LLAMA, "model.layers.0.self_attn.q_proj"), halves)
    assert np.array_equal(rows_in_peft(d.QWEN, "model.layers.0.self_attn.q_proj"), stored)
    down = bundle_of().tensors[f"layers.0.feed_forward.w2{B}"].read()
    assert np.array_equal(rows_in_peft(d.LLAMA, "model.layers.0.mlp.down_proj"), down)
