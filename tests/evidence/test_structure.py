"""Roles of layers in graphs without names: every target comes to its own weight, or none does and it is said why."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from builders import write_peft, write_tensors
from graphs import Array, dyadic, dyadic_factors, linear_net, product, stored_weights, write_model
from loraformat.evidence.structure import read_role
from stacks import HEAD, NAMES, RANK, SHAPES, Stack


class Case:
    """A stack as a file, and an adapter of all its layers, or of some."""

    def __init__(self, folder: Path, stack: Stack, *, first: int = 0, layers: int | None = None) -> None:
        rng = np.random.default_rng(6)
        self.stack, self.folder = stack, folder
        self.factors, self.deltas = {}, {}
        for number in range(first, stack.layers if layers is None else layers):
            for role in stack.roles():
                name = f"model.layers.{number}.{NAMES[role]}"
                self.factors[name] = dyadic_factors(rng, *SHAPES[role], RANK)
                if (number, role) in stack.weights:
                    self.deltas[stack.weights[number, role]] = product(self.factors[name])
        self.base = write_model(folder / "base.onnx", stack.net.model())
        self.adapter = write_peft(folder / "adapter", self.factors, alpha=float(RANK))

    def merge(self, **options: Any) -> dict[str, Array]:
        loraformat.merge(self.base, [self.adapter], self.folder / "merged.onnx", **options)
        return stored_weights(self.folder / "merged.onnx")

    def refused(self, **options: Any) -> tuple[set[str], str]:
        with pytest.raises(loraformat.LoraformatError) as caught:
            self.merge(resolve="structure", **options)
        assert not (self.folder / "merged.onnx").exists()
        assert not loraformat.resolve_targets(self.base, self.adapter, resolve="structure").targets
        return set(caught.value.codes), str(caught.value)


SOUND = [
    Stack(),
    Stack(gated=False),
    Stack(layers=1),
    Stack(layers=3, gated=False),
    Stack(flags=frozenset({"swapped"})),
    Stack(flags=frozenset({"masked"})),
    Stack(flags=frozenset({"coded"})),
    Stack(gated=False, flags=frozenset({"classifier", "swapped"})),
]


@pytest.mark.parametrize("stack", SOUND, ids=lambda s: f"{s.layers}-{s.gated}-{'-'.join(sorted(s.flags))}")
def test_every_layer_takes_in_its_own_change(tmp_path: Path, stack: Stack) -> None:
    case = Case(tmp_path, stack)
    with pytest.raises(loraformat.LoraformatError) as caught:
        case.merge()
    assert set(caught.value.codes) == {"LF401"}
    before, after = stored_weights(case.base), case.merge(resolve="structure")
    assert len(case.deltas) == len(case.factors)
    for name, old in before.items():
        wanted = old + case.deltas[name].T.astype(np.float32) if name in case.deltas else old
        np.testing.assert_array_equal(after[name], wanted, err_msg=name)
    assert loraformat.verify(tmp_path / "merged.onnx", case.base, [case.adapter], resolve="structure").holds


def test_the_rows_of_a_packed_weight_are_those_that_a_split_makes(tmp_path: Path) -> None:
    case = Case(tmp_path, Stack(flags=frozenset({"packed"})))
    before, after = stored_weights(case.base), case.merge(resolve="structure")
    starts = {"value": 0, "query": 2 * HEAD, "key": 3 * HEAD}
    for number in range(case.stack.layers):
        name = case.stack.weights[number, "qkv"]
        wanted = before[name].T.astype(np.float64)
        for role, start in starts.items():
            factors = case.factors[f"model.layers.{number}.{NAMES[role]}"]
            wanted[start : start + SHAPES[role][0]] += product(factors)
        np.testing.assert_array_equal(after[name].T, wanted.astype(np.float32))
    assert {name for name, old in before.items() if (old != after[name]).any()} == set(case.deltas) | {
        case.stack.weights[number, "qkv"] for number in range(case.stack.layers)
    }


def test_what_resolve_prints(tmp_path: Path) -> None:
    case = Case(tmp_path, Stack())
    found = loraformat.resolve_targets(case.base, case.adapter, resolve="structure")
    assert {(t.strategy, t.evidence) for t in found.targets if t.target.endswith("1.self_attn.k_proj")} == {
        ("structure", "key of layer 1")
    }
    assert {t.target: t.weight for t in found.targets} == {
        f"model.layers.{number}.{NAMES[role]}": weight for (number, role), weight in case.stack.weights.items()
    }
    (tmp_path / "map.json").write_text(json.dumps(found.as_json()))
    after = case.merge(resolve="structure")
    loraformat.merge(case.base, [case.adapter], tmp_path / "mapped.onnx", map=tmp_path / "map.json")
    for name, values in stored_weights(tmp_path / "mapped.onnx").items():
        np.testing.assert_array_equal(values, after[name])
    for hint in ({"map": tmp_path / "map.json"}, {"resolve": "structure"}):  # Whichever of both it was made with.
        for name in ("merged.onnx", "mapped.onnx"):
            assert loraformat.verify(tmp_path / name, case.base, [case.adapter], **hint).problems == ()


def differing(*flags: str, **options: Any) -> Stack:
    return Stack(flags=frozenset(flags), **options)


UNSOUND = {
    "the scale is folded into a weight": (differing(scale=None), "multiplies its scores by 1, with heads of 8"),
    "half of it is": (differing(scale=HEAD**-0.25), "multiplies its scores by 0.594604"),
    "as for heads of half the size": (differing(scale=(HEAD / 2) ** -0.5), "multiplies its scores by 0.5"),
    "the Softmax is over queries": (differing(axis=0), "over the axis 0"),
    "the scores are turned": (differing("turned"), "not between two products"),
    "two products of one Softmax": (differing("contexts"), "not between two products"),
    "two layers behind one attention": (differing("outputs"), "one layer each"),
    "both factors are active": (differing("two active"), "0 blocks"),
    "two blocks behind one attention": (differing("two blocks"), "0 blocks"),
    "a block that is not added to its input": (differing("no residual"), "0 blocks"),
    "no blocks": (differing("no blocks"), "0 blocks"),
    "attention and block side by side": (differing("parallel"), "0 blocks"),
    "no norm before the layers": (differing("normless"), "what a norm puts out"),
    "a layer unlike the others": (differing("uneven"), "layer 1 is not like layer 0"),
    "a tensor in two layers": (differing("shared"), "a tensor that two layers read"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_a_graph_that_is_not_surely_such_a_stack_tells_nothing(tmp_path: Path, case: str) -> None:
    stack, words = UNSOUND[case]
    codes, text = Case(tmp_path, stack).refused()
    assert codes == {"LF425", "LF401"}
    assert words in text


@pytest.mark.parametrize(("layers", "asked"), [(2, 1), (2, 3), (3, 2)])
def test_another_number_of_layers_than_the_adapters(tmp_path: Path, layers: int, asked: int) -> None:
    codes, text = Case(tmp_path, Stack(layers=layers), layers=asked).refused()
    assert codes == {"LF425", "LF401"}
    assert f"{layers} layers in the graph" in text


def test_an_adapter_of_the_last_layers(tmp_path: Path) -> None:
    case = Case(tmp_path, Stack(layers=3), first=1)
    before, after = stored_weights(case.base), case.merge(resolve="structure")
    assert {name for name, old in before.items() if (old != after[name]).any()} == set(case.deltas)


def test_targets_of_two_stacks(tmp_path: Path) -> None:
    case = Case(tmp_path, Stack())
    factors = {name.replace("model.layers.1", "text.layers.1"): pair for name, pair in case.factors.items()}
    case.adapter = write_peft(tmp_path / "two", factors, alpha=float(RANK))
    codes, text = case.refused()
    assert codes == {"LF425", "LF401"}
    assert "several stacks" in text


def test_targets_without_a_role_are_not_found(tmp_path: Path) -> None:
    case = Case(tmp_path, Stack())
    more = case.factors | {"lm_head": case.factors["model.layers.0.mlp.down_proj"]}
    case.adapter = write_peft(tmp_path / "more", more, alpha=float(RANK))
    with pytest.raises(loraformat.LoraformatError) as caught:
        case.merge(resolve="structure")
    assert caught.value.codes == ("LF401",)
    case.merge(resolve="structure", allow_unmatched=["lm_head"])


def test_a_name_that_says_otherwise_speaks_against_all(tmp_path: Path) -> None:
    """The node that reads the keys' weight is called after the queries' module."""
    stack = Stack()
    node = next(node for node in stack.net.nodes if stack.weights[0, "key"] in node.input)
    node.name = "/model/layers.0/self_attn/q_proj/MatMul"
    case = Case(tmp_path, stack)
    with pytest.raises(loraformat.LoraformatError) as caught:
        case.merge(resolve="structure")
    assert set(caught.value.codes) == {"LF425", "LF450", "LF401"}
    assert "not the query of layer 0" in str(caught.value)


def test_names_that_agree_are_taken_and_the_rest_is_found(tmp_path: Path) -> None:
    stack = Stack()
    node = next(node for node in stack.net.nodes if stack.weights[0, "key"] in node.input)
    node.name = "/model/layers.0/self_attn/k_proj/MatMul"
    case = Case(tmp_path, stack)
    found = loraformat.resolve_targets(case.base, case.adapter, resolve="structure")
    strategies = [target.strategy for target in found.targets]
    assert strategies.count("names") == 1
    assert strategies.count("anchors") == 3, "the other layers of the attention that the keys name"
    assert strategies.count("structure") == len(case.factors) - 4


def test_the_checkpoint_has_the_last_word(tmp_path: Path) -> None:
    """Its numbers find weights first, and what only roles find must have them."""
    case = Case(tmp_path, Stack())
    stored = stored_weights(case.base)
    state = {
        f"model.layers.{number}.{NAMES[role]}.weight": np.ascontiguousarray(stored[name].T)
        for (number, role), name in case.stack.weights.items()
    }
    checkpoint = write_tensors(tmp_path / "model.safetensors", state)
    found = loraformat.resolve_targets(case.base, case.adapter, resolve="structure", base_checkpoint=checkpoint)
    assert {target.strategy for target in found.targets} == {"values"}
    state["model.layers.0.mlp.up_proj.weight"] += 1
    checkpoint = write_tensors(tmp_path / "other.safetensors", state)
    found = loraformat.resolve_targets(case.base, case.adapter, resolve="structure", base_checkpoint=checkpoint)
    (problem,) = found.problems
    assert (problem.code, problem.where) == ("LF421", "model.layers.0.mlp.up_proj")


def test_only_graphs_have_a_structure(tmp_path: Path) -> None:
    weights = {"model.layers.0.self_attn.q_proj": dyadic(np.random.default_rng(1), *SHAPES["query"])}
    factors = {name: dyadic_factors(np.random.default_rng(2), *w.shape, RANK) for name, w in weights.items()}
    adapter = write_peft(tmp_path / "adapter", factors)
    state = write_tensors(tmp_path / "model.safetensors", {f"{name}.weight": w for name, w in weights.items()})
    for base, way in ((state, "structure"), (write_model(tmp_path / "m.onnx", linear_net(weights).model()), "guess")):
        with pytest.raises(loraformat.LoraformatError) as caught:
            loraformat.resolve_targets(base, adapter, resolve=way)
        assert caught.value.codes == ("LF425",)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.11.self_attn.q_proj", (11, "query", "")),
        ("bert.encoder.layer.3.attention.self.value", (3, "value", "encoder")),
        ("bert.encoder.layer.3.attention.output.dense", (3, "output", "encoder")),
        ("bert.encoder.layer.3.output.dense", (3, "second", "encoder")),
        ("transformer.h.0.attn.c_proj", (0, "output", "")),
        ("transformer.h.0.mlp.c_proj", (0, "second", "")),
        ("transformer.h.0.attn.c_attn", (0, "qkv", "")),
        ("distilbert.transformer.layer.5.ffn.lin1", (5, "first", "")),
        ("blocks.2.attn.qkv", (2, "qkv", "")),
        ("blocks.2.feed_forward.key", None),
        ("model.layers.0.mlp.experts.3.gate_proj", None),
        ("decoder.block.0.layer.1.EncDecAttention.q", (0, "cross query", "decoder")),
        ("encoder.block.4.layer.1.DenseReluDense.wi_1", (4, "up", "encoder")),
        ("encoder.block.4.layer.1.DenseReluDense.wo", (4, "down|second", "encoder")),
        ("encoder.block.4.layer.1.EncDecAttention.q", None),
        ("decoder.block.0.layer.3.SelfAttention.q", None),
        ("model.decoder.layers.0.self_attn.q_proj", (0, "query", "decoder")),
        ("model.decoder.layers.0.encoder_attn.q_proj", (0, "cross query", "decoder")),
        ("decoder.bert.encoder.layer.1.crossattention.output.dense", (1, "cross output", "decoder")),
        ("self_attn.q_proj", None),
        ("lm_head", None),
    ],
)
def test_roles_of_names(name: str, said: tuple[int, str, str] | None) -> None:
    found = read_role(name)
    assert (found and (found.layer, "|".join(found.roles), found.stack)) == said
