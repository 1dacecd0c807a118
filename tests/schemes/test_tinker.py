"""Tinker: experts in one tensor, and a head of its own name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laws.scheme_laws import SchemeLaws
from loraformat.errors import LoraformatError
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.tinker import SCHEME
from schemes import decoders as d

CONFIG = {"r": 3, "lora_alpha": 6}
PREFIX = "base_model.model.model.layers.0.mlp.experts"


def bundle_of(experts: Mapping[str, tuple[int, ...]]) -> Bundle:
    dice = np.random.default_rng(0)
    plain = d.factors(
        {"base_model.model.model.unembed_tokens": (d.VOCABULARY, d.HIDDEN)}, ".lora_A.weight", ".lora_B.weight"
    )
    arrays = {f"{PREFIX}.{name}": dice.standard_normal(shape).astype(np.float32) for name, shape in experts.items()}
    return Bundle(Path("tinker"), plain | d.tensors(arrays), {}, CONFIG)


SHARED = {"w1.lora_A.weight": (1, 3, 10), "w1.lora_B.weight": (5, 14, 3)}
OWN = {"w2.lora_A.weight": (5, 3, 14), "w2.lora_B.weight": (5, 10, 3)}


class TestTinker(SchemeLaws):
    scheme = SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        return {"the head": bundle_of({}), "experts": bundle_of(SHARED | OWN)}


def test_every_expert_is_a_target_and_a_shared_factor_is_one_of_each() -> None:
    bundle = bundle_of(SHARED | OWN)
    adapter = SCHEME.read(bundle, NOT_STATED)
    by_name: dict[str, Any] = {target.name: target for target in adapter.targets}
    assert set(by_name) == {
        "lm_head",
        *(f"model.layers.0.mlp.experts.{e}.{name}" for e in range(5) for name in ("gate_proj", "down_proj")),
    }
    assert {target.scale for target in adapter.targets} == {2.0}
    for expert in range(5):
        gate, down = (
            by_name[f"model.layers.0.mlp.experts.{expert}.{name}"].factors for name in ("gate_proj", "down_proj")
        )
        assert np.array_equal(gate["lora_A.weight"].read(), bundle.tensors[f"{PREFIX}.w1.lora_A.weight"].read()[0])
        assert np.array_equal(gate["lora_B.weight"].read(), bundle.tensors[f"{PREFIX}.w1.lora_B.weight"].read()[expert])
        assert np.array_equal(down["lora_A.weight"].read(), bundle.tensors[f"{PREFIX}.w2.lora_A.weight"].read()[expert])


def test_factors_of_different_numbers_of_experts() -> None:
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle_of({"w1.lora_A.weight": (4, 3, 10), "w1.lora_B.weight": (5, 14, 3)}), NOT_STATED)
    assert caught.value.codes == ("LF203",)
