"""What tells that nothing left the range of the output's form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from graphs import FORMS
from loraformat.engine.tile_sums import is_in_range

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
