"""litgpt's adapter_v2: scales and biases of layers, norms beside them, and gates that must be shut."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from laws.scheme_laws import SchemeLaws
from loraformat.adapter import SlotKind
from loraformat.loading.readers import choose_scheme
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.litgpt_adapter_v2 import SCHEME
from schemes import decoders as d


def bundle_of(**more: Any) -> Bundle:
    dice, arrays = np.random.default_rng(4), {}
    for name, rows in (("attn.qkv", 12), ("attn.proj", 5), ("mlp.fc", 9)):
        for role in ("adapter_scale", "adapter_bias"):
            arrays[f"transformer.h.0.{name}.{role}"] = dice.standard_normal(rows).astype(np.float32)
    arrays["transformer.h.0.norm_1.weight"] = dice.standard_normal(5).astype(np.float32)
    return Bundle(Path("lit_model.pth.adapter_v2"), d.tensors({**arrays, **more}))


def gated(value: float) -> Bundle:
    gate, prompt = "transformer.h.0.attn.gating_factor", "transformer.h.0.attn.adapter_wte.weight"
    tensors = {gate: np.full((1, 1, 4, 1), value, np.float32), prompt: np.ones((10, 5), np.float32)}
    return bundle_of(**tensors)


class TestLitgptAdapterV2(SchemeLaws):
    scheme = SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        return {"layers and a norm": bundle_of()}


def test_layers_and_norms() -> None:
    assert choose_scheme(bundle_of(), None)[0] is SCHEME
    kinds = {target.name: (target.kind, target.slot) for target in SCHEME.read(bundle_of(), NOT_STATED).targets}
    assert kinds["transformer.h.0.attn.qkv"] == ("adapter_v2", SlotKind.LINEAR)
    assert kinds["transformer.h.0.norm_1"] == ("replace", SlotKind.PARAMETER)


def test_gates_decide() -> None:
    (note,) = SCHEME.read(gated(0), NOT_STATED).problems
    assert (note.code, note.severity) == ("LF226", "note")
    (problem,) = SCHEME.read(gated(0.25), NOT_STATED).problems
    assert (problem.code, problem.severity) == ("LF209", "error")
    assert "LLaMA-Adapter" in problem.found
    assert "adapter_start_layer" in problem.advice
