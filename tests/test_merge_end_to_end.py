"""Whole models: what the merged one computes, against a graph with the adapter's branches beside its weights.

The reference graph is built from the same builder with `x·Aᵀ·Bᵀ·s` added at every target; it owes nothing to the code
under test. numpy computes the same once more for the exporters' styles.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

import loraformat
from builders import Factors, lora_factors, write_peft, write_tensors
from graphs import STYLES, Array, Net, dynamo_scopes, run, stored_weights, torchscript_name, write_model
from loraformat.loading import open_base

VOCABULARY, HIDDEN, WIDE, CLASSES, RANK = 23, 8, 20, 3, 2
SCALE = 1.5
EMBEDDING, HEAD = "model.embed_tokens", "model.classifier"
LAYERS = ("model.layers.0", "model.layers.1")
SHAPES = {
    f"{layer}.mlp.{name}": shape
    for layer in LAYERS
    for name, shape in (("up", (WIDE, HIDDEN)), ("down", (HIDDEN, WIDE)))
}


def make_weights(seed: int = 0) -> dict[str, Array]:
    """Return `(out, in)` by module; the table is `(vocabulary, dim)`."""
    rng = np.random.default_rng(seed)
    shapes = {EMBEDDING: (VOCABULARY, HIDDEN), HEAD: (CLASSES, HIDDEN)} | SHAPES
    return {name: (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32) for name, shape in shapes.items()}


def make_factors(seed: int = 1, size: float = 0.3) -> dict[str, Factors]:
    rng = np.random.default_rng(seed)
    shapes = {HEAD: (CLASSES, HIDDEN)} | SHAPES
    made = {}
    for name, (out, inner) in shapes.items():
        down, up = lora_factors(rng, out, inner, RANK)
        made[name] = down * np.float32(size), up * np.float32(size)
    return made


def table_factors(seed: int = 2) -> Factors:
    """Return A `(rank, vocabulary)` and B `(dim, rank)`."""
    return lora_factors(np.random.default_rng(seed), HIDDEN, VOCABULARY, RANK)


@dataclass
class Decoder:
    """The nodes of one model; with `branches`, the adapter stands beside its weights."""

    style: str
    weights: Mapping[str, Array]
    branches: Mapping[str, Factors] = field(default_factory=dict)
    table: Factors | None = None
    form: Any = np.float32
    net: Net = field(default_factory=Net)

    def build(self) -> onnx.ModelProto:
        net = self.net
        x = self.lookup(net.feed("ids", TensorProto.INT64, 2))
        for layer in LAYERS:
            wide = self.linear(f"{layer}.mlp.up", x)
            hidden = net.op("Relu", [wide], f"{wide}_r")
            x = net.op("Add", [x, self.linear(f"{layer}.mlp.down", hidden)], f"{layer}_sum")
        first = net.op("ReduceMean", [x, net.weight("axes", np.array([1]))], "pooled", keepdims=0)
        y = self.head(first)
        net.op("Identity", [y], net.result("logits"))
        return net.model()

    def stored(self, name: str, array: Array) -> str:
        """Store a weight in the number form of the model and return it as float32."""
        if self.form == np.float32:
            return self.net.weight(name, array)
        stored = self.net.weight(name, array.astype(self.form))
        return self.net.op("Cast", [stored], f"{name}_wide", to=TensorProto.FLOAT)

    def notes(self, module: str) -> dict[str, str]:
        return dynamo_scopes(module) if self.style.startswith("dynamo") else {}

    def node(self, module: str, op: str) -> str:
        return torchscript_name(module, op) if self.style.startswith("torchscript") else f"node_{len(self.net.nodes)}"

    def lookup(self, ids: str) -> str:
        table = self.stored(f"{EMBEDDING}.weight", self.weights[EMBEDDING])
        y = self.net.op("Gather", [table, ids], "embedded", self.node(EMBEDDING, "Gather"), self.notes(EMBEDDING))
        if self.table is None:
            return y
        down, up = self.table
        rows = self.net.op("Gather", [self.net.weight("table_A", down.T), ids], "rows")
        return self.add_branch("table", y, rows, up)

    def linear(self, module: str, x: str) -> str:
        """Apply a Linear to a 3-d input, where exporters fold or leave a Transpose."""
        net, weight, stem = self.net, self.weights[module], f"y_{module}"
        if self.style.endswith("unfolded") or self.style == "named":
            real = self.stored(f"{module}.weight", weight)
            node = self.node(module, "Transpose")
            turned = net.op("Transpose", [real], f"{stem}_t", node, self.notes(module), perm=[1, 0])
        else:
            anonymous = f"onnx::MatMul_{len(net.nodes)}" if self.style == "torchscript" else f"val_{len(net.nodes)}"
            turned = self.stored(anonymous, weight.T)
        y = net.op("MatMul", [x, turned], stem, self.node(module, "MatMul"), self.notes(module))
        bias = net.weight(f"{module}.bias", np.linspace(-0.1, 0.1, len(weight), dtype=np.float32))
        y = net.op("Add", [bias, y], f"{stem}_b", self.node(module, "Add"), self.notes(module))
        return self.branch(module, x, y)

    def head(self, x: str) -> str:
        """Apply a Linear to a 2-d input: a Gemm of the weight as torch has it."""
        weight = self.stored(f"{HEAD}.weight", self.weights[HEAD])
        y = self.net.op("Gemm", [x, weight], "y_head", self.node(HEAD, "Gemm"), self.notes(HEAD), transB=1)
        return self.branch(HEAD, x, y)

    def branch(self, module: str, x: str, y: str) -> str:
        if module not in self.branches:
            return y
        down, up = self.branches[module]
        low = self.net.op("MatMul", [x, self.net.weight(f"{module}_A", down.T)], f"{module}_low")
        return self.add_branch(module, y, low, up)

    def add_branch(self, name: str, y: str, low: str, up: Array) -> str:
        scaled = np.ascontiguousarray(up.T) * np.float32(SCALE)
        high = self.net.op("MatMul", [low, self.net.weight(f"{name}_B", scaled)], f"{name}_high")
        return self.net.op("Add", [y, high], f"{name}_adapted")


IDS = {"ids": np.array([[0, 5, 22, 5, 7], [1, 1, 2, 3, 21]], np.int64)}


def write_adapter(folder: Path, factors: Mapping[str, Factors], table: Factors | None = None, **more: Any) -> Path:
    """Write a PEFT folder, its table's factors among the others."""
    write_peft(folder, factors, alpha=SCALE * RANK, **more)
    if table is not None:
        arrays = {}
        for target, (down, up) in factors.items():
            arrays[f"base_model.model.{target}.lora_A.weight"] = down
            arrays[f"base_model.model.{target}.lora_B.weight"] = up
        arrays[f"base_model.model.{EMBEDDING}.lora_embedding_A"] = table[0]
        arrays[f"base_model.model.{EMBEDDING}.lora_embedding_B"] = table[1]
        write_tensors(folder / "adapter_model.safetensors", arrays)
    return folder


@pytest.mark.parametrize("files", ["", "one", "many"])
@pytest.mark.parametrize("style", STYLES)
def test_the_merged_model_computes_what_the_adapter_does(tmp_path: Path, style: str, files: str) -> None:
    weights, factors, table = make_weights(), make_factors(), table_factors()
    base = write_model(tmp_path / "base.onnx", Decoder(style, weights).build(), files)
    adapter = write_adapter(tmp_path / "style", factors, table)
    receipt = loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    (found,) = run(tmp_path / "merged.onnx", IDS)
    (expected,) = run(Decoder(style, weights, factors, table).build(), IDS)
    (before,) = run(base, IDS)
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found, forward(weights, factors, table), rtol=1e-4, atol=1e-5)
    assert sorted(t for w in receipt.weights for t in w.targets) == sorted([*factors, EMBEDDING])
    assert receipt.problems == ()
    onnx.checker.check_model(str(tmp_path / "merged.onnx"), full_check=True)


def forward(weights: Mapping[str, Array], factors: Mapping[str, Factors], table: Factors | None) -> Array:
    """Compute the model with merged weights in float64."""
    merged = {name: weight.astype(np.float64) for name, weight in weights.items()}
    for name, (down, up) in factors.items():
        merged[name] = merged[name] + SCALE * up.astype(np.float64) @ down
    if table is not None:
        merged[EMBEDDING] = merged[EMBEDDING] + SCALE * (table[1].astype(np.float64) @ table[0]).T
    x = merged[EMBEDDING][IDS["ids"]]
    for layer in LAYERS:
        up, down = merged[f"{layer}.mlp.up"], merged[f"{layer}.mlp.down"]
        wide = np.maximum(x @ up.T + np.linspace(-0.1, 0.1, WIDE, dtype=np.float32), 0)
        x = x + wide @ down.T + np.linspace(-0.1, 0.1, HIDDEN, dtype=np.float32)
    return np.asarray(x.mean(axis=1) @ merged[HEAD].T)


@pytest.mark.parametrize(("form", "tolerance"), [(np.float16, 2e-3), (ml_dtypes.bfloat16, 2e-2), (np.float64, 1e-5)])
@pytest.mark.parametrize("style", ["torchscript-unfolded", "dynamo"])
def test_models_of_other_number_forms(tmp_path: Path, style: str, form: Any, tolerance: float) -> None:
    weights, factors = make_weights(), make_factors()
    base = write_model(tmp_path / "base.onnx", Decoder(style, weights, form=form).build())
    adapter = write_adapter(tmp_path / "style", factors)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    (found,) = run(tmp_path / "merged.onnx", IDS)
    (expected,) = run(Decoder(style, weights, factors, form=form).build(), IDS)
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < tolerance * scale
    assert np.abs(run(base, IDS)[0] - expected).max() > 10 * tolerance * scale


@pytest.mark.parametrize("style", STYLES)
def test_the_same_model_exported_below_a_wrapper(tmp_path: Path, style: str) -> None:
    """The adapter knows no `model.`; the export does."""
    weights, factors = make_weights(), make_factors()
    base = write_model(tmp_path / "base.onnx", Decoder(style, weights).build())
    bare = {name.removeprefix("model."): pair for name, pair in factors.items()}
    adapter = write_adapter(tmp_path / "style", bare)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    np.testing.assert_allclose(
        run(tmp_path / "merged.onnx", IDS)[0], forward(weights, factors, None), rtol=1e-4, atol=1e-5
    )


def test_weighted_adapters_add_up(tmp_path: Path) -> None:
    weights = make_weights()
    base = write_model(tmp_path / "base.onnx", Decoder("dynamo", weights).build())
    several = [make_factors(seed) for seed in (3, 4, 5)]
    mix = (0.5, -0.25, 1.0)
    adapters = [
        (write_adapter(tmp_path / f"a{i}", f), weight) for i, (f, weight) in enumerate(zip(several, mix, strict=True))
    ]
    loraformat.merge(base, adapters, tmp_path / "merged.onnx")
    stacked = {
        name: (
            np.concatenate([factors[name][0] for factors in several]),
            np.concatenate([np.float32(weight) * f[name][1] for f, weight in zip(several, mix, strict=True)], axis=1),
        )
        for name in several[0]
    }
    expected = forward(weights, stacked, None)
    np.testing.assert_allclose(run(tmp_path / "merged.onnx", IDS)[0], expected, rtol=1e-4, atol=1e-5)


def test_taking_the_adapter_out_again_gives_the_base(tmp_path: Path) -> None:
    weights = make_weights()
    base = write_model(tmp_path / "base.onnx", Decoder("torchscript", weights).build())
    adapter = write_adapter(tmp_path / "style", make_factors())
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    loraformat.merge(tmp_path / "merged.onnx", [(adapter, -1.0)], tmp_path / "back.onnx")
    np.testing.assert_allclose(run(tmp_path / "back.onnx", IDS)[0], run(base, IDS)[0], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_and_an_export_of_it_take_the_same_numbers(tmp_path: Path) -> None:
    """The same weights and adapter through both bases: equal to the bit, transposed or not."""
    weights, factors, table = make_weights(), make_factors(), table_factors()
    export = write_model(tmp_path / "base.onnx", Decoder("dynamo-unfolded", weights).build())
    state = write_tensors(tmp_path / "base.safetensors", {f"{name}.weight": array for name, array in weights.items()})
    adapter = write_adapter(tmp_path / "style", factors, table)
    loraformat.merge(export, [adapter], tmp_path / "merged.onnx")
    loraformat.merge(state, [adapter], tmp_path / "merged.safetensors")
    graph = stored_weights(tmp_path / "merged.onnx")
    for tensor in open_base(tmp_path / "merged.safetensors").list_tensors():
        assert tensor.read().tobytes() == graph[tensor.name].tobytes(), tensor.name
        assert tensor.read().tobytes() != weights[tensor.name.removesuffix(".weight")].tobytes()


def test_one_target_that_is_missing_stops_everything(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.onnx", Decoder("torchscript", make_weights()).build())
    factors = make_factors() | {"model.layers.2.mlp.up": make_factors()["model.layers.1.mlp.up"]}
    adapter = write_adapter(tmp_path / "style", factors)
    with pytest.raises(loraformat.FindingError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert caught.value.codes == ("LF401",)
    assert "model.layers.1.mlp.up" in caught.value.problems[0].found
    assert not (tmp_path / "merged.onnx").exists()
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", allow_unmatched=["model.layers.2.*"])
    np.testing.assert_allclose(
        run(tmp_path / "merged.onnx", IDS)[0], forward(make_weights(), make_factors(), None), rtol=1e-4, atol=1e-5
    )


def test_adapters_in_the_own_format_merge_to_the_same_bytes(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.onnx", Decoder("torchscript", make_weights()).build())
    adapter = write_adapter(tmp_path / "style", make_factors(), table_factors())
    own = loraformat.save(loraformat.load(adapter), tmp_path / "style.safetensors")
    loraformat.merge(base, [adapter], tmp_path / "one.onnx")
    loraformat.merge(base, [own], tmp_path / "other.onnx")
    one, other = stored_weights(tmp_path / "one.onnx"), stored_weights(tmp_path / "other.onnx")
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
