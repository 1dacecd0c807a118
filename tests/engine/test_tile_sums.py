"""What tells that nothing left the range of the output's form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from graphs import FORMS
from loraformat.engine.tile_sums import TileSums, is_in_range, sum_up

WIDE = ("float32", "float64")


def tell(values: np.ndarray) -> bool:
    with np.errstate(all="ignore"):
        wide = values if values.dtype.itemsize >= 4 else values.astype(np.float32)
        return is_in_range(wide, values)


@given(st.sampled_from(["float16", "bfloat16", *WIDE]), st.data())
def test_what_is_not_finite_is_never_in_range(form: str, data: st.DataObject) -> None:
    size = np.dtype(FORMS[form]).itemsize
    bits = data.draw(stn.arrays(f"u{size}", stn.array_shapes(max_dims=2, min_side=0)))
    values = bits.view(FORMS[form])
    finite = bool(np.isfinite(values.astype(np.float64)).all())
    assert not tell(values) or finite
    if form not in WIDE:  # In these, squares of large numbers may overflow: then a tile is looked at once more.
        assert tell(values) == finite


@pytest.mark.parametrize("form", ["float16", "bfloat16", *WIDE])
def test_a_tile_of_weights_is_in_range(form: str) -> None:
    values = np.random.default_rng(1).uniform(-1.99, 1.99, (7, 5)).astype(FORMS[form])
    assert tell(values)
    for broken in (np.nan, -np.nan, np.inf, -np.inf):
        values[3, 2] = broken
        assert not tell(values)


def test_numbers_whose_squares_no_float64_holds_are_left_out_of_the_sums() -> None:
    base, delta = np.array([1e300, 2.0, -1e145, 3.0]), np.array([1e290, 0.5, 1e150, np.nan])
    merged = base + delta
    with np.errstate(over="ignore", invalid="ignore"):
        sums = sum_up(base, delta, merged.copy(), merged)
    assert (sums.kept, sums.wanted, sums.base) == (0.25, 0.25, 4.0)
    assert (sums.overflowed, sums.retained) == (1, 1.0)


def test_sums_of_many_tiles_are_finite() -> None:
    base, delta = np.full(9, 3e143), np.full(9, 1e140)
    merged = base + delta
    tile = sum_up(base, delta, merged.copy(), merged)
    assert np.isfinite([getattr(sum([tile] * 1000, TileSums()), name) for name in ("retained", "relative")]).all()
