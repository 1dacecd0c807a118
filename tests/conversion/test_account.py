"""Every tensor of a source arrives, stands in a record, or is spoken of."""

import numpy as np

from builders import MemoryFactor
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.conversion._account import Account, account, find_unaccounted
from loraformat.problems import Problem


def test_a_tensor_that_goes_nowhere_is_named() -> None:
    kept, alpha, lost, spoken = (MemoryFactor(name, np.ones(3)) for name in ("kept", "alpha", "lost", "spoken"))
    target = Target("m", "lora", SlotKind.LINEAR, {"a": kept}, 1, Scaling(ScalingRule.MULTIPLIER, 1.0))
    adapter = Adapter((target,), absorbed=(alpha,))
    found = account({each.name: each for each in (kept, alpha, lost, spoken)}, adapter, [kept])
    assert found == Account(("kept",), ("alpha",), ("lost", "spoken"))
    problems = find_unaccounted(found, [Problem("LF202", "spoken", "a tensor of no target")])
    assert [(problem.code, problem.where) for problem in problems] == [("LF322", "lost")]
