"""litgpt: groups of a fused weight, settings in YAML, and which parts are adapted."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import MemoryFactor
from laws.scheme_laws import SchemeLaws, find_against
from loraformat.base_facts import NO_FACTS, BaseFacts
from loraformat.conversion._engine import Rounding, Source, convert_source
from loraformat.errors import LoraformatError
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.litgpt import SCHEME
from loraformat.schemes.peft import SCHEME as PEFT
from schemes import decoders as d

A, B = ".lora_A", ".lora_B"
NAMES = {
    "o": "transformer.h.{i}.attn.proj",
    **{role: f"transformer.h.{{i}}.mlp.{name}" for role, name in (("gate", "fc_1"), ("up", "fc_2"), ("down", "proj"))},
}
SIZES = (d.Q, d.KV, d.KV)
COUNTS = {"n_head": d.HEADS, "n_query_groups": d.KV_HEADS, "head_size": d.HEAD_DIM, "n_embd": d.HIDDEN}


def settings(parts: tuple[int, ...], **more: Any) -> dict[str, Any]:
    flags = {name: part in parts for part, name in enumerate(("lora_query", "lora_key", "lora_value"))}
    rest = {"lora_projection": True, "lora_mlp": True, "lora_head": False}
    return {"lora_r": 3, "lora_alpha": 6, **flags, **rest, **COUNTS, **more}


def fused(parts: tuple[int, ...], layer: int = 0, rank: int = 3) -> dict[str, Any]:
    dice = np.random.default_rng(layer)
    name = f"transformer.h.{layer}.attn.qkv"
    return {
        f"{name}{A}": dice.standard_normal((rank * len(parts), d.HIDDEN)).astype(np.float32),
        f"{name}{B}": dice.standard_normal((sum(SIZES[part] for part in parts), rank)).astype(np.float32),
    }


def bundle_of(parts: tuple[int, ...], config: Any = None) -> Bundle:
    tensors = d.factors(d.blocks(NAMES, (0, 1)), A, B) | d.tensors(fused(parts) | fused(parts, 1))
    return Bundle(Path("lit"), tensors, {}, settings(parts) if config is None else config)


class TestLitgpt(SchemeLaws):
    scheme = SCHEME
    facts = d.LLAMA
    carries = False

    def examples(self) -> Mapping[str, Bundle]:
        return {
            "q, k and v": bundle_of((0, 1, 2)),
            "q and v": bundle_of((0, 2)),
            "v alone": bundle_of((2,)),
        }


def change_of(parts: tuple[int, ...], arrays: Mapping[str, Any], layer: int = 0) -> Any:
    """Return what `LoRAQKVLinear.get_lora_AB` does: one group after the other, zeros elsewhere."""
    a, b = (arrays[f"transformer.h.{layer}.attn.qkv{end}"].astype(np.float64) for end in (A, B))
    rank, start = b.shape[1], 0
    whole = np.zeros((sum(SIZES), a.shape[1]))
    for group, part in enumerate(parts):
        rows = slice(sum(SIZES[:part]), sum(SIZES[: part + 1]))
        whole[rows] = b[start : start + SIZES[part]] @ a[group * rank : (group + 1) * rank]
        start += SIZES[part]
    return 2.0 * whole


@pytest.mark.parametrize("parts", [(0, 1, 2), (0, 2), (0, 1), (1, 2), (0,), (2,)])
def test_a_group_acts_on_its_own_rows(parts: tuple[int, ...]) -> None:
    adapter = SCHEME.read(bundle_of(parts), NOT_STATED)
    target = next(each for each in adapter.targets if each.name == "transformer.h.0.attn.qkv")
    a, b = (target.factors[role].read().astype(np.float64) for role in ("lora_A.weight", "lora_B.weight"))
    np.testing.assert_allclose(target.scale * b @ a, change_of(parts, fused(parts)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [(0, 1, 2), (0, 2), (2,)])
def test_only_the_adapted_parts_are_targets_elsewhere_and_come_back(parts: tuple[int, ...]) -> None:
    bundle = replace(bundle_of(parts), facts=d.LLAMA)
    source = Source(bundle.path, bundle, SCHEME.read(bundle, NOT_STATED), "")
    converted = convert_source(source, PEFT, d.LLAMA, Rounding())
    assert not find_against(converted)
    names = {target.name for target in converted.adapter.targets if "self_attn" in target.name}
    expected = {f"model.layers.{layer}.self_attn.{'qkv'[part]}_proj" for part in parts for layer in (0, 1)}
    assert names == expected | {f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)}
    assert {target.rank for target in converted.adapter.targets} == {3}
    stored = {name: MemoryFactor(name, factor.read()) for name, factor in converted.written.tensors.items()}
    again = replace(bundle, tensors=stored, config=converted.written.config, metadata={})
    back = convert_source(Source(Path("peft"), again, PEFT.read(again, NOT_STATED), ""), SCHEME, d.LLAMA, Rounding())
    assert not find_against(back)
    for name, factor in bundle.tensors.items():
        assert np.array_equal(back.written.tensors[name].read(), factor.read()), name
    flags = settings(parts)
    assert back.written.config is not None
    assert {name: back.written.config[name] for name in flags if name.startswith("lora_")} == {
        name: value for name, value in flags.items() if name.startswith("lora_")
    }


def test_without_settings_the_rows_must_allow_one_reading() -> None:
    counts: dict[str, Any] = {"lora_alpha": 6, **COUNTS}
    assert SCHEME.read(bundle_of((0, 1, 2), counts), NOT_STATED).targets
    assert SCHEME.read(bundle_of((0,), counts), NOT_STATED).targets
    for parts in ((0, 2), (2,)):
        with pytest.raises(LoraformatError) as caught:
            SCHEME.read(bundle_of(parts, counts), NOT_STATED)
        assert caught.value.codes == ("LF342",)


def test_settings_that_the_rows_contradict() -> None:
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle_of((0, 2), settings((0, 1, 2))), NOT_STATED)
    assert caught.value.codes == ("LF342",)


def test_without_the_counts_of_heads_nothing_is_read() -> None:
    config = {name: value for name, value in settings((0, 2)).items() if name not in COUNTS}
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle_of((0, 2), config), NOT_STATED)
    assert caught.value.codes == ("LF311",)
    known = replace(bundle_of((0, 2), config), facts=BaseFacts("base", counts=d.COUNTS))
    assert SCHEME.read(known, NOT_STATED).targets


def test_modules_that_litgpt_adapts_as_a_whole_are_completed_by_zeros() -> None:
    names = {"q": "model.layers.{i}.self_attn.q_proj", "gate": "model.layers.{i}.mlp.gate_proj"}
    modules = d.blocks(names, (1,))
    tensors = d.factors(modules, ".lora_A.weight", ".lora_B.weight")
    named = {f"base_model.model.{name}": MemoryFactor(name, each.read()) for name, each in tensors.items()}
    bundle = Bundle(Path("peft"), dict(named), {}, {"peft_type": "LORA", "r": 3, "lora_alpha": 6})
    source = Source(bundle.path, bundle, PEFT.read(bundle, NOT_STATED), "")
    converted = convert_source(source, SCHEME, d.LLAMA, Rounding())
    assert not find_against(converted)
    written = converted.written.tensors
    whole = [f"transformer.h.{block}.mlp.{end}" for block in (0, 1) for end in ("fc_1", "fc_2", "proj")]
    assert set(written) == {
        f"{name}{end}" for name in (*whole, *(f"transformer.h.{block}.attn.qkv" for block in (0, 1))) for end in (A, B)
    }
    assert [name for name, factor in written.items() if factor.read().any()] == [
        f"transformer.h.1.{name}{end}" for name in ("attn.qkv", "mlp.fc_1") for end in (A, B)
    ]
    assert written[f"transformer.h.0.mlp.proj{A}"].shape == (3, d.MLP)
    assert written[f"transformer.h.0.mlp.proj{B}"].shape == (d.HIDDEN, 3)


@pytest.mark.parametrize("letters", ["qv", "q", "qkv"])
def test_the_scale_of_a_group_is_that_of_its_part(letters: str) -> None:
    """Fused targets have one alpha over the sum of their ranks; litgpt divides by the rank of each group."""
    modules = d.blocks({letter: f"model.layers.{{i}}.self_attn.{letter}_proj" for letter in letters}, (0, 1))
    tensors = d.factors(modules, ".lora_A.weight", ".lora_B.weight")
    named = {f"base_model.model.{name}": MemoryFactor(name, each.read()) for name, each in tensors.items()}
    bundle = Bundle(Path("peft"), dict(named), {}, {"peft_type": "LORA", "r": 3, "lora_alpha": 6})
    source = Source(bundle.path, bundle, PEFT.read(bundle, NOT_STATED), "")
    converted = convert_source(source, SCHEME, d.LLAMA, Rounding())
    assert not find_against(converted)
    config = converted.written.config
    assert config is not None
    assert (config["lora_r"], config["lora_alpha"]) == (3, 6.0)
    down, up = (converted.written.tensors[f"transformer.h.0.attn.qkv{end}"] for end in (A, B))
    assert (down.shape, up.shape) == ((3 * len(letters), d.HIDDEN), (sum(d.SHAPES[each][0] for each in letters), 3))


def test_a_folder_with_yaml(tmp_path: Path) -> None:
    from loraformat.containers.torch_zip import CONTAINER
    from loraformat.loading import load_adapter

    bundle = bundle_of((0, 2))
    tensors = [(name, each.dtype, each.shape, each.read) for name, each in bundle.tensors.items()]
    with (tmp_path / "lit_model.pth.lora").open("wb") as sink:
        CONTAINER.write(sink, tensors, {"torch.wrapper": "model"})
    lines = [f"{name}: {json.dumps(value)}" for name, value in settings((0, 2)).items() if name not in COUNTS]
    (tmp_path / "hyperparameters.yaml").write_text("\n".join([*lines, "train:", "  lr: 1.0", "devices: 1  # one"]))
    (tmp_path / "model_config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in COUNTS.items()))
    adapter = load_adapter(tmp_path)
    assert adapter.scheme == "litgpt"
    assert {target.scale for target in adapter.targets} == {2.0}
    assert NO_FACTS.count("heads") is None
