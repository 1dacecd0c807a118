"""BOFT with one butterfly and with several, against matrices of whole weights."""

from typing import Any

import numpy as np
import pytest
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


@st.composite
def butterfly_examples(draw: st.DrawFn) -> MapExample:
    """With the permutations as matrices: chunk k of a run goes to place 2k, those of its second half in between."""
    factors, half = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    blocks, size = 2 ** (factors - 1) * draw(st.integers(1, 2)), 2 * half
    inner = size * blocks
    out = draw(st.integers(1, 9).filter(lambda n: n != inner))
    shapes = {"boft_R": (factors, blocks, size, size), "boft_s": (out, 1)}
    target = make_target("boft", draw(st.sampled_from(MATRICES)), draw_factors(draw, shapes))

    def formula(arrays: Any, base: Any) -> Any:
        product, one = np.eye(inner), np.eye(size)
        for factor, raws in enumerate(arrays["boft_R"]):
            diagonal, places = np.zeros((inner, inner)), np.zeros((inner, inner))
            for place, raw in enumerate(raws):
                skew = (raw - raw.T) / 2
                where = slice(place * size, (place + 1) * size)
                diagonal[where, where] = (one - skew) @ np.linalg.inv(one + skew)
            chunks = 2 ** (factor + 1)
            order = [*range(0, chunks, 2), *range(1, chunks, 2)]
            for row in range(inner):
                run, within = divmod(row, chunks * half)
                places[row, run * chunks * half + order[within // half] * half + within % half] = 1
            product = places @ diagonal @ places.T @ product
        return (product @ base.T).T * arrays["boft_s"]

    return mapped(draw, target, (out, inner), formula, told=True)


class TestBoft(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return st.one_of(boft_examples(), butterfly_examples())


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 4, 3, 3), (3, 2, 4, 4)])
def test_no_factor_reaches_beyond_the_inputs(shape: tuple[int, ...]) -> None:
    problems = KIND.check(make_target("boft", SlotKind.LINEAR, {"boft_R": np.ones(shape), "boft_s": np.ones((5, 1))}))
    assert [problem.code for problem in problems] == ["LF203"]
    assert "factors" in problems[0].found
