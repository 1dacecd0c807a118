"""KaSA: a LoRA with a diagonal in it, on what is left of the base."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import SCALES, draw_factors, draw_sizes, make_target, mapped
from kinds.test_osf import keep_largest
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.kasa import KIND

A, B, D = "lora_A.weight", "lora_B.weight", "lora_diag"


@st.composite
def kasa_examples(draw: st.DrawFn) -> MapExample:
    out, inner = (size + 1 for size in draw_sizes(draw))
    rank = draw(st.integers(1, min(out, inner) - 1))
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    arrays = draw_factors(draw, {A: (rank, inner), B: (out, rank), D: (rank,)})
    target = make_target("kasa", SlotKind.LINEAR, arrays, rank, scaling)

    def formula(arrays: Any, base: Any) -> Any:
        left = keep_largest(base, min(out, inner) - rank)
        return left + target.scale * arrays[B] @ np.diag(arrays[D]) @ arrays[A]

    return mapped(draw, target, (out, inner), formula, told=True, slack=1e-2)


class TestKasa(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return kasa_examples()


@pytest.mark.parametrize("rank", [3, 4])
def test_something_of_the_base_is_left(rank: int) -> None:
    arrays = {A: np.ones((rank, 7)), B: np.ones((4, rank)), D: np.ones(rank)}
    codes = [problem.code for problem in KIND.check(make_target("kasa", SlotKind.LINEAR, arrays, rank))]
    assert codes == (["LF203"] if rank == 4 else [])
