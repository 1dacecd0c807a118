"""Additive kinds without factors A and B: what they do is taken from their own `delta`, tile by tile."""

from dataclasses import replace

import numpy as np
import pytest

import loraformat
from algebra.adapters import delta_of, distance, every_slot, factors, values, weighted
from graphs import make_adapter, make_target
from loraformat.adapter import Adapter, SlotKind, Target
from loraformat.errors import LoraformatError
from loraformat.kinds import KINDS, Change, Kind, Nature
from loraformat.kinds.lora import Lora
from loraformat.kinds.replace import Replace


class Opaque(Lora):
    """A kind that the algebra knows nothing of, although it does what a LoRA does."""

    name = "opaque"


@pytest.fixture(autouse=True)
def _opaque(monkeypatch: pytest.MonkeyPatch) -> None:
    known = KINDS.find

    def find(name: str) -> Kind | None:
        return Opaque() if name == "opaque" else known(name)

    monkeypatch.setattr(KINDS, "find", find)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(12)


def opaque(adapter: Adapter) -> Adapter:
    return replace(adapter, targets=tuple(replace(target, kind="opaque") for target in adapter.targets))


def codes(call: object) -> set[str]:
    with pytest.raises(LoraformatError) as caught:
        call()  # type: ignore[operator]
    return set(caught.value.codes)


def test_a_sum_needs_a_rank_to_be_cut_to(rng: np.random.Generator) -> None:
    one, other = opaque(every_slot(rng, 2, 0.7)), every_slot(rng, 3, 1.1)
    assert codes(lambda: one + other) == {"LF703"}
    made = loraformat.compose([(one, 0.5), (other, -2.0)], rank=5)
    assert {target.kind for target in made.targets} == {"lora"}
    for target in made.targets:
        assert distance(delta_of(target), weighted((one, 0.5), (other, -2.0))[target.name]) < 1e-5
        assert target.slot.value == target.name


def test_alone_it_is_scaled_exactly(rng: np.random.Generator) -> None:
    adapter = opaque(make_adapter(make_target("q", factors(rng, 5, 4, 2))))
    (target,) = (0.5 * adapter).targets
    assert (target.kind, target.scale, target.factors) == ("opaque", 0.5, adapter.targets[0].factors)
    made = loraformat.compose([(adapter, -2.0), make_adapter(make_target("v", factors(rng, 5, 4, 2)))])
    assert made.targets[0].scale == -2.0


def test_resized_it_becomes_a_lora(rng: np.random.Generator) -> None:
    adapter = opaque(every_slot(rng, 3, 0.7))
    made = loraformat.resize(adapter, max_error=1e-5)
    assert [(target.kind, target.rank) for target in made.targets] == [("lora", 3)] * 4
    for target, source in zip(made.targets, adapter.targets, strict=True):
        assert distance(delta_of(target), delta_of(source)) < 1e-5


def test_angle_and_difference(rng: np.random.Generator) -> None:
    one, other = every_slot(rng, 2, 0.7), every_slot(rng, 3, 1.1)
    made = loraformat.compose([opaque(one), opaque(other)], "slerp", rank=5)
    expected = loraformat.compose([one, other], "slerp")
    for found, wanted in zip(made.targets, expected.targets, strict=True):
        assert distance(delta_of(found), delta_of(wanted)) < 1e-5
    for found, wanted in zip(
        loraformat.diff(opaque(one), other).shared, loraformat.diff(one, other).shared, strict=True
    ):
        np.testing.assert_allclose([found.first, found.difference], [wanted.first, wanted.difference], rtol=1e-5)
        assert found.outputs is None


def test_what_a_lora_could_not_hold(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    target: Target = make_target("q", factors(rng, 5, 4, 2))
    monkeypatch.setattr(Opaque, "role_sets", (replace(Lora.role_sets[0], slots=(SlotKind.PARAMETER,)),))
    odd = make_adapter(replace(target, kind="opaque", slot=SlotKind.PARAMETER))
    assert codes(lambda: loraformat.resize(odd, 1)) == {"LF703"}
    assert codes(lambda: loraformat.compose([odd, odd], rank=1)) == {"LF703"}


def test_values_that_stand_for_parts_of_a_weight(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that indices name are no values to take the mean of."""

    class Rows(Replace):
        name = "opaque"

    known = KINDS.find
    monkeypatch.setattr(KINDS, "find", lambda name: Rows() if name == "opaque" else known(name))
    rows = make_adapter(replace(values("e", weight=rng.standard_normal((3, 4)).astype(np.float32)), kind="opaque"))
    assert codes(lambda: rows + rows) == {"LF703"}
    assert (0.5 * rows).targets[0].scale == 0.5
    assert [problem.code for problem in loraformat.diff(rows, rows).incomparable] == ["LF702"]


def test_differences_saved_as_a_whole_are_summed(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole(Replace):
        """The kind `diff`, as far as the algebra sees it."""

        name, nature = "diff", Nature.ADDITIVE

        def changes(self, target: Target) -> tuple[Change, ...]:
            return tuple(replace(change, nature=Nature.ADDITIVE) for change in super().changes(target))

    known = KINDS.find
    monkeypatch.setattr(KINDS, "find", lambda name: Whole() if name == "diff" else known(name))
    numbers = [rng.standard_normal((3, 4)).astype(np.float16) for _ in range(2)]
    bias = rng.standard_normal(3).astype(np.float32)
    first, second = values("n", 0.5, weight=numbers[0]), values("n", 2.0, weight=numbers[1], bias=bias)
    items = [(make_adapter(replace(target, kind="diff")), weight) for target, weight in ((first, 3.0), (second, -1.0))]
    for settings in ({}, {"rank": 1}):
        (made,) = loraformat.compose(items, **settings).targets
        found = {role: made.scale * factor.read().astype(float) for role, factor in made.factors.items()}
        np.testing.assert_allclose(found["weight"], 1.5 * numbers[0].astype(float) - 2.0 * numbers[1], rtol=1e-6)
        np.testing.assert_allclose(found["bias"], -2.0 * bias, rtol=1e-6)
    assert loraformat.resize(items[0][0], 1).targets == items[0][0].targets
