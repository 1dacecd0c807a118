"""VoxCPM's adapters: factors without an ending, a scale in a configuration of their own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from builders import MemoryFactor, write_tensors
from laws.scheme_laws import SchemeLaws
from loraformat.loading import choose_scheme, load_adapter, open_bundle
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.voxcpm import SCHEME

CONFIG = {"base_model": "VoxCPM1.5", "lora_config": {"enable_lm": True, "r": 2, "alpha": 8, "dropout": 0.0}}
MODULES = ("base_lm.layers.0.self_attn.q_proj", "feat_decoder.estimator.decoder.layers.1.self_attn.v_proj")


def make_arrays() -> dict[str, Any]:
    dice = np.random.default_rng(0)
    shapes = {f"{module}.lora_A": (2, 5) for module in MODULES} | {f"{module}.lora_B": (7, 2) for module in MODULES}
    return {name: dice.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


class TestVoxCpm(SchemeLaws):
    scheme = SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        tensors = {name: MemoryFactor(name, array) for name, array in make_arrays().items()}
        return {"factors": Bundle(Path("lora"), tensors, {}, CONFIG)}


def test_a_folder(tmp_path: Path) -> None:
    write_tensors(tmp_path / "lora_weights.safetensors", make_arrays())
    (tmp_path / "lora_config.json").write_text(json.dumps(CONFIG))
    for path in (tmp_path, tmp_path / "lora_weights.safetensors"):
        adapter = load_adapter(path, None, NOT_STATED)
        assert {target.name: target.scale for target in adapter.targets} == dict.fromkeys(MODULES, 4.0)


def test_without_its_configuration_it_is_loralib_s(tmp_path: Path) -> None:
    write_tensors(tmp_path / "lora_weights.safetensors", make_arrays())
    bundle, _ = open_bundle(tmp_path)
    assert choose_scheme(bundle, None)[0].name == "loralib"
