"""GGUF adapters: llama.cpp's names, one alpha, q and k in the order of the architecture."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from builders import MemoryFactor, write_config, write_tensors
from laws.scheme_laws import SchemeLaws, find_against
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.base_facts import NO_FACTS, BaseFacts
from loraformat.conversion import convert
from loraformat.errors import LoraformatError
from loraformat.loading import load_adapter
from loraformat.schemes import NOT_STATED, Bundle, WrittenBundle
from loraformat.schemes.gguf import SCHEME
from loraformat.schemes.peft import SCHEME as PEFT
from schemes import decoders as d

A, B = ".weight.lora_a", ".weight.lora_b"
NAMES = {
    **{letter: f"blk.{{i}}.attn_{letter}" for letter in "qkv"},
    "o": "blk.{i}.attn_output",
    **{role: f"blk.{{i}}.ffn_{role}" for role in ("gate", "up", "down")},
}
VALUES = {
    "general.architecture": '"llama"',
    "general.type": '"adapter"',
    "adapter.type": '"lora"',
    "adapter.lora.alpha": "16.0",
    "general.name": '"Größe"',
    "general.numbers": '{"array": "uint32", "items": [1, 2]}',
}


def bundle_of(tensors: Mapping[str, Any], values: Mapping[str, str] = VALUES) -> Bundle:
    return Bundle(Path("adapter.gguf"), dict(tensors), dict(values))


class TestGguf(SchemeLaws):
    scheme = SCHEME
    facts = d.LLAMA

    def examples(self) -> Mapping[str, Bundle]:
        plain = d.factors(d.blocks(NAMES), A, B)
        table = {"token_embd.weight.lora_a": (d.VOCABULARY, 3), "token_embd.weight.lora_b": (d.HIDDEN, 3)}
        tables = d.tensors({name: np.ones(shape, np.float32) for name, shape in table.items()})
        ranks = d.factors(d.blocks(NAMES, (0,)), A, B) | d.factors(d.blocks(NAMES, (1,)), A, B, rank=5)
        return {
            "blocks": bundle_of(plain),
            "float16": bundle_of(d.factors(d.blocks(NAMES), A, B, dtype=np.float16)),
            "table": bundle_of(plain | tables),
            "ranks differ": bundle_of(ranks),
            "alpha 0": bundle_of(plain, VALUES | {"adapter.lora.alpha": "0.0"}),
        }

    def is_restored(self, example: str) -> bool:
        return example != "alpha 0"

    def reopen(self, written: WrittenBundle, path: Path) -> Bundle:
        texts = {name: json.dumps(value, ensure_ascii=False) for name, value in written.metadata.items()}
        stored = {name: MemoryFactor(name, factor.read()) for name, factor in written.tensors.items()}
        return Bundle(path, stored, texts, None, self.facts)


def test_one_alpha_over_each_rank_and_0_is_a_scale_of_1() -> None:
    tensors = d.factors(d.blocks(NAMES, (0,)), A, B) | d.factors(d.blocks(NAMES, (1,)), A, B, rank=4)
    scales = {target.name: target.scale for target in SCHEME.read(bundle_of(tensors), NOT_STATED).targets}
    assert (scales["blk.0.attn_q"], scales["blk.1.attn_q"]) == (16 / 3, 4.0)
    for text in ("0.0", None):
        values = {key: value for key, value in VALUES.items() if key != "adapter.lora.alpha"}
        values |= {"adapter.lora.alpha": text} if text else {}
        assert {target.scale for target in SCHEME.read(bundle_of(tensors, values), NOT_STATED).targets} == {1.0}


def peft(scaling: Mapping[str, Any], dtype: Any = np.float32) -> Bundle:
    tensors = d.factors(d.blocks(d.TRANSFORMERS), ".lora_A.weight", ".lora_B.weight", dtype=dtype)
    named = {f"base_model.model.{name}": MemoryFactor(name, each.read()) for name, each in tensors.items()}
    return Bundle(Path("peft"), dict(named), {}, {"peft_type": "LORA", "r": 3, **scaling})


def convert_peft(facts: BaseFacts, **scaling: Any) -> Any:
    from loraformat.conversion._engine import Rounding, Source, convert_source

    bundle = replace(peft(scaling), facts=facts)
    return convert_source(Source(bundle.path, bundle, PEFT.read(bundle, NOT_STATED), ""), SCHEME, facts, Rounding())


def interleave(rows: Any, heads: int) -> Any:
    """Return the rows as llama.cpp's converter permutes them: `LlamaModel.permute`."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize(("facts", "permutes"), [(d.LLAMA, True), (d.QWEN, False)])
def test_q_and_k_are_permuted_where_the_architecture_wants_it(facts: BaseFacts, permutes: bool) -> None:
    converted = convert_peft(facts, lora_alpha=6)
    assert not find_against(converted)
    source = peft({}).tensors
    for letter, heads in (("q", d.HEADS), ("k", d.KV_HEADS), ("v", 0)):
        stored = source[f"base_model.model.model.layers.11.self_attn.{letter}_proj.lora_B.weight"].read()
        expected = interleave(stored, heads) if permutes and heads else stored
        assert np.array_equal(converted.written.tensors[f"blk.11.attn_{letter}.weight.lora_b"].read(), expected)
        down = converted.written.tensors[f"blk.11.attn_{letter}.weight.lora_a"].read()
        assert np.array_equal(
            down, source[f"base_model.model.model.layers.11.self_attn.{letter}_proj.lora_A.weight"].read()
        )
    assert converted.written.metadata["general.architecture"] == ("llama" if permutes else "qwen2")


def test_the_family_and_the_heads_are_asked_for() -> None:
    codes = {problem.code for problem in find_against(convert_peft(NO_FACTS, lora_alpha=6))}
    assert codes == {"LF311", "LF316", "LF341"}
    headless = BaseFacts("config.json", architecture="llama")
    assert {problem.code for problem in find_against(convert_peft(headless, lora_alpha=6))} == {"LF311"}


def test_rslora_becomes_an_alpha_and_different_scales_are_folded_or_refused() -> None:
    converted = convert_peft(d.QWEN, lora_alpha=6, use_rslora=True)
    assert not find_against(converted)
    assert converted.written.metadata["adapter.lora.alpha"] == float(np.float32(6 * np.sqrt(3)))
    folded = convert_peft(d.QWEN, lora_alpha=6, alpha_pattern={"q_proj": 12})
    assert not find_against(folded)
    steps = {step.name: step.operations for step in folded.steps}
    assert steps["blk.0.attn_q.weight.lora_b"] == ("scale by 2 as float32",)
    assert steps["blk.0.attn_k.weight.lora_b"] == ()
    refused = convert_peft(d.QWEN, lora_alpha=6, alpha_pattern={"q_proj": 9})
    assert {problem.code for problem in find_against(refused)} == {"LF313"}


def test_values_are_those_of_an_adapter(tmp_path: Path) -> None:
    from builders import write_config, write_tensors
    from loraformat.containers.gguf import CONTAINER

    folder = tmp_path / "peft"
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", {name: each.read() for name, each in peft({}).tensors.items()})
    write_config(folder, {"r": 3, "lora_alpha": 6})
    config = tmp_path / "config.json"
    heads = {"num_attention_heads": d.HEADS, "num_key_value_heads": d.KV_HEADS, "head_dim": d.HEAD_DIM}
    config.write_text(json.dumps({"model_type": "mistral", "hidden_size": d.HIDDEN, **heads}))
    done = convert(folder, "gguf", tmp_path / "a.gguf", base=config, verify=True)
    assert done.proof is not None
    assert done.proof.relative == 0
    opened = CONTAINER.open(tmp_path / "a.gguf")
    assert list(opened.metadata.items())[:4] == [
        ("general.architecture", '"llama"'),
        ("general.type", '"adapter"'),
        ("adapter.type", '"lora"'),
        ("adapter.lora.alpha", "6.0"),
    ]
    convert(tmp_path / "a.gguf", "peft", tmp_path / "back", base=config, verify=True)
    one, other = (load_adapter(path) for path in (folder, tmp_path / "back"))
    assert [target.name for target in one.targets] == [target.name for target in other.targets]
    for before, after in zip(one.targets, other.targets, strict=True):
        assert after.scaling == Scaling(ScalingRule.ALPHA_OVER_RANK, 6.0)
        for role, factor in before.factors.items():
            assert np.array_equal(factor.read(), after.factors[role].read())


STACKS = {f"blk.1.ffn_{role}_exps": d.SHAPES[role] for role in ("gate", "up", "down")}


class TestExperts(TestGguf):
    """Experts lie in one tensor."""

    facts = d.QWEN_MOE

    def examples(self) -> Mapping[str, Bundle]:
        attention = d.factors({"blk.1.attn_q": d.SHAPES["q"]}, A, B)
        values = VALUES | {"general.architecture": '"qwen3moe"'}
        return {"stacks": bundle_of(attention | d.stacks(STACKS, A, B), values)}


def test_every_expert_is_a_target_of_its_own_and_norms_are_named() -> None:
    norm = d.tensors({"blk.0.attn_norm.weight": np.zeros(10, np.float32)})
    bundle = bundle_of(d.stacks(STACKS, A, B) | norm)
    targets = {target.name: target for target in SCHEME.read(bundle, NOT_STATED).targets}
    assert len(targets) == 3 * d.EXPERTS + 1
    assert (targets["blk.0.attn_norm"].kind, targets["blk.0.attn_norm"].slot) == ("replace", SlotKind.PARAMETER)
    target = targets["blk.1.ffn_gate_exps.2"]
    assert (target.kind, target.slot, target.rank, target.scale) == ("lora", SlotKind.LINEAR, 3, 16 / 3)
    stored = bundle.tensors["blk.1.ffn_gate_exps.weight.lora_b"].read()
    assert np.array_equal(target.factors["lora_B.weight"].read(), stored[2])


def test_stacks_become_modules_and_parameters_and_come_back(tmp_path: Path) -> None:
    """The names that transformers 5 has for experts are remembered; gate and up are one parameter there."""
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "qwen3_moe"}', encoding="utf-8")
    shapes = {"lora_A.weight": (d.EXPERTS * 2, d.HIDDEN), "lora_B.weight": (2 * d.MLP, 2 * d.EXPERTS)}
    down = {"lora_A.weight": (d.EXPERTS * 2, d.MLP), "lora_B.weight": (d.HIDDEN, 2 * d.EXPERTS)}
    module, dice = "base_model.model.model.layers.1.mlp.experts", np.random.default_rng(0)
    arrays = {f"{module}.base_layer.{role}": dice.standard_normal(shape) for role, shape in shapes.items()}
    arrays |= {f"{module}.{role}": dice.standard_normal(shape) for role, shape in down.items()}
    fields = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []}
    folder = tmp_path / "peft"
    folder.mkdir()
    write_tensors(
        folder / "adapter_model.safetensors", {name: each.astype(np.float32) for name, each in arrays.items()}
    )
    write_config(folder, {"r": 2, "lora_alpha": 6, "peft_version": "0.21.2", **fields})
    done = convert(folder, "gguf", tmp_path / "a.gguf", base=config, verify=True)
    assert done.proof is not None
    assert (done.proof.relative, done.account.refused) == (0.0, ())
    named = {"blk.1.ffn_gate_exps", "blk.1.ffn_up_exps", "blk.1.ffn_down_exps"}
    assert {target.name.rpartition(".")[0] for target in load_adapter(tmp_path / "a.gguf").targets} == named
    convert(tmp_path / "a.gguf", "mlx", tmp_path / "mlx", base=config, verify=True)
    convert(tmp_path / "mlx", "peft", tmp_path / "back", base=config, verify=True)
    one, other = (load_file(each / "adapter_model.safetensors") for each in (folder, tmp_path / "back"))
    assert {name: each.tobytes() for name, each in one.items()} == {
        name: each.tobytes() for name, each in other.items()
    }
    configs = [json.loads((each / "adapter_config.json").read_text()) for each in (folder, tmp_path / "back")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "values",
    [{"adapter.alora.invocation_tokens": '{"array": "uint32", "items": [1, 2]}'}, {"adapter.type": '"dora"'}],
)
def test_what_is_no_lora_is_refused(values: Mapping[str, str]) -> None:
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle_of(d.factors(d.blocks(NAMES), A, B), VALUES | values), NOT_STATED)
    assert caught.value.codes == ("LF209",)
