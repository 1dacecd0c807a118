"""HiRA against its formula, of every slot."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, draw_factors, draw_sizes, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.hira import KIND


@st.composite
def hira_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([*MATRICES, SlotKind.CONV, SlotKind.EMBEDDING]))
    kernel = (2, 3) if slot is SlotKind.CONV else ()
    (out, inner), rank = draw_sizes(draw), draw(st.integers(1, 4))
    table = slot is SlotKind.EMBEDDING
    down, up = ("hira_embedding_A", "hira_embedding_B") if table else ("hira_A", "hira_B")
    shapes = {down: (rank, inner, *kernel), up: (out, rank, *(1 for _ in kernel))}
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    target = make_target("hira", slot, draw_factors(draw, shapes), rank, scaling)

    def formula(arrays: Any, base: Any) -> Any:
        factor = np.einsum("or,ri->oi", arrays[up].reshape(out, rank), arrays[down].reshape(rank, -1))
        return base + target.scale * base * factor

    return mapped(draw, target, (out, inner, *kernel), formula, told=True, slack=1e-3)


class TestHira(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return hira_examples()
