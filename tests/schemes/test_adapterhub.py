"""AdapterHub: the adapter's own name inside the keys, and a third form of `adapter_config.json`."""

from collections.abc import Mapping
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


def test_the_same_names_for_another_kind() -> None:
    config = CONFIG | {"config": {"architecture": "lora", "alpha": 1, "composition_mode": "scale"}}
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle_of(d.factors(MODULES, ".loras.x.lora_A", ".loras.x.lora_B"), config), NOT_STATED)
    assert caught.value.codes == ("LF209",)


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
