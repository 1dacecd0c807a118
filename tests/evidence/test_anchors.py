"""Names beside layers that have none: each target comes to its own weight, or nothing is merged."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import loraformat
from builders import write_peft
from graphs import dyadic_factors, product, stored_weights, write_model
from loraformat.evidence._places import read_place
from stacks import HIDDEN, NAMES, RANK, SHAPES, Stack

ATTENTION = ("query", "key", "value", "output")
USUAL = ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
USUAL += ("model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm")


def find_norms(stack: Stack) -> list[str]:
    """Return the names of the vectors of norms, from the first layer on."""
    vectors = {each.name for each in stack.net.initializers if list(each.dims) == [HIDDEN]}
    return [name for node in stack.net.nodes for name in node.input if node.op_type == "Mul" and name in vectors]


def rename(stack: Stack, old: str, new: str) -> None:
    for tensor in stack.net.initializers:
        tensor.name = new if tensor.name == old else tensor.name
    for node in stack.net.nodes:
        node.input[:] = [new if name == old else name for name in node.input]


def with_norms(stack: Stack, names: Sequence[str] = USUAL) -> Stack:
    """Give norms these names; an empty one stays nameless."""
    for old, new in zip(find_norms(stack), names, strict=True):
        if new:
            rename(stack, old, f"{new}.weight")
    return stack


def find_node(stack: Stack, number: int, role: str) -> int:
    weight = stack.weights[number, role]
    return next(index for index, node in enumerate(stack.net.nodes) if weight in node.input)


def name_node(stack: Stack, number: int, role: str, module: str) -> Stack:
    stack.net.nodes[find_node(stack, number, role)].name = f"/model/layers/{module.replace('.', '/')}/MatMul"
    return stack


def write_adapter(folder: Path, stack: Stack, numbers: Sequence[int] = (0, 1), roles: Sequence[str] = ()) -> Path:
    rng = np.random.default_rng(3)
    pairs = [(number, role) for number in numbers for role in roles or stack.roles()]
    factors = {f"model.layers.{n}.{NAMES[role]}": dyadic_factors(rng, *SHAPES[role], RANK) for n, role in pairs}
    return write_peft(folder / "adapter", factors, alpha=float(RANK))


def assert_all_found(folder: Path, stack: Stack, roles: Sequence[str] = ()) -> None:
    base, adapter = write_model(folder / "base.onnx", stack.net.model()), write_adapter(folder, stack, roles=roles)
    found = loraformat.resolve_targets(base, adapter).targets
    assert {each.target: each.weight for each in found} == {
        f"model.layers.{number}.{NAMES[role]}": weight
        for (number, role), weight in stack.weights.items()
        if not roles or role in roles
    }
    rng, before = np.random.default_rng(3), stored_weights(base)
    loraformat.merge(base, [adapter], folder / "merged.onnx")
    wanted = dict(before)
    for number in (0, 1):
        for role in roles or stack.roles():
            change = product(dyadic_factors(rng, *SHAPES[role], RANK)).T.astype(np.float32)
            wanted[stack.weights[number, role]] = wanted[stack.weights[number, role]] + change
    for name, values in stored_weights(folder / "merged.onnx").items():
        np.testing.assert_array_equal(values, wanted[name], err_msg=name)


def refused(folder: Path, stack: Stack, numbers: Sequence[int] = (0, 1), roles: Sequence[str] = ATTENTION) -> set[str]:
    """Check that nothing at all is found, in no order in which targets come; return the codes."""
    base, adapter = write_model(folder / "base.onnx", stack.net.model()), write_adapter(folder, stack, numbers, roles)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], folder / "merged.onnx")
    assert not (folder / "merged.onnx").exists()
    by_anchors = [t for t in loraformat.resolve_targets(base, adapter).targets if t.strategy == "anchors"]
    assert not by_anchors
    return set(caught.value.codes)


@pytest.mark.parametrize("stack", [Stack(), Stack(gated=False), Stack(flags=frozenset({"swapped", "masked"}))])
def test_behind_a_norm_with_a_name(tmp_path: Path, stack: Stack) -> None:
    assert_all_found(tmp_path, with_norms(stack))


def test_what_resolve_says(tmp_path: Path) -> None:
    stack = with_norms(Stack())
    base = write_model(tmp_path / "base.onnx", stack.net.model())
    found = loraformat.resolve_targets(base, write_adapter(tmp_path, stack)).targets
    (key,) = (each for each in found if each.target == "model.layers.1.self_attn.k_proj")
    assert (key.strategy, key.evidence) == ("anchors", "key beside model.layers.1.input_layernorm")


def test_beside_one_that_has_a_name(tmp_path: Path) -> None:
    """The value's name tells of the queries, the keys and the output; nothing tells of the block."""
    stack = Stack()
    for number in (0, 1):
        name_node(stack, number, "value", f"{number}.self_attn.v_proj")
    assert_all_found(tmp_path, stack, ATTENTION)


def test_nothing_beside_a_block(tmp_path: Path) -> None:
    stack = name_node(Stack(), 0, "value", "0.self_attn.v_proj")
    assert refused(tmp_path, stack, roles=("gate",)) == {"LF401"}


def test_a_part_of_the_model_exported_alone(tmp_path: Path) -> None:
    assert_all_found(tmp_path, with_norms(Stack(), [name.removeprefix("model.") for name in USUAL]))


SHIFTED = ("model.ln_0", "model.layers.0.norm1", "model.layers.0.norm2", "model.layers.1.norm1")
"""Where a layer's last norm is what the next one begins with: flash-attention's fused blocks."""


def read_norm_twice(stack: Stack) -> Stack:
    """Let the sum behind the first attention take what the norm puts out, as models do that norm afterwards."""
    norm = next(node for node in stack.net.nodes if f"{USUAL[0]}.weight" in node.input)
    add = next(node for node in stack.net.nodes if node.op_type == "Add")
    add.input[list(add.input).index("x")] = norm.output[0]
    return stack


def share_norms(stack: Stack) -> Stack:
    """Let both layers read one tensor, as exporters store equal ones."""
    rename(stack, f"{USUAL[2]}.weight", "dropped.weight")
    for node in stack.net.nodes:
        node.input[:] = [f"{USUAL[0]}.weight" if name == "dropped.weight" else name for name in node.input]
    return stack


UNSOUND: dict[str, Callable[[], Stack]] = {
    "norms of the layer before": lambda: with_norms(Stack(), SHIFTED),
    "an attention without a name": lambda: with_norms(Stack(), ("", *USUAL[1:])),
    "norms in the other order": lambda: with_norms(
        Stack(), ("model.ln_0", "model.layers.1.norm1", "model.layers.0.norm2", "model.layers.1.norm2")
    ),
    "a norm that the sum reads": lambda: read_norm_twice(with_norms(Stack())),
    "one norm of two layers": lambda: share_norms(with_norms(Stack())),
    "another attention's norm": lambda: with_norms(Stack(), [n.replace("input", "encoder_attn") for n in USUAL]),
    "a scale that is missing": lambda: with_norms(Stack(scale=None)),
    "a Softmax over another axis": lambda: with_norms(Stack(axis=0)),
    "two layers behind an attention": lambda: with_norms(Stack(flags=frozenset({"outputs"}))),
    "no number": lambda: with_norms(Stack(), [name.replace("layers.", "layer_") for name in USUAL]),
}


@pytest.mark.parametrize("what", UNSOUND)
@pytest.mark.parametrize("numbers", [(0, 1), (0,)])
def test_nothing_is_told_by(tmp_path: Path, what: str, numbers: Sequence[int]) -> None:
    assert refused(tmp_path, UNSOUND[what](), numbers) == {"LF401"}


def test_two_attentions_of_one_layer(tmp_path: Path) -> None:
    stack = with_norms(Stack(), ("model.layers.0.norm1", "", "model.layers.0.norm2", ""))
    assert refused(tmp_path, stack, (0,)) <= {"LF401", "LF404"}


def test_a_block_that_is_not_understood_may_be_the_one_that_is_meant(tmp_path: Path) -> None:
    stack = with_norms(Stack(flags=frozenset({"two blocks"})))
    assert refused(tmp_path, stack, roles=("gate", "up", "down")) <= {"LF401", "LF404"}


def test_names_that_contradict_what_a_layer_does(tmp_path: Path) -> None:
    stack = name_node(with_norms(Stack()), 0, "key", "0.self_attn.q_proj")
    assert "LF450" in refused(tmp_path, stack, (0,), ("value", "output"))


def test_names_of_two_layers_beside_one_attention(tmp_path: Path) -> None:
    stack = name_node(name_node(Stack(), 0, "key", "0.self_attn.k_proj"), 0, "value", "1.self_attn.v_proj")
    assert "LF450" in refused(tmp_path, stack, (0,), ("query", "output"))


@pytest.mark.parametrize(
    ("name", "owner", "roles"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn", ("query",)),
        ("bert.encoder.layer.1.attention.output.dense", "bert.encoder.layer.1.attention", ("output",)),
        ("decoder.block.0.layer.1.EncDecAttention.k", "decoder.block.0.layer.1.EncDecAttention", ("key",)),
        ("decoder.block.0.layer.2.DenseReluDense.wo", "decoder.block.0.layer.2.DenseReluDense", ("down", "second")),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", None, ("output",)),
        ("model.layers.0.mlp.gate", None, None),
        ("lm_head", None, None),
    ],
)
def test_what_a_name_says(name: str, owner: str | None, roles: tuple[str, ...] | None) -> None:
    place = read_place(name)
    assert (place.roles if place is not None else None) == roles
    if place is not None:
        assert f"{place.owner}.{place.end}" == name
        assert owner in (None, place.owner)
