"""OSF against components that eigenvectors of WᵀW give."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, draw_factors, draw_sizes, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import SlotKind
from loraformat.kinds.osf import KIND

U, S, V = "osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low"


def keep_largest(base: np.ndarray, count: int) -> np.ndarray:
    """Return a weight projected on the eigenvectors of WᵀW with the largest values."""
    _, vectors = np.linalg.eigh(base.T @ base)
    kept = vectors[:, vectors.shape[1] - count :]
    return np.asarray(base @ kept @ kept.T)


@st.composite
def osf_examples(draw: st.DrawFn) -> MapExample:
    out, inner = draw_sizes(draw)
    few = draw(st.integers(1, min(out, inner)))
    arrays = draw_factors(draw, {U: (out, few), S: (few,), V: (few, inner)})
    target = make_target("osf", draw(st.sampled_from(MATRICES)), arrays)

    def formula(arrays: Any, base: Any) -> Any:
        return keep_largest(base, min(out, inner) - few) + arrays[U] @ np.diag(arrays[S]) @ arrays[V]

    return mapped(draw, target, (out, inner), formula, told=True, slack=1e-2)


class TestOsf(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return osf_examples()


@pytest.mark.parametrize("few", [4, 5])
def test_there_are_no_more_components_than_the_smaller_side(few: int) -> None:
    arrays = {U: np.ones((4, few)), S: np.ones(few), V: np.ones((few, 7))}
    codes = [problem.code for problem in KIND.check(make_target("osf", SlotKind.LINEAR, arrays))]
    assert codes == (["LF203"] if few > 4 else [])
