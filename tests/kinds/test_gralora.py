"""GraLoRA, block by block."""

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, make_target
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds.gralora import KIND

GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")


def dense(arrays: Arrays) -> np.ndarray:
    down, up = arrays["gralora_A"], arrays["gralora_B"]
    k, across, rank = down.shape
    share, high = rank // k, up.shape[2]
    change = np.zeros((k * high, k * across))
    for i, j in np.ndindex(k, k):
        block = np.zeros((high, across))
        for s in range(share):
            block += np.outer(up[i][j * share + s], down[j][:, i * share + s])
        change[i * high : (i + 1) * high, j * across : (j + 1) * across] = block
    if GENERAL[0] in arrays:
        change = change + arrays[GENERAL[1]] @ arrays[GENERAL[0]]
    return change


@st.composite
def gralora_examples(draw: st.DrawFn) -> Example:
    k, share, hybrid = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    across, high = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda n: n[0] != n[1]))
    shapes: dict[str, tuple[int, ...]] = {"gralora_A": (k, across, k * share), "gralora_B": (k, k * share, high)}
    if hybrid:
        shapes |= {GENERAL[0]: (hybrid, k * across), GENERAL[1]: (k * high, hybrid)}
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    target = make_target("gralora", draw(st.sampled_from(MATRICES)), draw_factors(draw, shapes), scaling=scaling)
    return added(target, dense, terms=32)


class TestGralora(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return gralora_examples()

    def needs(self, target: Target) -> list[str]:
        return sorted(target.factors)


@pytest.mark.parametrize(
    ("role", "shape"),
    [("gralora_A", (2, 3, 3)), (GENERAL[0], (2, 5)), (GENERAL[1], (7, 2))],
    ids=str,
)
def test_factors_of_other_sizes(role: str, shape: tuple[int, ...]) -> None:
    shapes: dict[str, tuple[int, ...]] = {"gralora_A": (2, 3, 4), "gralora_B": (2, 4, 5)}
    shapes |= {GENERAL[0]: (2, 6), GENERAL[1]: (10, 2)}
    sound = make_target("gralora", SlotKind.LINEAR, {each: np.ones(size) for each, size in shapes.items()})
    assert not KIND.check(sound)
    shapes[role] = shape
    if role == "gralora_A":
        shapes["gralora_B"] = (2, 3, 5)
    target = make_target("gralora", SlotKind.LINEAR, {each: np.ones(size) for each, size in shapes.items()})
    assert [problem.code for problem in KIND.check(target)] == ["LF203"]
