"""mlx-lm: its own configuration, transposed factors, one rank and one multiplier."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import MemoryFactor
from laws.scheme_laws import SchemeLaws
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.base_facts import NO_FACTS
from loraformat.errors import LoraformatError
from loraformat.loading import load_adapter
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes.mlx import SCHEME
from schemes import decoders as d

A, B = ".lora_a", ".lora_b"
CONFIG = {
    "fine_tune_type": "lora",
    "num_layers": 16,
    "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    "model": "a/base",
}
OLD = {"lora_layers": 16, "use_dora": False, "lora_parameters": {"rank": 3, "alpha": 16, "scale": 10.0, "dropout": 0.0}}
MODULES = d.blocks(d.TRANSFORMERS)


def bundle_of(tensors: Mapping[str, Any], config: Any = CONFIG) -> Bundle:
    return Bundle(Path("adapters"), dict(tensors), {}, config)


class TestMlx(SchemeLaws):
    scheme = SCHEME
    facts = d.LLAMA

    def is_restored(self, example: str) -> bool:
        return example != "old configuration"

    def examples(self) -> Mapping[str, Bundle]:
        plain = d.factors(MODULES, A, B, transposed=True)
        dora = d.tensors({f"{name}.m": np.arange(1, out + 1, dtype=np.float32) for name, (out, _) in MODULES.items()})
        return {
            "blocks": bundle_of(plain),
            "float16": bundle_of(d.factors(MODULES, A, B, transposed=True, dtype=np.float16)),
            "embedding": bundle_of(d.factors(MODULES, A, B, transposed=True, embedding="model.embed_tokens")),
            "DoRA": bundle_of(plain | dora, CONFIG | {"fine_tune_type": "dora"}),
            "DoRA of an embedding": bundle_of(
                d.factors(MODULES, A, B, transposed=True, embedding="model.embed_tokens")
                | dora
                | d.tensors({"model.embed_tokens.m": np.arange(1, d.VOCABULARY + 1, dtype=np.float32)}),
                CONFIG | {"fine_tune_type": "dora"},
            ),
            "old configuration": bundle_of(plain, OLD),
        }


def test_factors_are_turned_and_the_scale_is_the_multiplier() -> None:
    bundle = bundle_of(d.factors(MODULES, A, B, transposed=True, embedding="model.embed_tokens"))
    adapter = SCHEME.read(bundle, NOT_STATED)
    by_name = {target.name: target for target in adapter.targets}
    down = by_name["model.layers.0.mlp.down_proj"]
    assert (down.slot, down.rank, down.scale) == (SlotKind.LINEAR, 3, 20.0)
    a, b = (bundle.tensors[f"{down.name}{end}"].read() for end in (A, B))
    assert np.array_equal(down.factors["lora_A.weight"].read(), a.T)
    assert np.array_equal(down.factors["lora_B.weight"].read(), b.T)
    table = by_name["model.embed_tokens"]
    assert table.slot is SlotKind.EMBEDDING
    assert table.factors["lora_embedding_A"].shape == (3, d.VOCABULARY)
    assert table.factors["lora_embedding_B"].shape == (d.HIDDEN, 3)


def test_of_alpha_and_scale_only_the_scale_counts() -> None:
    adapter = SCHEME.read(bundle_of(d.factors(MODULES, A, B, transposed=True), OLD), NOT_STATED)
    assert {target.scale for target in adapter.targets} == {10.0}


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (None, "LF211"),
        ({"fine_tune_type": "lora"}, "LF211"),
        ({"lora_parameters": {"scale": "20"}}, "LF213"),
        ({"lora_parameters": {"scale": True}}, "LF213"),
        ({"lora_parameters": {"scale": float("inf")}}, "LF207"),
    ],
)
def test_a_scale_that_is_not_there(config: Any, code: str) -> None:
    bundle = bundle_of(d.factors(MODULES, A, B, transposed=True), config)
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle, NOT_STATED)
    assert caught.value.codes == (code,)
    assert SCHEME.read(bundle, StatedScale(multiplier=2.0)).targets[0].scale == 2.0
    assert SCHEME.read(bundle, StatedScale(alpha=6.0)).targets[0].scale == 2.0


STACKS = {f"model.layers.{{i}}.mlp.switch_mlp.{role}_proj": d.SHAPES[role] for role in ("gate", "up", "down")}


def of_block(modules: d.Modules) -> d.Modules:
    return {name.format(i=1): sizes for name, sizes in modules.items()}


class TestExperts(SchemeLaws):
    """Models with experts, whose factors lie in one tensor."""

    scheme = SCHEME
    facts = d.QWEN_MOE

    def examples(self) -> Mapping[str, Bundle]:
        attention = d.factors({"model.layers.1.self_attn.q_proj": d.SHAPES["q"]}, A, B, transposed=True)
        own = {name.replace("switch_mlp", "experts"): sizes for name, sizes in of_block(STACKS).items()}
        return {
            "switch_mlp": bundle_of(attention | d.stacks(of_block(STACKS), A, B)),
            "float16": bundle_of(d.stacks(of_block(STACKS), A, B, dtype=np.float16)),
            "experts": bundle_of(d.stacks(own, A, B)),
        }


class TestMixtral(SchemeLaws):
    """Experts with names of their own."""

    scheme = SCHEME
    facts = d.MIXTRAL

    def examples(self) -> Mapping[str, Bundle]:
        own = {name.replace("mlp.switch", "block_sparse_moe.switch"): sizes for name, sizes in of_block(STACKS).items()}
        return {"block_sparse_moe": bundle_of(d.stacks(own, A, B))}


def test_every_expert_is_a_target_of_its_own() -> None:
    bundle = bundle_of(d.stacks(of_block(STACKS), A, B))
    targets = {target.name: target for target in SCHEME.read(bundle, NOT_STATED).targets}
    assert len(targets) == 3 * d.EXPERTS
    target = targets["model.layers.1.mlp.experts.2.down_proj"]
    assert (target.kind, target.slot, target.rank, target.scale) == ("lora", SlotKind.LINEAR, 3, 20.0)
    for role, end in (("lora_A.weight", A), ("lora_B.weight", B)):
        stored = bundle.tensors[f"model.layers.1.mlp.switch_mlp.down_proj{end}"].read()
        assert np.array_equal(target.factors[role].read(), stored[2])
    own = {"model.layers.0.block_sparse_moe.switch_mlp.up_proj": d.SHAPES["up"]}
    (first, *_) = SCHEME.read(bundle_of(d.stacks(own, A, B)), NOT_STATED).targets
    assert first.name == "model.layers.0.block_sparse_moe.experts.0.w3"


@pytest.mark.parametrize(
    ("shapes", "code"),
    [
        ({A: (5, 3, 10)}, "LF201"),
        ({A: (5, 3, 10), B: (4, 14, 3)}, "LF203"),
        ({A: (5, 3, 10), B: (5, 14, 2)}, "LF203"),
        ({A: (5000, 1, 1), B: (5000, 1, 1)}, "LF203"),
        ({A: (5, 3, 10), B: (3, 14)}, "LF201"),
    ],
)
def test_stacks_that_do_not_fit(shapes: Mapping[str, tuple[int, ...]], code: str) -> None:
    tensors = d.tensors({f"m.switch_mlp.up_proj{end}": np.zeros(shape, np.float32) for end, shape in shapes.items()})
    assert [problem.code for problem in SCHEME.read(bundle_of(tensors), NOT_STATED).problems] == [code]


@pytest.mark.parametrize(
    ("ranks", "code"), [({0: 2, 2: 2}, "LF134"), ({0: 2, 1: 3}, None), ({0: 2, 1: 2}, None)], ids=str
)
def test_experts_that_one_tensor_cannot_hold(ranks: Mapping[int, int], code: str | None) -> None:
    """A lower rank is padded, as elsewhere; an expert without factors is not made up."""
    names = {f"m.experts.{expert}.up_proj": rank for expert, rank in ranks.items()}
    adapter = make(names, dict.fromkeys(names, Scaling(ScalingRule.MULTIPLIER, 4.0)))
    found = SCHEME.write(adapter, NO_FACTS).problems
    assert {problem.code for problem in found if problem.severity == "error"} == ({code} if code else set())


def make(ranks: Mapping[str, int], scalings: Mapping[str, Scaling]) -> Adapter:
    dice = np.random.default_rng(0)
    targets = []
    for name, rank in ranks.items():
        pair = {"lora_A.weight": (rank, 5), "lora_B.weight": (7, rank)}
        factors = {
            role: MemoryFactor(role, dice.standard_normal(shape).astype(np.float32)) for role, shape in pair.items()
        }
        targets.append(Target(name, "lora", SlotKind.LINEAR, factors, rank, scalings[name]))
    return Adapter(tuple(targets))


def change_of(target: Target) -> Any:
    return (
        target.scale
        * target.factors["lora_B.weight"].read().astype(np.float64)
        @ target.factors["lora_A.weight"].read()
    )


def test_ranks_are_padded_and_scales_that_differ_by_a_power_of_two_are_folded() -> None:
    over_rank = Scaling(ScalingRule.ALPHA_OVER_RANK, 16.0)
    adapter = make({"l.0.a": 2, "l.0.b": 4, "l.0.c": 4}, dict.fromkeys(("l.0.a", "l.0.b", "l.0.c"), over_rank))
    written = SCHEME.write(adapter, NO_FACTS)
    assert [problem.code for problem in written.problems] == ["LF340"]
    assert written.config is not None
    assert written.config["lora_parameters"] == {
        "rank": 4,
        "scale": 4.0,
        "dropout": 0.0,
        "keys": ["l.0.a", "l.0.b", "l.0.c"],
    }
    again = SCHEME.read(Bundle(Path("a"), dict(written.tensors), {}, written.config), NOT_STATED)
    assert [target.rank for target in again.targets] == [4, 4, 4]
    for one, other in zip(adapter.targets, again.targets, strict=True):
        assert np.array_equal(change_of(one), change_of(other))


def test_a_scale_that_would_be_rounded_is_refused() -> None:
    scalings = {"a": Scaling(ScalingRule.MULTIPLIER, 1.0), "b": Scaling(ScalingRule.MULTIPLIER, 3.0)}
    scalings["c"] = scalings["a"]
    written = SCHEME.write(make(dict.fromkeys("abc", 2), scalings), NO_FACTS)
    assert [(problem.code, problem.where) for problem in written.problems] == [("LF313", "b")]


def test_keys_are_those_inside_a_block() -> None:
    unit = Scaling(ScalingRule.MULTIPLIER, 1.0)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.up_proj", "lm_head")
    written = SCHEME.write(make(dict.fromkeys(names, 2), dict.fromkeys(names, unit)), NO_FACTS)
    assert written.config is not None
    assert written.config["num_layers"] == -1
    assert written.config["lora_parameters"]["keys"] == ["lm_head", "mlp.up_proj", "self_attn.q_proj"]  # type: ignore[index, call-overload]


@pytest.mark.parametrize("name", ["adapters.safetensors", "0000100_adapters.safetensors"])
def test_the_configuration_beside_it_is_found(tmp_path: Path, name: str) -> None:
    import json

    from builders import write_tensors

    arrays = {key: factor.read() for key, factor in d.factors(MODULES, A, B, transposed=True).items()}
    write_tensors(tmp_path / name, arrays)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    adapter = load_adapter(tmp_path / name)
    assert (adapter.scheme, adapter.targets[0].scale) == ("mlx", 20.0)
    if name == "adapters.safetensors":
        assert load_adapter(tmp_path).targets[0].scale == 20.0


def test_old_archives_of_numpy(tmp_path: Path) -> None:
    arrays = {key: factor.read() for key, factor in d.factors(MODULES, A, B, transposed=True).items()}
    np.savez(tmp_path / "adapters.npz", **arrays)
    (tmp_path / "adapter_config.json").write_text('{"lora_parameters": {"rank": 3, "scale": 20.0}}')
    assert load_adapter(tmp_path).targets[0].scale == 20.0


def test_lengths_of_an_embeddings_outputs_have_no_place() -> None:
    """In mlx-lm `m` of an embedding is one for each token: the two would be read as one another."""
    shapes = {"lora_embedding_A": (2, 9), "lora_embedding_B": (5, 2), "lora_magnitude_vector": (5,)}
    factors = {role: MemoryFactor(role, np.ones(shape, np.float32)) for role, shape in shapes.items()}
    target = Target("model.embed_tokens", "dora", SlotKind.EMBEDDING, factors, 2, Scaling(ScalingRule.MULTIPLIER, 1.0))
    problems = SCHEME.write(Adapter((target,)), NO_FACTS).problems
    assert [(problem.code, problem.where) for problem in problems] == [("LF312", "model.embed_tokens")]
    tokens = {role: factor for role, factor in factors.items() if role != "lora_magnitude_vector"}
    tokens["m"] = MemoryFactor("m", np.ones(9, np.float32))
    assert not SCHEME.write(Adapter((replace(target, factors=tokens),)), NO_FACTS).problems
