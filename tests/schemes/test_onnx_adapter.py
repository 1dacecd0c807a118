"""ONNX Runtime's adapters: transposed factors, the scale inside B."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from builders import MemoryFactor
from laws.scheme_laws import SchemeLaws
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.base_facts import NO_FACTS
from loraformat.schemes import NOT_STATED, Bundle, WrittenBundle
from loraformat.schemes.onnx_adapter import SCHEME
from loraformat.schemes.peft import SCHEME as PEFT
from schemes import decoders as d

A, B = ".lora_A.weight", ".lora_B.weight"
VERSIONS = {"format_version": "1", "adapter_version": "1", "model_version": "1"}
MODULES = d.blocks(d.TRANSFORMERS)


def bundle_of(tensors: Mapping[str, Any]) -> Bundle:
    return Bundle(Path("a.onnx_adapter"), dict(tensors), VERSIONS)


class TestOnnxAdapter(SchemeLaws):
    scheme = SCHEME
    facts = d.LLAMA
    carries = False

    def examples(self) -> Mapping[str, Bundle]:
        return {
            "blocks": bundle_of(d.factors(MODULES, A, B, transposed=True)),
            "float16": bundle_of(d.factors(MODULES, A, B, transposed=True, dtype=np.float16)),
        }

    def reopen(self, written: WrittenBundle, path: Path) -> Bundle:
        stored = {name: MemoryFactor(name, factor.read()) for name, factor in written.tensors.items()}
        return Bundle(path, stored, VERSIONS, None, self.facts)


def test_the_scale_is_folded_into_b() -> None:
    dice = np.random.default_rng(0)
    a, b = dice.standard_normal((3, 5)).astype(np.float32), dice.standard_normal((7, 3)).astype(np.float32)
    factors = {"lora_A.weight": MemoryFactor("a", a), "lora_B.weight": MemoryFactor("b", b)}
    target = Target("x", "lora", SlotKind.LINEAR, factors, 3, Scaling(ScalingRule.ALPHA_OVER_RANK, 6.0))
    written = SCHEME.write(Adapter((target,)), NO_FACTS)
    assert not written.problems
    assert np.array_equal(written.tensors["x.lora_A.weight"].read(), a.T)
    assert np.array_equal(written.tensors["x.lora_B.weight"].read(), 2 * b.T)


def test_the_container_tells_it_from_peft() -> None:
    square = d.factors({"x": (10, 10)}, A, B, transposed=True, rank=10)
    assert SCHEME.detect(bundle_of(square))
    assert not PEFT.detect(bundle_of(square))
    assert SCHEME.read(bundle_of(square), NOT_STATED).targets[0].scale == 1.0
