"""A bias that was trained beside factors that change nothing but the weight, for kinds of several natures."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from builders import MemoryFactor
from kind_examples import make_target
from loraformat.adapter import SlotKind, Target
from loraformat.kinds import KINDS, Nature
from loraformat.kinds._factored import FactoredKind

OUT, IN, RANK = 6, 10, 2
FACTORS: dict[str, dict[str, tuple[int, ...]]] = {
    "dora": {"lora_A.weight": (RANK, IN), "lora_B.weight": (OUT, RANK), "lora_magnitude_vector": (OUT,)},
    "loha": {"hada_w1_a": (OUT, RANK), "hada_w1_b": (RANK, IN), "hada_w2_a": (OUT, RANK), "hada_w2_b": (RANK, IN)},
    "hra": {"hra_u": (IN, RANK)},
    "fourierft": {"fourierft_spectrum": (7,)},
}
OPTIONS = {"fourierft": {"random_loc_seed": 3}}


def make(kind: str, bias: Any, slot: SlotKind = SlotKind.LINEAR) -> Target:
    arrays = {role: np.ones(shape, np.float32) for role, shape in FACTORS[kind].items()}
    rank = 0 if kind == "fourierft" else RANK
    return make_target(kind, slot, {**arrays, "base_layer.bias": bias}, rank, options=OPTIONS.get(kind))


@pytest.mark.parametrize("kind", FACTORS)
def test_it_replaces_the_bias_and_the_weight_changes_as_without_it(kind: str) -> None:
    own = KINDS.find(kind)
    assert own is not None
    bias = np.arange(OUT, dtype=np.float32)
    target = make(kind, bias)
    assert own.check(target) == []
    weight, beside = own.changes(target)
    without = replace(target, factors={role: target.factors[role] for role in FACTORS[kind]})
    assert (weight,) == own.changes(without)
    assert (beside.parameter, beside.shape, beside.nature) == ("bias", (OUT,), Nature.REPLACEMENT)
    out = np.empty((OUT, 1), np.float32)
    own.value(target, beside, {"base_layer.bias": bias}).write_rows(0, OUT, out)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(out[:, 0], bias)


@pytest.mark.parametrize(
    ("bias", "code"),
    [(np.ones(IN, np.float32), "LF203"), (np.ones((OUT, 1), np.float32), "LF203"), (np.ones(OUT, np.int64), "LF210")],
)
def test_one_that_is_none(bias: Any, code: str) -> None:
    for kind in ("loha", "dora"):
        own = KINDS.find(kind)
        assert own is not None
        assert [problem.code for problem in own.check(make(kind, bias))] == [code]


def test_a_kind_that_changes_the_bias_itself_has_none() -> None:
    own = KINDS.find("ia3")
    assert own is not None
    factors = {"ia3_l": MemoryFactor("ia3_l", np.ones((OUT, 1), np.float32))}
    bias = MemoryFactor("base_layer.bias", np.ones(OUT, np.float32))
    target = make_target("ia3", SlotKind.LINEAR, {}, options={"is_feedforward": False})
    codes = [problem.code for problem in own.check(replace(target, factors={**factors, "base_layer.bias": bias}))]
    assert codes == ["LF202"]


def test_every_kind_with_changes_of_its_own_says_so() -> None:
    kinds = [each for name in KINDS.names() if isinstance(each := KINDS.find(name), FactoredKind)]
    own = {each.name for each in kinds if type(each).changes is not FactoredKind.changes}
    assert own == {each.name for each in kinds if not each.is_beside_bias}
