"""Roles in an encoder and a decoder without names: in one graph, and in a folder with a graph for each."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

import loraformat
from builders import write_peft
from graphs import Array, Net, dyadic_factors, product, stored_weights, write_model
from stacks import HEAD, NAMES, RANK, SHAPES, Stack


class Sides(Stack):
    """An encoder of one layer and a decoder of two that attends to it; `alone` leaves one of them out.

    Without an encoder the decoder is given its states; with `cached` also what its keys and values would be.
    """

    alone: str = ""

    def __init__(self, *flags: str, alone: str = "", seed: int = 5) -> None:
        self.alone, self.seed = alone, seed
        super().__init__(flags=frozenset(flags), scale=None if "bare" in flags else HEAD**-0.5)

    def __post_init__(self) -> None:
        self.rng, self.count, self.number = np.random.default_rng(self.seed), 0, 0
        self.net, self.weights, self.prefix = Net(), {}, "encoder."
        states = self.net.feed("x")
        if self.alone != "decoder":
            attended = self.attend(states)
            states = self.norm(self.block(attended, attended))
        self.prefix = "decoder."
        y = self.net.feed("y") if self.alone != "encoder" else states
        for number in (0, 1) if self.alone != "encoder" else ():
            self.number = number
            y = self.cross(self.attend(y), states)
            y = self.block(y, y)
        self.net.op("Identity", [y], self.net.result("z"), "last")

    def linear(self, x: str, role: str, shape: tuple[int, int] | None = None) -> str:
        made = super().linear(x, role, shape or SHAPES[role.removeprefix("cross ")])
        self.weights[self.prefix, self.number, role] = self.weights.pop((self.number, role))  # type: ignore[index]
        return made

    def cross(self, x: str, states: str) -> str:
        q = self.linear(self.norm(x), "cross query")
        if "cached" in self.flags:
            k, v = self.net.feed(f"past_k{self.number}"), self.net.feed(f"past_v{self.number}")
        else:
            source = self.op("Relu", states) if "moved" in self.flags and self.number else states
            k, v = self.linear(source, "cross key"), self.linear(source, "cross value")
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[1, 0]))
        if self.scale is not None:
            scores = self.op("Mul", scores, self.constant(self.scale))
        return self.op("Add", x, self.linear(self.op("MatMul", self.op("Softmax", scores), v), "cross output"))


def name_target(prefix: str, number: int, role: str) -> str:
    own = NAMES[role.removeprefix("cross ")]
    return f"model.{prefix}layers.{number}.{own.replace('self_attn', 'encoder_attn') if 'cross' in role else own}"


def write_adapter(folder: Path, weights: Any, *, only: str = "") -> tuple[Path, dict[str, Array]]:
    """Write an adapter of every layer; return it with what it adds, by targets."""
    rng = np.random.default_rng(8)
    names = {key: name_target(*key) for key in weights}
    factors = {
        name: dyadic_factors(rng, *SHAPES[key[2].removeprefix("cross ")], RANK)
        for key, name in names.items()
        if only in name
    }
    adapter = write_peft(folder / "adapter", factors, alpha=float(RANK))
    return adapter, {name: product(pair) for name, pair in factors.items()}


def check(base: Path, merged: Path, weights: Any, deltas: dict[str, Array]) -> None:
    before, after = stored_weights(base), stored_weights(merged)
    targets = {stored: name_target(*key) for key, stored in weights.items()}
    for name, old in before.items():
        delta = deltas.get(targets.get(name, ""))
        wanted = old if delta is None else old + delta.T.astype(np.float32)
        np.testing.assert_array_equal(after[name], wanted, err_msg=targets.get(name, name))


@pytest.mark.parametrize("only", ["", "model.encoder.", "model.decoder."])
def test_one_graph(tmp_path: Path, only: str) -> None:
    sides = Sides()
    base = write_model(tmp_path / "base.onnx", sides.net.model())
    adapter, deltas = write_adapter(tmp_path, sides.weights, only=only)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", resolve="structure")
    check(base, tmp_path / "merged.onnx", sides.weights, deltas)


def codes(base: Path, adapter: Path) -> dict[str, str]:
    found = loraformat.resolve_targets(base, adapter, resolve="structure")
    return {problem.code: problem.found for problem in found.problems}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("moved", "does not read what a norm puts out"),
        ("bare", "multiplies its scores by 1"),
        ("two blocks", "0 blocks"),
    ],
)
def test_what_is_not_surely_so_tells_nothing(tmp_path: Path, flag: str, words: str) -> None:
    whole, sides = Sides(), Sides(flag)
    base = write_model(tmp_path / "base.onnx", sides.net.model())
    found = codes(base, write_adapter(tmp_path, whole.weights)[0])
    assert set(found) == {"LF425", "LF401"}
    assert words in found["LF425"]


def test_an_encoder_without_its_last_layer(tmp_path: Path) -> None:
    sides = Sides()
    base = write_model(tmp_path / "base.onnx", sides.net.model())
    adapter, _ = write_adapter(tmp_path, {k: v for k, v in sides.weights.items() if k[:2] != ("decoder.", 1)})
    assert "2 layers of the decoder in the graph" in codes(base, adapter)["LF425"]


def test_one_stack_may_be_either_half(tmp_path: Path) -> None:
    """Without a target of a cross-attention nothing says that the model's decoder has one."""
    encoder, whole = Sides(alone="encoder"), Sides()
    base = write_model(tmp_path / "base.onnx", encoder.net.model())
    weights = {key: name for key, name in whole.weights.items() if "cross" not in key[2]}
    assert "whether it is that decoder, nothing tells" in codes(base, write_adapter(tmp_path, weights)[0])["LF425"]


def test_a_folder(tmp_path: Path) -> None:
    encoder, decoder = Sides(alone="encoder"), Sides(alone="decoder")
    (tmp_path / "base").mkdir()
    for name, sides in (("a", encoder), ("b", decoder)):
        write_model(tmp_path / "base" / f"{name}.onnx", sides.net.model())
    weights = encoder.weights | decoder.weights
    adapter, deltas = write_adapter(tmp_path, weights)
    loraformat.merge(tmp_path / "base", [adapter], tmp_path / "out", resolve="structure")
    for name, sides in (("a", encoder), ("b", decoder)):
        check(tmp_path / "base" / f"{name}.onnx", tmp_path / "out" / f"{name}.onnx", sides.weights, deltas)
    assert loraformat.verify(tmp_path / "out", tmp_path / "base", [adapter], resolve="structure").holds


def test_a_decoder_with_a_cache_lacks_keys(tmp_path: Path) -> None:
    whole, cached = Sides(alone="decoder"), Sides("cached", alone="decoder")
    base = write_model(tmp_path / "c.onnx", cached.net.model())
    adapter, _ = write_adapter(tmp_path, whole.weights)
    found = loraformat.resolve_targets(base, adapter, resolve="structure")
    lacking = {target for target in map(name_target, *zip(*whole.weights, strict=True)) if "encoder_attn" in target}
    lacking = {target for target in lacking if target.endswith(("k_proj", "v_proj"))}
    assert {t.target: t.weight for t in found.targets} == {
        name_target(*key): name for key, name in cached.weights.items()
    }
    assert {problem.where for problem in found.problems if problem.code == "LF401"} == lacking


def test_two_towers_of_equal_layers(tmp_path: Path) -> None:
    """Their numbers differ: which of them is meant, nothing tells."""
    (tmp_path / "base").mkdir()
    for name, seed in (("text", 5), ("image", 6)):
        write_model(tmp_path / "base" / f"{name}.onnx", Sides(alone="encoder", seed=seed).net.model())
    adapter, _ = write_adapter(tmp_path, Sides(alone="encoder").weights)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(tmp_path / "base", [adapter], tmp_path / "out", resolve="structure")
    assert set(caught.value.codes) == {"LF640"}


def test_branches_of_an_if(tmp_path: Path) -> None:
    """Both have the layers and read the same tensors, which are changed once."""
    sides = Sides(alone="decoder")
    model = sides.net.model()
    inner = model.graph
    branches = []
    for branch in ("t", "e"):
        kept = {tensor.name for tensor in inner.initializer} | {entry.name for entry in inner.input}
        nodes = [helper.make_node("Identity", [], []) for _ in inner.node]
        for node, old in zip(nodes, inner.node, strict=True):
            node.CopyFrom(old)
            for names in (node.input, node.output):
                names[:] = [name if name in kept else f"{branch}{name}" for name in names]
        out = helper.make_tensor_value_info(f"{branch}z", 1, None)
        branches.append(helper.make_graph(nodes, branch, [], [out]))
    node = helper.make_node("If", ["which"], ["z"], then_branch=branches[0], else_branch=branches[1])
    del inner.node[:]
    inner.node.append(node)
    inner.input.append(helper.make_tensor_value_info("which", 9, []))
    base = write_model(tmp_path / "base.onnx", model)
    adapter, deltas = write_adapter(tmp_path, sides.weights)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", resolve="structure")
    check(base, tmp_path / "merged.onnx", sides.weights, deltas)
