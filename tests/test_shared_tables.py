"""Tied tables of a checkpoint: changed alike, once; parted on request; else refused. Vocabularies that grow."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from builders import MemoryFactor, write_tensors
from graphs import make_adapter
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.plan import Plan
from loraformat.plan.weights import NewForm, PlannedWeight

EMBED, HEAD = "model.embed_tokens", "lm_head"
V, D, R = 9, 5, 2
ONE = Scaling(ScalingRule.MULTIPLIER, 1.0)


def dice() -> np.random.Generator:
    return np.random.default_rng(8)


def write_base(folder: Path, tied: bool | None, names: tuple[str, ...] = (EMBED,), **config: Any) -> Path:
    folder.mkdir()
    arrays = {f"{name}.weight": dice().standard_normal((V, D)).astype(np.float32) for name in names}
    arrays["model.layers.0.q_proj.weight"] = np.ones((6, D), np.float32)
    write_tensors(folder / "model.safetensors", arrays, {"format": "pt"})
    stated = {} if tied is None else {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": V, **stated, **config}))
    return folder


def make(
    name: str, kind: str, slot: SlotKind, factors: Mapping[str, Any], scale: float = 1.0, **options: Any
) -> Target:
    held = {role: MemoryFactor(role, np.asarray(array, np.float32)) for role, array in factors.items()}
    rank = R if kind == "lora" else 0
    return Target(name, kind, slot, held, rank, Scaling(ScalingRule.MULTIPLIER, scale), options=options)


def saved(name: str, values: Any) -> Target:
    return make(name, "replace", SlotKind.PARAMETER, {"weight": values})


def tokens(name: str, indices: list[int], rows: Any) -> Target:
    return make(name, "tokens", SlotKind.PARAMETER, {"trainable_tokens_delta": rows}, token_indices=indices)


def twins(scale: float = 1.0, other: float = 1.0) -> list[Target]:
    """Return factors of both tables that make the same change."""
    a, b = dice().standard_normal((R, V)), dice().standard_normal((D, R))
    embedding = {"lora_embedding_A": a, "lora_embedding_B": b}
    head = {"lora_A.weight": b.T, "lora_B.weight": a.T}
    return [
        make(HEAD, "lora", SlotKind.LINEAR, head, scale * other),
        make(EMBED, "lora", SlotKind.EMBEDDING, embedding, scale),
    ]


def plan(base: Path, *targets: Target, **options: Any) -> Plan:
    return loraformat.plan_merge(base, [make_adapter(*targets)], base.with_name("out"), **options)


def codes(base: Path, *targets: Target, **options: Any) -> set[str]:
    with pytest.raises(loraformat.LoraformatError) as caught:
        plan(base, *targets, **options)
    return set(caught.value.codes)


def by_name(found: Plan) -> dict[str, PlannedWeight]:
    return {weight.name: weight for weight in found.weights if "q_proj" not in weight.name}


VALUES = np.arange(V * D, dtype=np.float32).reshape(V, D)


@pytest.mark.parametrize("architecture", [None, "LlamaForCausalLM", "LlamaModel"])
@pytest.mark.parametrize("tied", [True, False, None])
def test_when_tables_are_tied(tmp_path: Path, tied: bool | None, architecture: str | None) -> None:
    """By the configuration's word, or because a model with a head has no tensor for it."""
    config = {} if architecture is None else {"architectures": [architecture]}
    base = write_base(tmp_path / "base", tied, **config)
    if tied or (tied is None and architecture == "LlamaForCausalLM"):
        assert codes(base, saved(EMBED, VALUES)) == {"LF402"}
    else:
        assert set(by_name(plan(base, saved(EMBED, VALUES)))) == {f"{EMBED}.weight"}


def test_equal_values_on_both_sides_are_written_once(tmp_path: Path) -> None:
    found = plan(write_base(tmp_path / "base", True), saved(EMBED, VALUES), saved(HEAD, VALUES))
    assert {name: (weight.new, len(weight.changes)) for name, weight in by_name(found).items()} == {
        f"{EMBED}.weight": (None, 1)
    }
    assert [problem.code for problem in found.problems] == ["LF411"]
    assert found.config_changes == {}


def test_equal_factors_on_both_sides_are_applied_once(tmp_path: Path) -> None:
    found = plan(write_base(tmp_path / "base", True), *twins())
    assert [len(weight.changes) for weight in by_name(found).values()] == [1]
    assert codes(write_base(tmp_path / "other", True), *twins(other=0.5)) == {"LF402"}


def test_both_stored_and_tied_take_the_same_change_each(tmp_path: Path) -> None:
    found = plan(write_base(tmp_path / "base", True, (EMBED, HEAD)), *twins())
    assert {name: len(weight.changes) for name, weight in by_name(found).items()} == {
        f"{EMBED}.weight": 1,
        f"{HEAD}.weight": 1,
    }


def test_what_is_told_of_tied_tables(tmp_path: Path) -> None:
    """Of one side that is trained, who else reads it; of two, that they differ. The way out stands with both."""
    base = write_base(tmp_path / "base", True)
    with pytest.raises(loraformat.LoraformatError) as caught:
        plan(base, twins()[1])
    (alone,) = caught.value.problems
    assert (alone.where, alone.found) == (EMBED, f"the tensor '{EMBED}.weight' is also read by {HEAD}.weight")
    with pytest.raises(loraformat.LoraformatError) as caught:
        plan(base, *twins(other=0.5))
    assert {problem.where: problem.found for problem in caught.value.problems} == {
        HEAD: f"{EMBED} changes the same tensor, '{EMBED}.weight', in another way",
        EMBED: f"{HEAD} changes the same tensor, '{EMBED}.weight', in another way",
    }
    assert all("--untie" in problem.advice for problem in (alone, *caught.value.problems))


@pytest.mark.parametrize("stored", [(EMBED,), (EMBED, HEAD)], ids=["one stored", "both stored"])
def test_untied_each_takes_its_own(tmp_path: Path, stored: tuple[str, ...]) -> None:
    base = write_base(tmp_path / "base", True, stored)
    targets = saved(EMBED, VALUES), saved(HEAD, VALUES + 1)
    assert codes(base, *targets) == {"LF402"}
    found = plan(base, *targets, untie=True)
    assert {name: weight.targets for name, weight in by_name(found).items()} == {
        f"{EMBED}.weight": (EMBED,),
        f"{HEAD}.weight": (HEAD,),
    }
    new = by_name(found)[f"{HEAD}.weight"].new
    assert (new is None) == (len(stored) == 2)
    if new is not None:
        assert new == NewForm(f"{HEAD}.weight", "float32", (V, D), "plain", has_base=True)
        assert by_name(found)[f"{HEAD}.weight"].key == f"{EMBED}.weight"
    assert found.config_changes["tie_word_embeddings"] is False
    assert [(problem.code, problem.severity) for problem in found.problems] == [("LF412", "note")]


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_the_side_that_is_not_changed_keeps_the_base_s_numbers(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", True)
    loraformat.merge(base, [make_adapter(saved(name, VALUES))], tmp_path / "out", untie=True)
    from safetensors.numpy import load_file

    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    other = HEAD if name == EMBED else EMBED
    np.testing.assert_array_equal(after[f"{name}.weight"], VALUES)
    np.testing.assert_array_equal(after[f"{other}.weight"], before[f"{EMBED}.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_two_adapters_one_of_them_of_both_tables(tmp_path: Path) -> None:
    """What is meant for the tied table lands in both that it becomes."""
    base = write_base(tmp_path / "base", True)
    both, head = make_adapter(*twins()), make_adapter(twins()[0])
    found = loraformat.plan_merge(base, [both, (head, 0.5)], tmp_path / "out", untie=True)
    assert {name: [change.adapter for change in weight.changes] for name, weight in by_name(found).items()} == {
        f"{EMBED}.weight": [0],
        f"{HEAD}.weight": [0, 1],
    }


@pytest.mark.parametrize("stored", [(EMBED,), (EMBED, HEAD)], ids=["one stored", "both stored"])
def test_trained_tokens_reach_all_tied_tables(tmp_path: Path, stored: tuple[str, ...]) -> None:
    base = write_base(tmp_path / "base", True, stored)
    found = plan(base, tokens(EMBED, [7, 2], VALUES[:2]))
    assert set(by_name(found)) == {f"{name}.weight" for name in stored}
    assert found.problems == ()
    apart = write_base(tmp_path / "apart", False, (EMBED, HEAD))
    assert set(by_name(plan(apart, tokens(EMBED, [7, 2], VALUES[:2])))) == {f"{EMBED}.weight"}


def test_trained_tokens_of_both_tables_that_differ(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", True)
    targets = tokens(EMBED, [7, 2], VALUES[:2]), tokens(HEAD, [1], VALUES[:1])
    assert codes(base, *targets) == {"LF402"}
    assert set(by_name(plan(base, *targets, untie=True))) == {f"{EMBED}.weight", f"{HEAD}.weight"}


def test_a_token_that_the_table_lacks(tmp_path: Path) -> None:
    assert codes(write_base(tmp_path / "base", False), tokens(EMBED, [7, V], VALUES[:2])) == {"LF405"}


# --- vocabularies that grow ------------------------------------------------------------------------------------------

MORE = np.arange((V + 3) * D, dtype=np.float32).reshape(V + 3, D)


def test_a_table_grows_and_the_size_of_the_vocabulary_with_it(tmp_path: Path) -> None:
    found = plan(write_base(tmp_path / "base", True), saved(EMBED, MORE), saved(HEAD, MORE))
    (weight,) = by_name(found).values()
    assert weight.new is not None
    assert (weight.shape, weight.new.shape, weight.matrix) == ((V, D), (V + 3, D), (V + 3, D))
    assert found.config_changes == {"vocab_size": V + 3}
    assert [problem.code for problem in found.problems if problem.code != "LF411"] == ["LF413"]


def test_a_table_that_grows_alone_is_refused(tmp_path: Path) -> None:
    assert codes(write_base(tmp_path / "base", False, (EMBED, HEAD)), saved(EMBED, MORE)) == {"LF414"}
    assert codes(write_base(tmp_path / "tied", True), saved(EMBED, MORE), untie=True) == {"LF414"}
    both = saved(EMBED, MORE), saved(HEAD, np.concatenate([MORE, MORE[:1]]))
    assert codes(write_base(tmp_path / "both", False, (EMBED, HEAD)), *both) == {"LF414"}


def test_a_table_that_shrinks_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", False)
    with pytest.raises(loraformat.LoraformatError) as caught:
        plan(base, saved(EMBED, VALUES[:-1]))
    assert caught.value.codes == ("LF405",)
    assert "fewer rows" in caught.value.problems[0].advice


def test_another_matrix_does_not_grow(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", False)
    assert codes(base, saved("model.layers.0.q_proj", np.ones((7, D)))) == {"LF405"}


def test_what_is_added_to_the_rows_that_were_there_is_placed_on_them(tmp_path: Path) -> None:
    """Another adapter, trained on the base's own vocabulary, cannot be added to a table that was replaced."""
    base = write_base(tmp_path / "base", False)
    grown, other = make_adapter(saved(EMBED, MORE)), make_adapter(twins()[1])
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.plan_merge(base, [grown, other], tmp_path / "out")
    assert caught.value.codes == ("LF409",)


# --- biases that the base lacks --------------------------------------------------------------------------------------


def biased(name: str = "model.layers.0.q_proj") -> Target:
    factors = {"lora_A.weight": np.ones((R, D)), "lora_B.weight": np.ones((6, R)), "lora_B.bias": np.arange(6)}
    return make(name, "lora", SlotKind.LINEAR, factors, 0.5)


def test_a_new_bias_is_planned_when_it_is_asked_for(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", False)
    assert codes(base, biased()) == {"LF401"}
    found = plan(base, biased(), new_biases=True)
    (weight,) = (weight for weight in found.weights if weight.name.endswith(".bias"))
    assert weight.new is not None
    assert (weight.new.name, weight.new.shape, weight.new.has_base) == ("model.layers.0.q_proj.bias", (6,), False)
    assert found.config_changes == {"attention_bias": True}
    assert [(problem.code, problem.severity) for problem in found.problems] == [("LF415", "note")]


def test_two_adapters_share_a_new_bias(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", False)
    adapters: list[tuple[Adapter, float]] = [(make_adapter(biased()), 1.0), (make_adapter(biased()), 3.0)]
    loraformat.merge(base, adapters, tmp_path / "out", new_biases=True)
    from safetensors.numpy import load_file

    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.q_proj.bias"]
    np.testing.assert_array_equal(found, 2.0 * np.arange(6))


def test_the_bias_may_be_left_out(tmp_path: Path) -> None:
    found = plan(write_base(tmp_path / "base", False), biased(), allow_unmatched=["*q_proj"])
    assert found.unmatched == ("model.layers.0.q_proj.bias",)
    assert [weight.new for weight in found.weights] == [None]
