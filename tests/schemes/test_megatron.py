"""NeMo and Megatron-Bridge: fused weights in groups of heads, and NeMo 1's own names."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laws.scheme_laws import SchemeLaws, find_against
from loraformat.base_facts import NO_FACTS
from loraformat.conversion._engine import Rounding, Source, convert_source
from loraformat.errors import LoraformatError
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes.megatron import SCHEME
from loraformat.schemes.peft import SCHEME as PEFT
from schemes import decoders as d

LAYER = "decoder.layers.0"
FUSED = {
    f"{LAYER}.self_attention.linear_qkv": (d.Q + 2 * d.KV, d.HIDDEN),
    f"{LAYER}.self_attention.linear_proj": (d.HIDDEN, d.Q),
    f"{LAYER}.mlp.linear_fc1": (2 * d.MLP, d.HIDDEN),
    f"{LAYER}.mlp.linear_fc2": (d.HIDDEN, d.MLP),
}
IN, OUT = ".linear_in.weight", ".linear_out.weight"
NEMO = {
    f"model.{LAYER}.self_attention.adapter_layer.lora_kqv_adapter": (d.Q + 2 * d.KV, d.HIDDEN),
    f"model.{LAYER}.self_attention.adapter_layer.lora_dense_attention_adapter": (d.HIDDEN, d.Q),
    f"model.{LAYER}.mlp.adapter_layer.lora_hto4h_adapter": (2 * d.MLP, d.HIDDEN),
    f"model.{LAYER}.mlp.adapter_layer.lora_4htoh_adapter": (d.HIDDEN, d.MLP),
}


def bundle_of(tensors: Mapping[str, Any]) -> Bundle:
    return Bundle(Path("adapter.safetensors"), dict(tensors), facts=d.LLAMA)


def bridge(rank: int = 4) -> dict[str, Any]:
    return d.factors({f"{name}.adapter": shape for name, shape in FUSED.items()}, IN, OUT, rank=rank)


class TestMegatron(SchemeLaws):
    scheme = SCHEME
    stated = StatedScale(alpha=8)
    facts = d.LLAMA

    def examples(self) -> Mapping[str, Bundle]:
        return {
            "Megatron-Bridge": bundle_of(bridge()),
            "NeMo 1": bundle_of(d.factors(NEMO, IN, OUT)),
        }


def to_peft(bundle: Bundle) -> Any:
    source = Source(bundle.path, bundle, SCHEME.read(bundle, StatedScale(alpha=8)), "")
    return convert_source(source, PEFT, bundle.facts, Rounding())


def test_rows_are_taken_from_their_groups() -> None:
    """Rows are told by their number: for each key-value head its q heads, its k, its v."""
    name = f"{LAYER}.self_attention.linear_qkv.adapter"
    rows = np.arange(d.Q + 2 * d.KV, dtype=np.float32)
    arrays = {f"{name}{IN}": np.ones((1, d.HIDDEN), np.float32), f"{name}{OUT}": rows[:, None]}
    converted = to_peft(bundle_of(d.tensors(arrays)))
    assert not find_against(converted)
    per = d.HEADS // d.KV_HEADS
    grouped = rows.reshape(d.KV_HEADS, per + 2, d.HEAD_DIM)
    expected = {"q": grouped[:, :per], "k": grouped[:, per], "v": grouped[:, per + 1]}
    for letter, part in expected.items():
        key = f"base_model.model.model.layers.0.self_attn.{letter}_proj.lora_B.weight"
        assert np.array_equal(converted.written.tensors[key].read()[:, 0], part.reshape(-1))


def test_gate_stands_above_up_and_both_share_a() -> None:
    bundle = bundle_of(bridge())
    converted = to_peft(bundle)
    stored = bundle.tensors[f"{LAYER}.mlp.linear_fc1.adapter{OUT}"].read()
    for role, rows in (("gate", stored[: d.MLP]), ("up", stored[d.MLP :])):
        key = f"base_model.model.model.layers.0.mlp.{role}_proj"
        assert np.array_equal(converted.written.tensors[f"{key}.lora_B.weight"].read(), rows)
        down = converted.written.tensors[f"{key}.lora_A.weight"].read()
        assert np.array_equal(down, bundle.tensors[f"{LAYER}.mlp.linear_fc1.adapter{IN}"].read())


def test_both_generations_say_the_same() -> None:
    one = to_peft(bundle_of(bridge(3))).written.tensors
    assert set(one) == set(to_peft(bundle_of(d.factors(NEMO, IN, OUT))).written.tensors)


def test_the_scale_and_the_heads_are_asked_for() -> None:
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle_of(bridge()), NOT_STATED)
    assert caught.value.codes == ("LF211",)
    headless = replace(bundle_of(bridge()), facts=replace(NO_FACTS, architecture="llama"))
    assert "LF311" in {problem.code for problem in find_against(to_peft(headless))}
