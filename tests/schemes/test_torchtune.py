"""torchtune: interleaved rows where the family has them, one rank and one alpha."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import MemoryFactor
from laws.scheme_laws import SchemeLaws, find_against
from loraformat.base_facts import BaseFacts
from loraformat.conversion._engine import Rounding, Source, convert_source
from loraformat.errors import LoraformatError
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes.peft import SCHEME as PEFT
from loraformat.schemes.torchtune import SCHEME
from schemes import decoders as d

A, B = ".lora_a.weight", ".lora_b.weight"
NAMES = {
    **{letter: f"layers.{{i}}.attn.{letter}_proj" for letter in "qkv"},
    "o": "layers.{i}.attn.output_proj",
    **{role: f"layers.{{i}}.mlp.w{number}" for role, number in (("gate", 1), ("down", 2), ("up", 3))},
}
MODULES = d.blocks(NAMES)
CONFIG = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"}


def bundle_of(tensors: Mapping[str, Any], config: Any = CONFIG) -> Bundle:
    return Bundle(Path("adapter_model.pt"), dict(tensors), {}, config)


class TestTorchtune(SchemeLaws):
    scheme = SCHEME
    facts = d.LLAMA
    carries = False

    def examples(self) -> Mapping[str, Bundle]:
        plain = d.factors(MODULES, A, B)
        dora = d.tensors(
            {f"{name}.magnitude": np.arange(1, out + 1, dtype=np.float32) for name, (out, _) in MODULES.items()}
        )
        return {
            "blocks": bundle_of(plain),
            "float16": bundle_of(d.factors(MODULES, A, B, dtype=np.float16)),
            "DoRA": bundle_of(plain | dora),
            "the head": bundle_of(plain | d.factors({"output": (d.VOCABULARY, d.HIDDEN)}, A, B)),
        }


def test_a_checkpoint_alone_must_be_told_its_alpha() -> None:
    bundle = bundle_of(d.factors(MODULES, A, B), None)
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle, NOT_STATED)
    assert caught.value.codes == ("LF211",)
    assert {target.scale for target in SCHEME.read(bundle, StatedScale(alpha=6)).targets} == {2.0}


@pytest.mark.parametrize(
    ("facts", "permutes"),
    [
        (d.LLAMA, True),
        (BaseFacts("config.json", counts=d.COUNTS, architecture="gemma2"), True),
        (d.QWEN, False),
    ],
)
def test_rows_of_q_and_k_and_their_magnitudes(facts: BaseFacts, permutes: bool) -> None:
    """The permutation is its own check: rows are told by their number."""
    numbered = {"q": (d.Q, d.HEADS), "k": (d.KV, d.KV_HEADS), "v": (d.KV, 0)}
    arrays: dict[str, Any] = {}
    for letter, (rows, _) in numbered.items():
        name = f"layers.0.attn.{letter}_proj"
        arrays[f"{name}{A}"] = np.ones((1, d.HIDDEN), np.float32)
        arrays[f"{name}{B}"] = np.arange(rows, dtype=np.float32)[:, None]
        arrays[f"{name}.magnitude"] = np.arange(rows, dtype=np.float32)
    bundle = bundle_of(d.tensors(arrays), {"r": 1, "lora_alpha": 1})
    source = Source(bundle.path, bundle, SCHEME.read(bundle, NOT_STATED), "")
    converted = convert_source(source, PEFT, facts, Rounding())
    assert not find_against(converted)
    for letter, (rows, heads) in numbered.items():
        expected = np.arange(rows)
        if permutes and heads:
            expected = expected.reshape(heads, d.HEAD_DIM // 2, 2).transpose(0, 2, 1).reshape(-1)
        name = f"base_model.model.model.layers.0.self_attn.{letter}_proj"
        assert np.array_equal(converted.written.tensors[f"{name}.lora_B.weight"].read()[:, 0], expected)
        assert np.array_equal(converted.written.tensors[f"{name}.lora_magnitude_vector"].read(), expected)


def test_a_scale_of_its_own_is_folded_exactly_or_refused() -> None:
    tensors = d.factors(d.blocks(d.TRANSFORMERS), ".lora_A.weight", ".lora_B.weight")
    named = {f"base_model.model.{name}": MemoryFactor(name, each.read()) for name, each in tensors.items()}
    for alpha, refused in ((12, set()), (9, {"LF313"})):
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "alpha_pattern": {"down_proj": alpha}}
        bundle = Bundle(Path("peft"), dict(named), {}, config)
        source = Source(bundle.path, bundle, PEFT.read(bundle, NOT_STATED), "")
        converted = convert_source(source, SCHEME, d.LLAMA, Rounding())
        assert {problem.code for problem in find_against(converted)} == refused
