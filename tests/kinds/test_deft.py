"""DEFT and PaRa against projectors of whole weights."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, draw_factors, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.deft import KIND


@st.composite
def deft_examples(draw: st.DrawFn) -> MapExample:
    rank, more = draw(st.integers(1, 3)), draw(st.integers(0, 6))
    out = rank + more
    inner = draw(st.integers(1, 9).filter(lambda size: size != out))
    shapes = {"deft_P": (out, rank)} | ({"deft_R": (rank, inner)} if draw(st.booleans()) else {})
    method = draw(st.sampled_from(["relu", "qr"]))
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    slot, options = draw(st.sampled_from(MATRICES)), {"decomposition_method": method}
    target = make_target("deft", slot, draw_factors(draw, shapes), rank, scaling, options)

    def formula(arrays: Any, base: Any) -> Any:
        left, right = arrays["deft_P"], np.where(arrays["deft_P"] > 0, arrays["deft_P"], 0)
        if method == "qr":  # Gram and Schmidt's vectors, each with the sign that Householder's reflection gives it.
            left = right = orthogonalise(arrays["deft_P"])
        projected = (np.eye(out) - left @ right.T) @ base
        return projected + left @ arrays["deft_R"] * target.scale if "deft_R" in arrays else projected

    return mapped(draw, target, (out, inner), formula, told="deft_R" in shapes, slack=3e-3)


def orthogonalise(matrix: np.ndarray) -> np.ndarray:
    """Return orthonormal columns by Householder's reflections: each sends what is left of a column to -sign·e."""
    rows, columns = matrix.shape
    left, turns = matrix.astype(np.float64).copy(), np.eye(rows)
    for place in range(min(rows - 1, columns)):
        column = left[place:, place]
        mirror = column.copy()
        mirror[0] += np.copysign(np.linalg.norm(column), column[0])
        mirror /= np.linalg.norm(mirror)
        reflection = np.eye(rows)
        reflection[place:, place:] -= 2 * np.outer(mirror, mirror)
        left, turns = reflection @ left, turns @ reflection
    return np.asarray(turns[:, :columns])


class TestDeft(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return deft_examples()


def test_no_subspace_is_larger_than_the_space() -> None:
    target = make_target("deft", SlotKind.LINEAR, {"deft_P": np.ones((3, 4))}, 4)
    assert [problem.code for problem in KIND.check(target)] == ["LF203"]
