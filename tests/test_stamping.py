"""Adapters that are bound to their base: stamped, checked, and found again where the names are gone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from builders import write_peft, write_tensors
from graphs import (
    STYLES,
    Net,
    dyadic,
    dyadic_factors,
    linear_net,
    make_adapter,
    make_target,
    product,
    run,
    same_bits,
    stored_weights,
    write_model,
)
from loraformat import load, merge, plan_merge, save, stamp, validate
from loraformat.adapter import Adapter, SlotKind
from loraformat.errors import LoraformatError
from test_fingerprint import expected_samples

SHAPES = {"model.layers.0.self_attn.q_proj": (12, 20), "model.layers.0.mlp.down_proj": (20, 28), "lm_head": (36, 20)}
RANK = 3


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.fixture
def weights(rng: np.random.Generator) -> dict[str, Any]:
    return {name: dyadic(rng, *shape, reach=64) for name, shape in SHAPES.items()}


@pytest.fixture
def adapter(rng: np.random.Generator) -> Adapter:
    targets = (make_target(name, dyadic_factors(rng, *shape, RANK), scale=0.5) for name, shape in SHAPES.items())
    return make_adapter(*targets)


@pytest.fixture
def checkpoint(tmp_path: Path, weights: dict[str, Any]) -> Path:
    return write_tensors(tmp_path / "base.safetensors", {f"{name}.weight": array for name, array in weights.items()})


def codes(call: Any) -> set[str]:
    with pytest.raises(LoraformatError) as caught:
        call()
    return set(caught.value.codes)


def destroy_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every name of nodes and values replaced, and all metadata removed."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    graph = copy.graph
    values = [*(item.name for item in graph.input), *(item.name for item in graph.initializer)]
    values += [name for node in graph.node for name in node.output]
    fresh = {name: f"v{place}" for place, name in enumerate(dict.fromkeys(values))}
    for item in (*graph.input, *graph.output, *graph.initializer):
        item.name = fresh[item.name]
    for item in (*graph.input, *graph.output):
        for axis, size in enumerate(item.type.tensor_type.shape.dim):
            size.dim_param = f"{item.name}d{axis}"
    for place, node in enumerate(graph.node):
        node.name = f"n{place}"
        node.input[:] = [fresh[name] for name in node.input]
        node.output[:] = [fresh[name] for name in node.output]
        del node.metadata_props[:]
    onnx.checker.check_model(copy)
    return copy


def cast_weights(weights: dict[str, Any], form: Any) -> dict[str, Any]:
    return {name: array.astype(form) for name, array in weights.items()}


# --- stamping --------------------------------------------------------------------------------------------------------


def test_every_target_is_stamped(adapter: Adapter, checkpoint: Path, weights: dict[str, Any]) -> None:
    stamped = stamp(adapter, checkpoint)
    for target in stamped.targets:
        assert target.fingerprint is not None
        assert target.fingerprint.shape == weights[target.name].shape
        assert list(target.fingerprint.samples) == expected_samples(target.name, weights[target.name])
    assert [replace(target, fingerprint=None) for target in stamped.targets] == list(adapter.targets)


@pytest.mark.parametrize("style", STYLES)
def test_a_graph_gives_the_same_fingerprints(
    tmp_path: Path, adapter: Adapter, checkpoint: Path, weights: dict[str, Any], style: str
) -> None:
    """Whatever way round an exporter stores them."""
    graph = write_model(tmp_path / "base.onnx", linear_net(weights, style).model())
    assert stamp(adapter, graph) == stamp(adapter, checkpoint)


def test_an_embedding(tmp_path: Path, rng: np.random.Generator) -> None:
    """Stored (vocabulary, dim), fingerprinted as (dim, vocabulary)."""
    table = dyadic(rng, 30, 8, reach=64)
    base = write_tensors(tmp_path / "base.safetensors", {"embed_tokens.weight": table})
    target = make_target("embed_tokens", dyadic_factors(rng, 8, 30, RANK), SlotKind.EMBEDDING)
    (stamped,) = stamp(make_adapter(target), base).targets
    assert stamped.fingerprint is not None
    assert stamped.fingerprint.shape == (8, 30)
    assert list(stamped.fingerprint.samples) == expected_samples("embed_tokens", table.T)


def test_what_the_graph_multiplies_by_belongs_to_the_weight(tmp_path: Path, rng: np.random.Generator) -> None:
    """Gemm's alpha: the module's weight is the product, and so are its samples."""
    weight = dyadic(rng, 12, 20, reach=64)
    net = Net()
    x, y = net.feed("x"), net.result("y")
    net.op("Gemm", [x, net.weight("model.q.weight", weight * 4)], y, "Gemm_0", transB=1, alpha=0.25)
    base = write_model(tmp_path / "base.onnx", net.model())
    (target,) = stamp(make_adapter(make_target("model.q", dyadic_factors(rng, 12, 20, RANK))), base).targets
    assert target.fingerprint is not None
    assert list(target.fingerprint.samples) == expected_samples("model.q", weight)


def test_saved_and_loaded_again(tmp_path: Path, adapter: Adapter, checkpoint: Path) -> None:
    stamped = stamp(adapter, checkpoint)
    first = save(stamped, tmp_path / "one.safetensors")
    loaded = load(first)
    for ours, read in zip(stamped.targets, loaded.targets, strict=True):
        assert (read.name, read.fingerprint, read.scaling) == (ours.name, ours.fingerprint, ours.scaling)
        assert all(same_bits(read.factors[role].read(), ours.factors[role].read()) for role in ours.factors)
    second = save(loaded, tmp_path / "two.safetensors")
    assert first.read_bytes() == second.read_bytes()


def test_stamping_again_replaces(tmp_path: Path, adapter: Adapter, checkpoint: Path, weights: dict[str, Any]) -> None:
    other = write_tensors(tmp_path / "o.safetensors", {f"{name}.weight": -array for name, array in weights.items()})
    assert stamp(stamp(adapter, other), checkpoint) == stamp(adapter, checkpoint)


def test_positions_follow_the_targets_own_name(tmp_path: Path, rng: np.random.Generator) -> None:
    """With --strip-prefix too: a reader of the file does not know what was stripped."""
    weight = dyadic(rng, 12, 20, reach=64)
    base = write_tensors(tmp_path / "base.safetensors", {"q.weight": weight})
    adapter = make_adapter(make_target("block.7.q", dyadic_factors(rng, 12, 20, RANK)))
    (target,) = stamp(adapter, base, strip_prefix="block.7.").targets
    assert target.fingerprint is not None
    assert list(target.fingerprint.samples) == expected_samples("block.7.q", weight)


def test_what_cannot_be_stamped(tmp_path: Path, adapter: Adapter, weights: dict[str, Any]) -> None:
    lacking = write_tensors(tmp_path / "a.safetensors", {"other.weight": np.ones((2, 3), np.float32)})
    assert codes(lambda: stamp(adapter, lacking)) == {"LF401"}
    broken = {f"{name}.weight": array * np.float32(np.nan) for name, array in weights.items()}
    assert codes(lambda: stamp(adapter, write_tensors(tmp_path / "b.safetensors", broken))) == {"LF502"}
    silent = make_adapter(*(replace(target, scaling=replace(target.scaling, value=0.0)) for target in adapter.targets))
    assert codes(lambda: stamp(silent, lacking)) == {"LF208"}


def test_a_folder_is_stamped_from_its_path(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = write_peft(tmp_path / "s", {"q": dyadic_factors(rng, 12, 20, RANK)}, alpha=None)
    base = write_tensors(tmp_path / "base.safetensors", {"q.weight": dyadic(rng, 12, 20)})
    assert codes(lambda: stamp(folder, base)) == {"LF211"}
    assert stamp(folder, base, alpha=6).targets[0].scale == 2


# --- checking --------------------------------------------------------------------------------------------------------


def test_the_right_base(tmp_path: Path, adapter: Adapter, checkpoint: Path) -> None:
    path = save(stamp(adapter, checkpoint), tmp_path / "bound.safetensors")
    assert validate(path, base=checkpoint)[0].problems == ()
    merge(checkpoint, [path], tmp_path / "merged.safetensors")


def test_a_wrong_base(tmp_path: Path, adapter: Adapter, checkpoint: Path, weights: dict[str, Any]) -> None:
    """One weight of another model is enough, and it is named; the others are not."""
    name = "lm_head"
    mixed = {f"{each}.weight": array for each, array in weights.items()} | {
        f"{name}.weight": weights[name][::-1].copy()
    }
    other = write_tensors(tmp_path / "other.safetensors", mixed)
    stamped = stamp(adapter, checkpoint)
    path = save(stamped, tmp_path / "bound.safetensors")
    assert [(p.code, p.where) for p in validate(path, base=other)[0].problems] == [("LF406", name)]
    for call in (plan_merge, merge):
        with pytest.raises(LoraformatError) as caught:
            call(other, [stamped], tmp_path / "merged.safetensors")
        assert [(p.code, p.where) for p in caught.value.problems] == [("LF406", name)]
        assert "--ignore-fingerprints" in str(caught.value)
    assert not (tmp_path / "merged.safetensors").exists()


def test_a_wrong_base_on_demand(tmp_path: Path, adapter: Adapter, checkpoint: Path, weights: dict[str, Any]) -> None:
    negated = {f"{name}.weight": -array for name, array in weights.items()}
    other = write_tensors(tmp_path / "other.safetensors", negated)
    stamped = stamp(adapter, checkpoint)
    plan_merge(other, [stamped], tmp_path / "x.safetensors", ignore_fingerprints=True)
    merge(other, [stamped], tmp_path / "ignored.safetensors", ignore_fingerprints=True)
    merge(other, [adapter], tmp_path / "plain.safetensors")
    merged, plain = (read(tmp_path / f"{name}.safetensors") for name in ("ignored", "plain"))
    assert all(same_bits(merged[name], plain[name]) for name in negated)


def read(path: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(path))


# --- finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("form", [np.float32, np.float16])
def test_a_graph_without_names(
    tmp_path: Path, adapter: Adapter, checkpoint: Path, weights: dict[str, Any], style: str, form: Any
) -> None:
    """Stamped on the checkpoint, merged into a graph that lost every name: the same numbers as the named merge."""
    named = linear_net(cast_weights(weights, form), style).model()
    stamped = stamp(adapter, checkpoint)
    base = write_model(tmp_path / "named.onnx", named)
    lost = write_model(tmp_path / "lost.onnx", destroy_names(named))
    assert "LF401" in codes(lambda: plan_merge(lost, [adapter], tmp_path / "x.onnx")), "nothing but numbers can tell"
    merge(base, [adapter], tmp_path / "a.onnx")
    merge(lost, [stamped], tmp_path / "b.onnx")
    rng = np.random.default_rng(5)
    x = {name: np.asarray(rng.standard_normal((4, shape[1])), form) for name, shape in SHAPES.items()}
    expected = run(tmp_path / "a.onnx", {f"in.{name}": value for name, value in x.items()})
    found = run(tmp_path / "b.onnx", {f"v{place}": value for place, value in enumerate(x.values())})
    before = run(lost, {f"v{place}": value for place, value in enumerate(x.values())})
    for want, have, old in zip(expected, found, before, strict=True):
        assert same_bits(want, have)
        assert not same_bits(want, old)


def test_the_found_weight_is_the_right_one(
    tmp_path: Path, adapter: Adapter, checkpoint: Path, weights: dict[str, Any]
) -> None:
    """Against W + s·B·A in float64; dyadic numbers make the sums exact."""
    lost = write_model(tmp_path / "lost.onnx", destroy_names(linear_net(weights, "named").model()))
    merge(lost, [stamp(adapter, checkpoint)], tmp_path / "merged.onnx")
    merged = list(stored_weights(tmp_path / "merged.onnx").values())
    targets = {target.name: target for target in adapter.targets}
    for weight, (name, base) in zip(merged, weights.items(), strict=True):
        pair = tuple(factor.read() for factor in targets[name].factors.values())
        assert same_bits(weight, (base + product(pair, 0.5)).astype(np.float32))


def test_the_plan_says_how_it_was_found(
    tmp_path: Path, adapter: Adapter, checkpoint: Path, weights: dict[str, Any]
) -> None:
    lost = write_model(tmp_path / "lost.onnx", destroy_names(linear_net(weights, "named").model()))
    plan = plan_merge(lost, [stamp(adapter, checkpoint)], tmp_path / "x.onnx")
    assert {weight.evidence for weight in plan.weights} == {"fingerprint"}


def test_equal_weights_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    """Two tensors of the same numbers, as tied weights are exported: which one is meant cannot be told."""
    weight = dyadic(rng, 12, 20, reach=64)
    adapter = make_adapter(make_target("model.q", dyadic_factors(rng, 12, 20, RANK)))
    stamped = stamp(adapter, write_tensors(tmp_path / "base.safetensors", {"model.q.weight": weight}))
    twins = linear_net({"model.q": weight, "model.k": weight.copy()}, "named").model()
    lost = write_model(tmp_path / "twins.onnx", destroy_names(twins))
    assert codes(lambda: plan_merge(lost, [stamped], tmp_path / "x.onnx")) in ({"LF402"}, {"LF404"})


def test_one_tensor_of_two_modules_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = dyadic(rng, 12, 20, reach=64)
    adapter = make_adapter(make_target("model.q", dyadic_factors(rng, 12, 20, RANK)))
    stamped = stamp(adapter, write_tensors(tmp_path / "base.safetensors", {"model.q.weight": weight}))
    net = Net()
    shared = net.weight("w", weight.T)
    for place in range(2):
        net.op("MatMul", [net.feed(f"x{place}"), shared], net.result(f"y{place}"), f"n{place}")
    lost = write_model(tmp_path / "shared.onnx", net.model())
    assert codes(lambda: plan_merge(lost, [stamped], tmp_path / "x.onnx")) in ({"LF402"}, {"LF404"})


@pytest.mark.parametrize("distinct", [1, 7])
def test_a_constant_weight_is_not_found(tmp_path: Path, rng: np.random.Generator, distinct: int) -> None:
    """R-063: fewer than eight distinct samples single out nothing; the name, where there is one, still serves."""
    weight = (np.arange(12 * 20, dtype=np.float32) % distinct).reshape(12, 20)
    adapter = make_adapter(make_target("model.q", dyadic_factors(rng, 12, 20, RANK)))
    stamped = stamp(adapter, write_tensors(tmp_path / "base.safetensors", {"model.q.weight": weight}))
    net = linear_net({"model.q": weight}, "named").model()
    lost = write_model(tmp_path / "lost.onnx", destroy_names(net))
    assert codes(lambda: plan_merge(lost, [stamped], tmp_path / "x.onnx")) == {"LF401"}
    plan_merge(write_model(tmp_path / "named.onnx", net), [stamped], tmp_path / "y.onnx")


def test_a_foreign_graph_has_nothing_to_find(
    tmp_path: Path, adapter: Adapter, checkpoint: Path, rng: np.random.Generator
) -> None:
    foreign = {name: dyadic(rng, *shape, reach=64) for name, shape in SHAPES.items()}
    lost = write_model(tmp_path / "lost.onnx", destroy_names(linear_net(foreign, "named").model()))
    assert codes(lambda: plan_merge(lost, [stamp(adapter, checkpoint)], tmp_path / "x.onnx")) == {"LF401"}


def test_a_name_goes_before_numbers(tmp_path: Path, rng: np.random.Generator) -> None:
    """A target whose name is there is not looked for elsewhere: its weight must match, or nothing is merged."""
    mine, other = (dyadic(rng, 12, 20, reach=64) for _ in range(2))
    adapter = make_adapter(make_target("model.q", dyadic_factors(rng, 12, 20, RANK)))
    stamped = stamp(adapter, write_tensors(tmp_path / "base.safetensors", {"model.q.weight": mine}))
    swapped = write_model(tmp_path / "s.onnx", linear_net({"model.q": other, "model.k": mine}, "named").model())
    assert codes(lambda: plan_merge(swapped, [stamped], tmp_path / "x.onnx")) == {"LF406"}


def test_names_in_the_graph_are_really_gone(weights: dict[str, Any]) -> None:
    model = destroy_names(linear_net(weights, "dynamo").model())
    text = model.SerializeToString()
    assert not any(part.encode() in text for name in SHAPES for part in name.split(".") if len(part) > 2)
    assert all(numpy_helper.to_array(tensor).size for tensor in model.graph.initializer)
