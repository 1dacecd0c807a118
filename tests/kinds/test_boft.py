"""BOFT with one butterfly against matrices of whole weights."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kind_examples import MATRICES, draw_factors, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import SlotKind
from loraformat.kinds.boft import KIND


@st.composite
def boft_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([*MATRICES, SlotKind.CONV]))
    size, blocks = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    kernel = (2, 3) if slot is SlotKind.CONV else ()
    size *= 6 if kernel else 1
    inner = size * blocks
    out = draw(st.integers(1, 9).filter(lambda n: n != inner))
    shapes = {"boft_R": (1, blocks, size, size), "boft_s": (1, out) if kernel else (out, 1)}
    target = make_target("boft", slot, draw_factors(draw, shapes))

    def formula(arrays: Any, base: Any) -> Any:
        turns = np.zeros((inner, inner))
        for place, raw in enumerate(arrays["boft_R"][0]):
            skew, one = (raw - raw.T) / 2, np.eye(size)
            where = slice(place * size, (place + 1) * size)
            turns[where, where] = (one - skew) @ np.linalg.inv(one + skew)
        return (turns @ base.T).T * arrays["boft_s"].reshape(-1, 1)

    return mapped(draw, target, (out, inner // 6, *kernel) if kernel else (out, inner), formula, told=not kernel)


class TestBoft(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return boft_examples()


def test_several_butterflies_are_refused() -> None:
    arrays = {"boft_R": np.ones((2, 3, 4, 4)), "boft_s": np.ones((5, 1))}
    problems = KIND.check(make_target("boft", SlotKind.LINEAR, arrays))
    assert [problem.code for problem in problems] == ["LF209"]
    assert "butterfl" in problems[0].found
