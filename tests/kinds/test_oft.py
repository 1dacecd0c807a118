"""OFT in its three generations against matrices of whole weights, and the two ways to an orthogonal block."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, draw_factors, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws, main_change
from loraformat.adapter import SlotKind, Target
from loraformat.kinds._rotations import make_skew, project, turn_by_cayley, turn_by_neumann
from loraformat.kinds.oft import KIND


def cayley(skew: np.ndarray) -> np.ndarray:
    one = np.eye(len(skew))
    return (one - skew) @ np.linalg.inv(one + skew)


def spread(blocks: list[np.ndarray]) -> np.ndarray:
    size = len(blocks[0])
    whole = np.zeros((size * len(blocks), size * len(blocks)))
    for place, block in enumerate(blocks):
        whole[place * size : (place + 1) * size, place * size : (place + 1) * size] = block
    return whole


def skew_of(entries: np.ndarray, size: int) -> np.ndarray:
    skew, numbers = np.zeros((size, size)), iter(entries)
    for row in range(size):
        for column in range(row + 1, size):
            skew[row, column] = next(numbers)
            skew[column, row] = -skew[row, column]
    return skew


@st.composite
def oft_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([*MATRICES, SlotKind.CONV, SlotKind.EMBEDDING]))
    size, blocks, shared = draw(st.integers(2, 4)), draw(st.integers(1, 3)), draw(st.booleans())
    other = draw(st.integers(1, 9).filter(lambda n: n != size * blocks))
    role = "oft_embedding_R.weight" if slot is SlotKind.EMBEDDING else "oft_R.weight"
    arrays = draw_factors(draw, {role: (1 if shared else blocks, size * (size - 1) // 2)})
    options = {"block_share": shared, "use_cayley_neumann": False, "coft": draw(st.booleans()), "eps": 0.5}
    target = make_target("oft", slot, arrays, options=options)

    def formula(arrays: Any, base: Any) -> Any:
        skews = [skew_of(entries, size) for entries in arrays[role]]
        if options["coft"]:
            most = 0.5 / np.sqrt(len(skews))
            skews = [skew * min(1, most / max(np.linalg.norm(skew), 1e-12)) for skew in skews]
        turns = spread([cayley(skew) for skew in skews] * (blocks if shared else 1))
        return turns.T @ base if slot is SlotKind.EMBEDDING else base @ turns.T

    turned = size * blocks
    shape = (turned, other) if slot is SlotKind.EMBEDDING else (other, turned)
    return mapped(draw, target, (*shape, 1, 1) if slot is SlotKind.CONV else shape, formula)


@st.composite
def old_examples(draw: st.DrawFn) -> MapExample:
    """PEFT 0.14, which turned inputs and scaled outputs, and 0.13, which turned outputs and cut the last block off."""
    size, blocks, scaled = draw(st.integers(2, 4)), draw(st.integers(1, 3)), draw(st.booleans())
    cut = 0 if scaled else draw(st.integers(0, size - 1))
    turned = size * blocks - cut
    other = draw(st.integers(1, 9).filter(lambda n: n != turned))
    shape = (other, turned) if scaled else (turned, other)
    shapes = {"oft_r": (blocks, size, size), **({"oft_s": (other, 1)} if scaled else {})}
    target = make_target("oft", draw(st.sampled_from(MATRICES)), draw_factors(draw, shapes))

    def formula(arrays: Any, base: Any) -> Any:
        turns = spread([cayley((raw - raw.T) / 2) for raw in arrays["oft_r"]])
        if scaled:
            return (turns @ base.T).T * arrays["oft_s"]
        return (base.T @ turns[:turned, :turned]).T

    return mapped(draw, target, shape, formula)


class TestOft(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return oft_examples()

    def needs(self, target: Target) -> list[str]:
        return list(target.factors)


class TestOldOft(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return old_examples()

    def needs(self, target: Target) -> list[str]:
        return ["oft_r"]


def test_the_series_ends_as_each_version_had_it() -> None:
    skew = make_skew(np.array([[0.01, 0.02, 0.03]]))
    one, second = np.eye(3)[None], skew @ skew
    third, fourth = second @ skew, second @ second
    for terms, last, expected in (
        (1, 1, one),
        (2, 1, one + 2 * skew),
        (3, 1, one + 2 * skew + 2 * second + third),
        (4, 1, one + 2 * skew + 2 * second + third),
        (5, 1, one + 2 * skew + 2 * second + 2 * third + fourth),
        (3, 2, one + 2 * skew + 2 * second),
        (5, 2, one + 2 * skew + 2 * second + 2 * third + 2 * fourth),
    ):
        np.testing.assert_allclose(turn_by_neumann(skew, terms, last), expected, atol=1e-15)


def test_the_series_approaches_the_inverse_transform() -> None:
    """I + 2Q + 2Q² ... is (I + Q)(I − Q)⁻¹: the exact way of PEFT turns the other way round."""
    skew = make_skew(np.array([[0.01, -0.02, 0.03]]))
    np.testing.assert_allclose(turn_by_neumann(skew, 9, 1), turn_by_cayley(-skew), atol=1e-12)
    exact = turn_by_cayley(skew)
    np.testing.assert_allclose(exact @ exact.transpose(0, 2, 1), np.eye(3)[None], atol=1e-14)


def test_a_projection_leaves_what_is_within_the_bound() -> None:
    skew = make_skew(np.array([[3.0], [0.0001]]))
    projected = project(skew, 0.1)
    np.testing.assert_allclose(np.linalg.norm(projected[0]), 0.1 / np.sqrt(2))
    np.testing.assert_array_equal(projected[1], skew[1])


def codes(slot: SlotKind = SlotKind.LINEAR, shape: tuple[int, ...] = (2, 3), **options: Any) -> list[str]:
    return [
        problem.code
        for problem in KIND.check(make_target("oft", slot, {"oft_R.weight": np.ones(shape)}, options=options))
    ]


def test_entries_make_a_triangle() -> None:
    assert codes() == []
    assert codes(shape=(2, 4)) == ["LF203"]
    assert codes(block_share=True) == ["LF203"]
    assert codes(last_neumann_coefficient=3) == ["LF230"]
    assert codes(num_cayley_neumann_terms=0) == ["LF230"]


def test_a_kernel_that_training_did_not_turn() -> None:
    target = make_target("oft", SlotKind.LINEAR, {"oft_R.weight": np.ones((4, 3))})
    from dataclasses import replace

    (change,) = KIND.changes(target)
    assert change.is_flat
    assert [p.code for p in KIND.check_size(target, replace(change, shape=(5, 3, 2, 2)))] == ["LF209"]
    assert not KIND.check_size(target, replace(change, shape=(5, 12, 1, 1)))


@pytest.mark.parametrize("shape", [(5, 11), (5, 13), (5, 24)])
def test_blocks_that_do_not_cover_the_weight(shape: tuple[int, int]) -> None:
    target = make_target("oft", SlotKind.LINEAR, {"oft_R.weight": np.ones((1, 3))}, options={"block_share": True})
    change = main_change(KIND, target, shape=shape)
    assert bool(KIND.check_size(target, change)) == (shape[1] % 3 != 0)
