"""Scaling: numbers of the manifest change, tensors do not. And the operators."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import loraformat
from algebra.adapters import deltas_of, distance, every_slot, factors, values, weighted
from builders import write_peft
from graphs import make_adapter, make_target
from loraformat.adapter import Adapter, ScalingRule
from loraformat.errors import LoraformatError
from loraformat.kinds import Nature


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(6)


@pytest.fixture
def adapter(rng: np.random.Generator) -> Adapter:
    rules = {"a.k": ScalingRule.ALPHA_OVER_SQRT_RANK, "a.q": ScalingRule.ALPHA_OVER_RANK, "b.q": ScalingRule.MULTIPLIER}
    targets = [make_target(name, factors(rng, 5, 4, 3), scale=6.0, rule=rule) for name, rule in rules.items()]
    return make_adapter(*targets, values("head", 0.5, weight=rng.standard_normal((3, 2)).astype(np.float32)))


def codes(call: object) -> tuple[str, ...]:
    with pytest.raises(LoraformatError) as caught:
        call()  # type: ignore[operator]
    return caught.value.codes


def test_only_numbers_of_the_manifest_change(adapter: Adapter) -> None:
    scaled = loraformat.scale(adapter, -0.5)
    assert [target.scaling.value for target in scaled.targets] == [-3.0, -3.0, -3.0, -0.25]
    assert [target.scaling.rule for target in scaled.targets] == [target.scaling.rule for target in adapter.targets]
    assert all(one.factors is other.factors for one, other in zip(scaled.targets, adapter.targets, strict=True))


def test_patterns_replace_the_factor_and_the_last_counts(adapter: Adapter) -> None:
    scaled = loraformat.scale(adapter, 2.0, {"a.*": 0.5, "*.q": 3.0})
    assert [target.scaling.value for target in scaled.targets] == [3.0, 18.0, 18.0, 1.0]


def test_the_tensors_of_the_file_are_the_same(rng: np.random.Generator, tmp_path: Path) -> None:
    write_peft(tmp_path / "style", {"q": factors(rng, 6, 4, 2)}, alpha=3)
    paths = [tmp_path / "one.safetensors", tmp_path / "half.safetensors"]
    for path, factor in zip(paths, (1.0, 0.5), strict=True):
        loraformat.save(loraformat.scale(tmp_path / "style", factor), path)
    one, half = (safetensors.numpy.load_file(path) for path in paths)
    assert {name: array.tobytes() for name, array in one.items()} == {
        name: array.tobytes() for name, array in half.items()
    }
    assert loraformat.load(paths[1]).targets[0].scale == 0.75


def test_refusals(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    assert codes(lambda: loraformat.scale(adapter, float("inf"))) == ("LF207",) * 4
    assert codes(lambda: loraformat.scale(adapter, 1e308)) == ("LF207",) * 3
    assert codes(lambda: loraformat.scale(adapter, 1.0, {"c.*": 2.0})) == ("LF706",)
    from loraformat.kinds.lora import Lora

    monkeypatch.setattr(Lora, "nature", Nature.FUNCTION_OF_BASE)
    assert codes(lambda: loraformat.scale(adapter, 2.0)) == ("LF702",) * 3
    assert codes(lambda: loraformat.compose([adapter, adapter])) == ("LF702",) * 3
    assert codes(lambda: loraformat.resize(adapter, 1)) == ("LF702",) * 3
    alone = loraformat.compose([adapter])
    assert alone.targets == adapter.targets


def test_operators_are_exact(rng: np.random.Generator) -> None:
    one, other, third = (every_slot(rng, rank, 0.7) for rank in (1, 2, 3))
    made = 0.5 * one - other * 2 + -third
    for name, delta in deltas_of(made).items():
        assert distance(delta, weighted((one, 0.5), (other, -2.0), (third, -1.0))[name]) < 1e-6
    assert (np.float32(0.5) * one).targets == (one * 0.5).targets == loraformat.scale(one, 0.5).targets
    assert (-one).targets == (one * -1).targets
    assert (one - one).targets[0].rank == 2


def test_operators_take_what_they_can_add(rng: np.random.Generator) -> None:
    one = every_slot(rng, 1, 0.7)
    for call in (lambda: one + 1, lambda: one - "a", lambda: one * "a", lambda: one * one):
        with pytest.raises(TypeError):
            call()  # type: ignore[operator]


def test_a_scaled_adapter_is_another_file(adapter: Adapter) -> None:
    known = replace(adapter, sha256="ab")
    assert loraformat.scale(known, 2.0).sha256 == ""
    assert loraformat.scale(known, 1.0).sha256 == "ab"
