"""Comparing adapters and models: against dense matrices in float64."""

import itertools
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loraformat
from algebra.adapters import deltas_of, every_slot, factors, values
from builders import MemoryFactor, write_onnx, write_peft, write_tensors
from graphs import make_adapter, make_target
from loraformat.algebra import difference
from loraformat.errors import LoraformatError
from loraformat.kinds import Nature


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(9)


def test_norms_and_subspaces_of_every_slot(rng: np.random.Generator) -> None:
    one, other = every_slot(rng, 2, 0.7), every_slot(rng, 3, 1.1)
    found = loraformat.diff(one, other)
    assert [item.name for item in found.shared] == [target.name for target in one.targets]
    for item in found.shared:
        a, b = deltas_of(one)[item.name], deltas_of(other)[item.name]
        expected = [np.linalg.norm(matrix) for matrix in (a, b, b - a)]
        np.testing.assert_allclose([item.first, item.second, item.difference], expected, rtol=1e-9)
        assert item.relative == pytest.approx(expected[2] / expected[0])
        (u, _, v), (x, _, y) = np.linalg.svd(a), np.linalg.svd(b)
        assert item.outputs == pytest.approx(np.linalg.norm(u[:, :2].T @ x[:, :3]) ** 2 / 2)
        assert item.inputs == pytest.approx(np.linalg.norm(v[:2] @ y[:3].T) ** 2 / 2)
    assert found.relative == pytest.approx(
        np.hypot.reduce([item.difference for item in found.shared]) / np.hypot.reduce([i.first for i in found.shared])
    )


def test_one_effect_written_in_two_ways_is_no_difference(rng: np.random.Generator) -> None:
    down, up = factors(rng, 9, 7, 3)
    turn = np.diag([2.0, -4.0, 0.5]).astype(np.float32)
    one, other = (
        make_target("q", (down, up), scale=2.0),
        make_target("q", (turn @ down, up @ np.linalg.inv(turn)), scale=2.0),
    )
    found = loraformat.diff(make_adapter(one), make_adapter(other))
    assert found.is_same
    assert found.shared[0].outputs == pytest.approx(1.0)
    assert not loraformat.diff(
        make_adapter(one), make_adapter(replace(other, scaling=replace(other.scaling, value=2.0001)))
    ).is_same


def test_what_only_one_has_and_what_cannot_be_compared(rng: np.random.Generator) -> None:
    q, v = make_target("q", factors(rng, 5, 4, 2)), make_target("v", factors(rng, 5, 4, 2))
    found = loraformat.diff(
        make_adapter(q, v),
        make_adapter(make_target("q", factors(rng, 6, 4, 2)), make_target("w", factors(rng, 5, 4, 2))),
    )
    assert (found.shared, found.only_first, found.only_second) == ((), ("v",), ("w",))
    assert [problem.code for problem in found.incomparable] == ["LF704"]
    assert not found.is_same


def test_values_that_replace(rng: np.random.Generator) -> None:
    one, other = (rng.standard_normal((3, 4)).astype(np.float16) for _ in range(2))
    found = loraformat.diff(make_adapter(values("head", weight=one)), make_adapter(values("head", weight=other)))
    expected = [
        np.linalg.norm(matrix.astype(float)) for matrix in (one, other, other.astype(float) - one.astype(float))
    ]
    item = found.shared[0]
    np.testing.assert_allclose([item.first, item.second, item.difference], expected)
    assert item.outputs is None


def test_kinds_that_depend_on_the_base(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraformat.kinds.lora import Lora

    monkeypatch.setattr(Lora, "nature", Nature.FUNCTION_OF_BASE)
    adapter = make_adapter(make_target("q", factors(rng, 5, 4, 2)))
    assert [problem.code for problem in loraformat.diff(adapter, adapter).incomparable] == ["LF702"]


def test_nothing_against_something(rng: np.random.Generator) -> None:
    q = make_target("q", factors(rng, 5, 4, 2))
    found = loraformat.diff(0.0 * make_adapter(q), make_adapter(q))
    assert (found.shared[0].relative, found.shared[0].outputs) == (np.inf, None)
    assert loraformat.diff(0.0 * make_adapter(q), 0.0 * make_adapter(q)).is_same


def test_biases_are_compared_too(rng: np.random.Generator) -> None:
    plain = make_target("q", factors(rng, 6, 4, 2), scale=0.5)
    bias = rng.standard_normal(6).astype(np.float32)
    biased = replace(plain, factors=dict(plain.factors) | {"lora_B.bias": MemoryFactor("b", bias)})
    for pair, norms in (((plain, biased), (0, 0.5)), ((biased, plain), (0.5, 0)), ((biased, biased), (0.5, 0.5))):
        weight, beside = loraformat.diff(*map(make_adapter, pair)).shared
        assert (weight.name, weight.difference, beside.name) == ("q", 0.0, "q.bias")
        np.testing.assert_allclose([beside.first, beside.second], np.linalg.norm(bias) * np.array(norms), rtol=1e-6)
        assert beside.difference == pytest.approx(abs(norms[0] - norms[1]) * np.linalg.norm(bias), rel=1e-6)


# --- models ----------------------------------------------------------------------------------------------------------


def test_two_models_piece_by_piece(rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference, "TILE_BYTES", 8 * 11)
    a = {
        "q.weight": rng.standard_normal((7, 5)).astype(np.float32),
        "k.weight": np.arange(12, dtype=np.int64).reshape(3, 4),
        "none": np.zeros((0, 4), np.float32),
    }
    b = {
        "q.weight": a["q.weight"].astype(ml_dtypes.bfloat16),
        "k.weight": a["k.weight"],
        "none": a["none"],
        "v.weight": np.ones((2, 2), np.float32),
    }
    paths = [write_tensors(tmp_path / f"{name}.safetensors", arrays) for name, arrays in (("a", a), ("b", b))]
    found = loraformat.diff(*paths)
    assert (found.kind, found.only_first, found.only_second) == ("base", (), ("v.weight",))
    k, none, q = found.shared
    assert (none.first, none.second, none.difference) == (0.0, 0.0, 0.0)
    assert (k.difference, k.first) == (0.0, pytest.approx(np.linalg.norm(np.arange(12.0))))
    expected = np.linalg.norm(b["q.weight"].astype(float) - a["q.weight"].astype(float))
    assert q.difference == pytest.approx(expected, rel=1e-9)
    assert 0 < q.relative < 0.01
    assert loraformat.diff(paths[0], paths[0]).is_same


def test_a_merge_shows_as_its_delta(rng: np.random.Generator, tmp_path: Path) -> None:
    base = write_onnx(tmp_path / "base.onnx", {"q": rng.standard_normal((6, 4)).astype(np.float32)})
    adapter = loraformat.load(write_peft(tmp_path / "style", {"q": factors(rng, 6, 4, 2)}, alpha=2))
    merged = loraformat.merge(base, [adapter]).output
    (item,) = loraformat.diff(base, merged).shared
    assert item.difference == pytest.approx(np.linalg.norm(deltas_of(adapter)["q"]), rel=1e-5)


def test_models_that_cannot_be_compared(rng: np.random.Generator, tmp_path: Path) -> None:
    a = write_tensors(tmp_path / "a.safetensors", {"q.weight": np.ones((7, 5), np.float32)})
    b = write_tensors(tmp_path / "b.safetensors", {"q.weight": np.ones((5, 7), np.float32)})
    assert [problem.code for problem in loraformat.diff(a, b).incomparable] == ["LF704"]
    c = write_tensors(tmp_path / "c.safetensors", {"k.weight": np.ones((5, 7), np.float32)})
    style = write_peft(tmp_path / "style", {"q": factors(rng, 7, 5, 2)})
    for pair in ((a, c), (a, style), (style, a)):
        with pytest.raises(LoraformatError) as caught:
            loraformat.diff(*pair)
        assert caught.value.codes == ("LF707",)


def test_numbers_that_are_none_and_squares_that_no_float64_holds(tmp_path: Path) -> None:
    arrays = {"nan": [1.0, np.nan], "infinite": [np.inf, 2.0], "large": [1e300, 3.0], "plain": [1.0, 2.0]}
    signal = np.array([0x7F800001, 0], np.uint32).view(np.float32)
    paths = {
        name: write_tensors(tmp_path / f"{name}.safetensors", {"w": np.array(values)})
        for name, values in arrays.items()
    }
    paths["signal"] = write_tensors(tmp_path / "signal.safetensors", {"w": signal})
    for one, other in itertools.product(paths, paths):
        found = loraformat.diff(paths[one], paths[other])
        assert found.is_same == (one == other)
        assert found.relative == 0.0 if one == other else found.relative > 0.0
    assert loraformat.diff(paths["plain"], paths["large"]).shared[0].difference == 1e300
