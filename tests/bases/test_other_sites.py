"""Sites under names that no tensor has: what they are parts and sections of, and which adapters find them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat
from builders import lora_factors, write_peft, write_tensors
from loraformat.adapter import SlotKind
from loraformat.bases import Site
from loraformat.bases._fused_modules import FAMILIES, arrange
from loraformat.limits import MAX_EXPERTS
from loraformat.loading import open_base
from loraformat.spans import Part
from loraformat.spellings import read_renames_file

SPLIT = {"weight": (24, 5), "bias": (24,)}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 12}


def sites_of(folder: Path, config: dict[str, Any], **shapes: tuple[int, ...]) -> dict[str, list[Site]]:
    """Return the sites by module and parameter of a base of tensors `a__b` for `a.b`."""
    folder.mkdir()
    arrays = {name.replace("__", "."): np.ones(shape, np.float32) for name, shape in shapes.items()}
    write_tensors(folder / "model.safetensors", arrays)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    found: dict[str, list[Site]] = {}
    for site in open_base(folder).sites:
        found.setdefault(f"{site.module} {site.parameter}", []).append(site)
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.fused)
def test_every_arrangement_uses_every_row_once(family: Any) -> None:
    config = {**HEADS, "num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2}
    tried = 0
    for model_type in family.layouts:
        for rows in (24, 36, 48):
            found = arrange(family, {**config, "model_type": model_type}, rows)
            if found is None:
                continue
            tried += 1
            stored = sorted(row for runs in found for run in runs for row in range(run.stored, run.stored + run.rows))
            assert stored == list(range(rows))
            for runs in found:
                own = [row for run in runs for row in range(run.start, run.start + run.rows)]
                assert own == list(range(len(own)))
    assert tried


def test_members_of_a_fused_weight_and_of_its_bias(tmp_path: Path) -> None:
    config = {"model_type": "phi3", **HEADS}
    found = sites_of(tmp_path / "x", config, a__qkv_proj__weight=(24, 12), a__qkv_proj__bias=(24,))
    (value,), (bias,) = found["a.v_proj weight"], found["a.v_proj bias"]
    assert value.part == Part((24, 12), (18, 24, 1), (0, 12, 1))
    assert bias.part == Part((24, 1), (18, 24, 1), (0, 1, 1))
    assert (value.section, value.transposed[SlotKind.LINEAR]) == (None, False)
    assert SlotKind.EMBEDDING not in value.transposed


def test_members_in_turns_are_sections_of_many_parts(tmp_path: Path) -> None:
    found = sites_of(tmp_path / "x", {"model_type": "gpt_neox", **HEADS}, a__query_key_value__weight=(36, 12))
    keys = found["a.key weight"]
    assert [site.section for site in keys] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert [site.part.rows for site in keys if site.part] == [(3, 6, 1), (12, 15, 1), (21, 24, 1), (30, 33, 1)]


def test_members_that_are_stored_apart_offer_the_fused_module(tmp_path: Path) -> None:
    shapes = {f"a__{name}__weight": (rows, 12) for name, rows in (("q_proj", 12), ("k_proj", 6), ("v_proj", 6))}
    found = sites_of(tmp_path / "x", {}, **shapes)
    assert [(site.section, site.id) for site in found["a.qkv_proj weight"]] == [
        ((0, 12), "a.q_proj.weight"),
        ((12, 18), "a.k_proj.weight"),
        ((18, 24), "a.v_proj.weight"),
    ]
    del shapes["a__k_proj__weight"]
    assert "a.qkv_proj weight" not in sites_of(tmp_path / "y", {}, **shapes)


def test_a_fused_adapter_of_another_height_is_refused(tmp_path: Path) -> None:
    """Two of the three would fit by themselves."""
    shapes = {f"a__{name}__weight": (6, 12) for name in ("q_proj", "k_proj", "v_proj")}
    sites_of(tmp_path / "x", {}, **shapes)
    adapter = write_peft(tmp_path / "adapter", {"a.qkv_proj": lora_factors(np.random.default_rng(1), 24, 12, 2)})
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(tmp_path / "x", [adapter], tmp_path / "out")
    assert caught.value.codes == ("LF405",)
    assert "(0, 6), (6, 12), (12, 18)" in caught.value.problems[0].found


def test_experts_by_family(tmp_path: Path) -> None:
    shapes = {"m__experts__gate_up_proj": (2, 10, 6), "m__experts__down_proj": (2, 6, 4)}
    plain = sites_of(tmp_path / "a", {"model_type": "qwen3_moe"}, **shapes)
    up = [site for site in plain["m.experts.1.up_proj weight"] if not site.transposed[SlotKind.LINEAR]]
    assert [site.part for site in up] == [Part((20, 6), (15, 20, 1), (0, 6, 1))]
    turned = sites_of(tmp_path / "b", {"model_type": "gpt_oss"}, **shapes)
    up = [site for site in turned["m.experts.1.up_proj weight"] if site.transposed[SlotKind.LINEAR]]
    assert [site.part for site in up] == [Part((20, 6), (10, 20, 1), (1, 6, 2))]
    unknown = sites_of(tmp_path / "c", {}, **shapes)
    assert "m.experts.1.up_proj weight" not in unknown
    assert len(unknown["m.experts.1.down_proj weight"]) == 2


def test_square_experts_lie_one_way_in_a_known_family(tmp_path: Path) -> None:
    for family, expected in (("mixtral", [False]), ("gpt_oss", [True]), ("", [False, True])):
        config = {"model_type": family} if family else {}
        found = sites_of(tmp_path / (family or "none"), config, m__experts__down_proj=(2, 6, 6))
        assert [site.transposed[SlotKind.LINEAR] for site in found["m.experts.0.down_proj weight"]] == expected


def test_a_tensor_of_far_too_many_experts_offers_none(tmp_path: Path) -> None:
    found = sites_of(tmp_path / "x", {}, m__experts__down_proj=(MAX_EXPERTS + 1, 1, 1))
    assert set(found) == {"m.experts down_proj"}


def test_attention_offers_its_module(tmp_path: Path) -> None:
    found = sites_of(tmp_path / "x", {}, a__in_proj_weight=(18, 6), a__in_proj_bias=(18,), a__out_proj__weight=(6, 6))
    assert {"a weight", "a bias", "a.out_proj weight"} <= set(found)
    assert found["a weight"][0].transposed[SlotKind.LINEAR] is False


IMAGES = {"model_type": "vit"}
STORED = "vit.encoder.layer.3"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"{STORED}.attention.attention.query", "vit.layers.3.attention.q_proj"),
        (f"{STORED}.attention.output.dense", "vit.layers.3.attention.o_proj"),
        (f"{STORED}.output.dense", "vit.layers.3.mlp.fc2"),
    ],
)
def test_a_family_whose_modules_transformers_renames(tmp_path: Path, old: str, new: str) -> None:
    """The names are those of transformers 5.23, whose checkpoints keep the older ones."""
    tensor = {f"{old}.weight".replace(".", "__"): (6, 4)}
    found = sites_of(tmp_path / "x", IMAGES, **tensor)
    assert [site.id for site in found[f"{new} weight"]] == [f"{old}.weight"]
    assert f"{new} weight" not in sites_of(tmp_path / "other", {"model_type": "llama"}, **tensor)
    inner = sites_of(tmp_path / "inner", {"model_type": "vision-encoder-decoder", "encoder": IMAGES}, **tensor)
    assert f"{new} weight" in inner


def test_a_rename_takes_no_name_that_a_tensor_has(tmp_path: Path) -> None:
    names = {f"{STORED}.output.dense.weight": (6, 4), "vit.layers.3.mlp.fc2.weight": (6, 4)}
    found = sites_of(tmp_path / "x", IMAGES, **{name.replace(".", "__"): shape for name, shape in names.items()})
    assert [site.id for site in found["vit.layers.3.mlp.fc2 weight"]] == ["vit.layers.3.mlp.fc2.weight"]


def test_gamma_is_a_weight_and_beta_a_bias(tmp_path: Path) -> None:
    """bert-base-uncased is stored so."""
    found = sites_of(tmp_path / "x", {"model_type": "bert"}, bert__LayerNorm__gamma=(4,), bert__LayerNorm__beta=(4,))
    assert found["bert.LayerNorm weight"][0].id == "bert.LayerNorm.gamma"
    assert found["bert.LayerNorm bias"][0].id == "bert.LayerNorm.beta"


def test_every_rename_can_be_applied() -> None:
    table = read_renames_file("transformers")
    steps = [step for family in table["families"].values() for step in family]
    assert len(steps) > 100
    for old, new in [row for step in [*steps, *table["all"]] for row in step]:
        re.sub(old, new, "model.layers.0.x.weight")
        assert "\\." not in new


@pytest.mark.parametrize(
    ("model_type", "stored", "members"),
    [
        ("gte", "encoder.layer.1.attention.qkv_proj", [f"layers.1.self_attn.{name}_proj" for name in "qkv"]),
        ("nomic_bert", "encoder.layers.1.attn.Wqkv", [f"layers.1.self_attn.{name}_proj" for name in "qkv"]),
        ("dinov2", "encoder.layer.1.mlp.weights_in", [f"encoder.layer.1.mlp.{name}_proj" for name in ("gate", "up")]),
    ],
)
def test_a_module_that_transformers_renames_and_splits(
    tmp_path: Path, model_type: str, stored: str, members: list[str]
) -> None:
    names = {f"{stored}.{parameter}".replace(".", "__"): shape for parameter, shape in SPLIT.items()}
    found = sites_of(tmp_path / "x", {"model_type": model_type}, **names)
    size = SPLIT["weight"][0] // len(members)
    for index, member in enumerate(members):
        rows = (index * size, index * size + size, 1)
        assert [site.part for site in found[f"{member} weight"]] == [Part(SPLIT["weight"], rows, (0, 5, 1))]
        assert [site.part for site in found[f"{member} bias"]] == [Part((24, 1), rows, (0, 1, 1))]
    assert f"{members[0]} weight" not in sites_of(tmp_path / "other", {"model_type": "bert"}, **names)


def test_packed_experts_that_the_family_calls_otherwise(tmp_path: Path) -> None:
    """Granite stores them as the weight of a module, of which transformers makes a parameter."""
    names = {"m__block_sparse_moe__input_linear__weight": (2, 6, 4)}
    found = sites_of(tmp_path / "x", {"model_type": "granitemoe"}, **names)
    parts = [site.part for site in found["m.block_sparse_moe.experts.1.gate_up_proj weight"] if site.part]
    assert parts[0] == Part((12, 4), (6, 12, 1), (0, 4, 1))
    assert "m.block_sparse_moe.experts.1.gate_up_proj weight" not in sites_of(tmp_path / "y", {}, **names)


def test_a_module_that_was_stored_in_its_wrapper(tmp_path: Path) -> None:
    """Phi-4-multimodal has its two adapters in the checkpoint, and the base of each module beside them."""
    shapes = {"a__qkv_proj__base_layer__weight": (6, 4), "a__qkv_proj__lora_A__vision__weight": (2, 4)}
    found = sites_of(tmp_path / "x", {}, **shapes)
    assert [site.id for site in found["a.qkv_proj weight"]] == ["a.qkv_proj.base_layer.weight"]
    found = sites_of(tmp_path / "both", {}, **shapes, a__qkv_proj__weight=(6, 4))
    assert [site.id for site in found["a.qkv_proj weight"]] == ["a.qkv_proj.weight"]


def test_members_of_one_weight_may_all_be_replaced(tmp_path: Path) -> None:
    """Biases of q, k and v that were trained apart, onto one bias of all."""
    state = {"m.qkv_proj.weight": np.ones((24, 12), np.float32), "m.qkv_proj.bias": np.zeros(24, np.float32)}
    base = tmp_path / "base"
    base.mkdir()
    write_tensors(base / "model.safetensors", state)
    (base / "config.json").write_text(json.dumps({"model_type": "phi3", **HEADS}))
    sizes = {"q": 12, "k": 6, "v": 6}
    saved = {f"m.{name}_proj.bias": np.full(rows, rows + ord(name), np.float32) for name, rows in sizes.items()}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_tensors(adapter / "adapter_model.safetensors", saved)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    loraformat.merge(base, [adapter], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")["m.qkv_proj.bias"]
    assert merged.tolist() == np.concatenate([*saved.values()]).tolist()


def test_a_bias_that_no_layer_has_is_no_loss_where_modules_could_be_fused(tmp_path: Path) -> None:
    """(IA)³ on Llama's q, k and v, which other families have in one weight: there are no biases to multiply."""
    parts = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    base = write_tensors(tmp_path / "x.safetensors", {f"{part}.weight": np.ones((4, 6), np.float32) for part in parts})
    factors = {f"base_model.model.{parts[1]}.ia3_l": np.full((4, 1), 2, np.float32)}
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", factors)
    config = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    receipt = loraformat.merge(base, [folder], tmp_path / "merged.safetensors")
    assert [weight.name for weight in receipt.weights] == [f"{parts[1]}.weight"]
