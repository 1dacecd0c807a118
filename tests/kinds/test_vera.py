"""VeRA against the paper's formula, with shared factors that are larger than the weight."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws, main_change
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.vera import KIND


@st.composite
def vera_examples(draw: st.DrawFn) -> Example:
    (out, inner), rank, more = draw_sizes(draw), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    shapes = {
        "vera_lambda_b": (out,),
        "vera_lambda_d": (rank,),
        "vera_A": (rank, inner + more),
        "vera_B": (out + more, rank),
    }
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    target = make_target("vera", draw(st.sampled_from(MATRICES)), draw_factors(draw, shapes), rank, scaling)

    def dense(arrays: Arrays) -> np.ndarray:
        middle = np.diag(arrays["vera_lambda_d"])
        return np.diag(arrays["vera_lambda_b"]) @ arrays["vera_B"][:out] @ middle @ arrays["vera_A"][:, :inner]

    return added(target, dense, terms=8 + rank, shape=(out, inner))


def draw_again(seed: int, *shapes: tuple[int, int]) -> list[np.ndarray]:
    """Return what torch's generator gives: the lower 24 bits of each word of numpy's own Mersenne Twister."""
    words, drawn = np.random.RandomState(seed), []
    for rows, columns in shapes:
        bound = np.float32(np.sqrt(3.0) * (np.sqrt(2.0) / np.sqrt(columns)))
        numbers = words.randint(0, 2**32, rows * columns, np.uint32) % 2**24 / 2**24
        drawn.append((numbers * np.float64(bound + bound) - bound).astype(np.float32).reshape(rows, columns))
    return drawn


@st.composite
def drawn_examples(draw: st.DrawFn) -> Example:
    (out, inner), rank, seed = draw_sizes(draw), draw(st.integers(1, 4)), draw(st.integers(0, 2**32))
    factors = draw_factors(draw, {"vera_lambda_b": (out,), "vera_lambda_d": (rank,)})
    options = {"projection_prng_key": seed, "sharing": 1}
    target = make_target("vera", draw(st.sampled_from(MATRICES)), factors, rank, options=options)
    down, up = draw_again(seed % 2**32, (rank, inner), (out, rank))

    def dense(arrays: Arrays) -> np.ndarray:
        return (arrays["vera_lambda_b"][:, None] * up) @ (arrays["vera_lambda_d"][:, None] * down)

    return added(target, dense, terms=8 + rank, shape=(out, inner), bound=20.0 * rank)


class TestVera(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return st.one_of(vera_examples(), drawn_examples())


def test_a_seed_alone_is_not_enough() -> None:
    arrays = {"vera_lambda_b": np.ones(5), "vera_lambda_d": np.ones(2)}
    options = {"projection_prng_key": 0}
    problems = KIND.check(make_target("vera", SlotKind.LINEAR, arrays, 2, options=options))
    assert [problem.code for problem in problems] == ["LF230"]
    assert "sharing" in problems[0].found


def test_no_more_numbers_are_drawn_than_memory_holds() -> None:
    arrays = {"vera_lambda_b": np.ones(5), "vera_lambda_d": np.ones(2)}
    target = make_target("vera", SlotKind.LINEAR, arrays, 2, options={"projection_prng_key": 0, "sharing": 2})
    change = replace(main_change(KIND, target, shape=(5, 3)), extent=(5, 2**27 - 5))
    assert not KIND.check_extent(target, change)
    assert [p.code for p in KIND.check_extent(target, replace(change, extent=(6, 2**27 - 5)))] == ["LF235"]


def make(**shapes: tuple[int, ...]):
    return make_target("vera", SlotKind.LINEAR, {role: np.ones(shape) for role, shape in shapes.items()}, 2)


def test_shared_factors_that_are_too_small() -> None:
    shapes = {"vera_lambda_b": (5,), "vera_lambda_d": (2,), "vera_A": (2, 3), "vera_B": (5, 2)}
    assert not KIND.check(make(**shapes))
    assert [problem.code for problem in KIND.check(make(**{**shapes, "vera_B": (4, 2)}))] == ["LF203"]
    target = make(**shapes)
    assert not KIND.check_size(target, main_change(KIND, target, shape=(5, 3)))
    assert [p.code for p in KIND.check_size(target, main_change(KIND, target, shape=(5, 4)))] == ["LF405"]


@pytest.mark.parametrize("role", ["vera_lambda_d", "vera_A", "vera_B"])
def test_ranks_that_disagree(role: str) -> None:
    shapes = {"vera_lambda_b": (5,), "vera_lambda_d": (2,), "vera_A": (2, 3), "vera_B": (5, 2)}
    shapes[role] = tuple(3 if size == 2 else size for size in shapes[role])
    assert "LF203" in [problem.code for problem in KIND.check(make(**shapes))]
