"""mistral-finetune: Meta's names and rows, and a multiplier in `params.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laws.scheme_laws import SchemeLaws
from loraformat.loading import load_adapter
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.mistral import SCHEME
from schemes import decoders as d

A, B = ".lora_A.weight", ".lora_B.weight"
NAMES = {
    **{letter: f"layers.{{i}}.attention.w{letter}" for letter in "qkvo"},
    **{role: f"layers.{{i}}.feed_forward.w{number}" for role, number in (("gate", 1), ("down", 2), ("up", 3))},
}
MODULES = d.blocks(NAMES)
PARAMS = {
    "dim": d.HIDDEN,
    "n_heads": d.HEADS,
    "n_kv_heads": d.KV_HEADS,
    "head_dim": d.HEAD_DIM,
    "lora": {"rank": 3, "scaling": 2.0, "dropout": 0.0, "enable": True},
}


def bundle_of(tensors: Mapping[str, Any], config: Any = PARAMS) -> Bundle:
    return Bundle(Path("lora"), dict(tensors), {}, config)


class TestMistral(SchemeLaws):
    scheme = SCHEME
    facts = d.LLAMA

    def examples(self) -> Mapping[str, Bundle]:
        return {
            "blocks": bundle_of(d.factors(MODULES, A, B)),
            "float16": bundle_of(d.factors(MODULES, A, B, dtype=np.float16)),
        }


def test_the_scaling_is_the_multiplier_and_params_state_the_heads() -> None:
    bundle = bundle_of(d.factors(MODULES, A, B))
    assert {target.scale for target in SCHEME.read(bundle, NOT_STATED).targets} == {2.0}
    facts = SCHEME.find_facts(bundle)
    assert [facts.count(name) for name in ("heads", "kv_heads", "head_dim")] == [d.HEADS, d.KV_HEADS, d.HEAD_DIM]


def test_experts_have_no_name_elsewhere() -> None:
    tensors = d.factors({"layers.0.feed_forward.experts.3.w1": (14, 10)}, A, B)
    (target,) = SCHEME.read(bundle_of(tensors), NOT_STATED).targets
    assert target.name == "layers.0.feed_forward.experts.3.w1"


@pytest.mark.parametrize("params", [True, False])
def test_a_folder(tmp_path: Path, params: bool) -> None:
    import json

    from builders import write_tensors

    tensors = {name: each.read() for name, each in d.factors(MODULES, A, B).items()}
    write_tensors(tmp_path / "lora.safetensors", tensors)
    if params:
        (tmp_path / "params.json").write_text(json.dumps(PARAMS))
        assert load_adapter(tmp_path).targets[0].scale == 2.0
    else:
        from loraformat.errors import LoraformatError

        with pytest.raises(LoraformatError) as caught:
            load_adapter(tmp_path)
        assert caught.value.codes == ("LF211",)
