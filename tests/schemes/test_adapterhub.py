"""AdapterHub: the adapter's own name inside the keys, and a third form of `adapter_config.json`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laws.scheme_laws import SchemeLaws
from loraformat.errors import LoraformatError
from loraformat.loading import load_adapter
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.adapterhub import SCHEME
from schemes import decoders as d

MODULES = {f"roberta.encoder.layer.{layer}.attention.self.query": (10, 7) for layer in (0, 11)}
CONFIG = {
    "config": {"architecture": "lora", "r": 3, "alpha": 6, "composition_mode": "add"},
    "model_type": "roberta",
    "name": "sst2",
    "version": "adapters.1.3.0",
}


def bundle_of(tensors: Mapping[str, Any], config: Any = CONFIG) -> Bundle:
    return Bundle(Path("hub"), dict(tensors), {}, config)


class TestAdapterHub(SchemeLaws):
    scheme = SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        plain = d.factors(MODULES, ".loras.sst2.lora_A", ".loras.sst2.lora_B")
        dora = {f"{name}.loras.sst2.m.weight": np.ones(10, np.float32) for name in MODULES}
        return {"LoRA": bundle_of(plain), "DoRA": bundle_of(plain | d.tensors(dora))}


def test_scale_and_names() -> None:
    adapter = SCHEME.read(bundle_of(d.factors(MODULES, ".loras.sst2.lora_A", ".loras.sst2.lora_B")), NOT_STATED)
    assert {target.scale for target in adapter.targets} == {2.0}
    assert [target.name for target in adapter.targets] == sorted(MODULES)


def ia3_config(**fields: Any) -> Any:
    return CONFIG | {"config": {"architecture": "lora", "alpha": 1, "composition_mode": "scale"} | fields}


def test_the_same_names_for_another_kind() -> None:
    plain = d.factors(MODULES, ".loras.x.lora_A", ".loras.x.lora_B")
    vectors = {name: each for name, each in plain.items() if name.endswith("B")}
    adapter = SCHEME.read(bundle_of(vectors, ia3_config()), NOT_STATED)
    assert {(target.kind, *target.factors) for target in adapter.targets} == {("ia3", "ia3_l")}
    for config in (ia3_config(alpha=2), ia3_config(composition_mode="odd")):
        with pytest.raises(LoraformatError) as caught:
            SCHEME.read(bundle_of(vectors, config), NOT_STATED)
        assert caught.value.codes == ("LF209",)


def test_of_several_one_is_chosen() -> None:
    both = {
        name: each
        for adapter in ("one", "two")
        for name, each in d.factors(MODULES, f".loras.{adapter}.lora_A", f".loras.{adapter}.lora_B").items()
    }
    bundle = bundle_of(both)
    assert SCHEME.list_adapters(bundle) == ["one", "two"]
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle, NOT_STATED)
    assert caught.value.codes == ("LF238",)
    adapter = SCHEME.read(replace(bundle, adapter="two"), NOT_STATED)
    assert [target.name for target in adapter.targets] == sorted(MODULES)
    assert [problem.code for problem in adapter.problems] == ["LF243"]


def test_parts_of_a_fused_weight() -> None:
    dice = np.random.default_rng(2)
    down, up = dice.standard_normal((6, 7)), dice.standard_normal((8, 3))
    name = "transformer.h.0.attn.c_attn"
    tensors = d.tensors({f"{name}.loras.x.lora_A": down, f"{name}.loras.x.lora_B": up})
    config = {"config": {"alpha": 6, "r": 3, "attn_matrices": ["q", "v"], "composition_mode": "add"}}
    (target,) = SCHEME.read(bundle_of(tensors, config), NOT_STATED).targets
    found = target.scale * target.factors["lora_B.weight"].read() @ target.factors["lora_A.weight"].read()
    want = np.concatenate([2 * up[:4] @ down[:3], np.zeros((4, 7)), 2 * up[4:] @ down[3:]])
    assert np.allclose(found, want)


def test_gates_are_a_kind_of_their_own() -> None:
    plain = d.factors(MODULES, ".loras.x.lora_A", ".loras.x.lora_B")
    gates = {f"{name}.loras.x.gate.weight": np.ones((1, 7), np.float32) for name in MODULES}
    adapter = SCHEME.read(bundle_of(plain | d.tensors(gates)), NOT_STATED)
    assert {target.kind for target in adapter.targets} == {"gated lora and lora"}


def test_a_folder(tmp_path: Path) -> None:
    import json

    from builders import write_tensors

    tensors = d.factors(MODULES, ".loras.sst2.lora_A", ".loras.sst2.lora_B")
    write_tensors(tmp_path / "adapter.safetensors", {name: each.read() for name, each in tensors.items()})
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert load_adapter(tmp_path).scheme == "adapterhub"
