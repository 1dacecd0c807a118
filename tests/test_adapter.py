"""The records of an adapter."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from builders import MemoryFactor
from loraformat.adapter import Adapter, BaseBinding, Scaling, ScalingRule, SlotKind, Target


def make_target(name: str = "m.q", rank: int = 4, scaling: Scaling | None = None) -> Target:
    factors = {
        "lora_A.weight": MemoryFactor("A", np.ones((4, 6), np.float32)),
        "lora_B.weight": MemoryFactor("B", np.ones((5, 4), np.float32)),
    }
    return Target(name, "lora", SlotKind.LINEAR, factors, rank, scaling or Scaling(ScalingRule.ALPHA_OVER_RANK, 16.0))


@pytest.mark.parametrize(
    ("rule", "value", "rank", "effective"),
    [
        ("alpha/rank", 16.0, 8, 2.0),
        ("alpha/rank", -3.0, 2, -1.5),
        ("alpha/rank", 0.0, 2, 0.0),
        ("alpha/sqrt(rank)", 16.0, 64, 2.0),
        ("alpha/sqrt(rank)", 1.0, 2, 1 / math.sqrt(2)),
        ("multiplier", 0.3, 8, 0.3),
    ],
)
def test_the_effective_scale(rule: str, value: float, rank: int, effective: float) -> None:
    scaling = Scaling(ScalingRule(rule), value)
    assert scaling.effective(rank) == effective
    assert make_target(rank=rank, scaling=scaling).scale == effective


@pytest.mark.parametrize("rule", ScalingRule)
def test_a_kind_without_a_rank_has_the_number_itself(rule: ScalingRule) -> None:
    """A division by zero would be an error of ours."""
    assert make_target(rank=0, scaling=Scaling(rule, 3.0)).scale == 3.0


def test_trained_numbers_are_counted() -> None:
    assert make_target().parameters == 4 * 6 + 5 * 4
    assert Adapter((make_target("a"), make_target("b"))).parameters == 88
    assert Adapter(()).parameters == 0


def test_counting_reads_nothing() -> None:
    factor = MemoryFactor("A", np.ones((4, 6)), sealed=True)
    target = Target("m", "lora", SlotKind.LINEAR, {"A": factor}, 4, Scaling(ScalingRule.MULTIPLIER, 1.0))
    assert target.parameters == 24


def test_an_adapter_made_in_memory_claims_nothing() -> None:
    adapter = Adapter(())
    assert (adapter.base, adapter.scheme, adapter.source, adapter.sha256) == (BaseBinding(None, None), "native", "", "")
    assert (dict(adapter.metadata), dict(adapter.provenance), adapter.problems) == ({}, {}, ())


def test_records_do_not_change() -> None:
    adapter = Adapter((make_target(),))
    for record, name in ((adapter, "source"), (adapter.targets[0], "rank"), (adapter.targets[0].scaling, "value")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, None)
    with pytest.raises(TypeError):
        adapter.metadata["x.note"] = "changed"  # type: ignore[index]


def test_the_words_of_the_manifest() -> None:
    """They stand in files: another word is another format."""
    assert {rule.value for rule in ScalingRule} == {"alpha/rank", "alpha/sqrt(rank)", "multiplier"}
    assert {slot.value for slot in SlotKind} == {"linear", "linear-transposed", "conv", "embedding", "parameter"}
