"""The variant "bat" of MiSS, square by square."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kind_examples import MATRICES, draw_factors, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws, main_change
from loraformat.adapter import SlotKind
from loraformat.kinds.miss_bat import KIND


@st.composite
def bat_examples(draw: st.DrawFn) -> MapExample:
    rank = draw(st.integers(1, 3))
    down, across = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)).filter(lambda n: n[0] != n[1]))
    arrays = draw_factors(draw, {"miss_block": (down, rank, rank)})
    target = make_target("miss_bat", draw(st.sampled_from(MATRICES)), arrays, rank)

    def formula(arrays: Any, base: Any) -> Any:
        out = np.empty_like(base)
        for i, j in np.ndindex(down, across):
            where = (slice(i * rank, (i + 1) * rank), slice(j * rank, (j + 1) * rank))
            block = arrays["miss_block"][i]
            out[where] = base[where] + base[where] @ block + block
        return out

    return mapped(draw, target, (down * rank, across * rank), formula)


class TestMissBat(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return bat_examples()


def test_columns_that_are_no_whole_squares() -> None:
    target = make_target("miss_bat", SlotKind.LINEAR, {"miss_block": np.ones((2, 3, 3))}, 3)
    assert [p.code for p in KIND.check_size(target, main_change(KIND, target, shape=(6, 10)))] == ["LF405"]
