import numpy as np
import pytest

from loraformat.engine.scaled_rows import OrderedRows, ScaledRows
from loraformat.kinds._matrices import Values


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", ["scaled", "moved"])
def test_rows_are_scaled_or_moved_whichever_way_the_matrix_lies(case: str, turned: bool) -> None:
    rng = np.random.default_rng(1)
    matrix, factors = rng.standard_normal((7, 4)), rng.standard_normal(7)
    scaled, expected = ScaledRows(Values(matrix), factors), matrix * factors[:, None]
    if case == "moved":
        order = np.array([3, 4, 5, 0, 6, 2, 1])
        scaled, expected = OrderedRows(Values(matrix), order), matrix[order]
    if turned:
        scaled, expected = scaled.transposed(), expected.T
    rows, columns = slice(1, 4, 2), slice(0, 3, 1)
    part = scaled.part(rows, columns)
    assert (scaled.shape, part.shape) == (expected.shape, expected[rows, columns].shape)
    for values, wanted in ((scaled, expected), (part, expected[rows, columns])):
        for start, stop in ((0, wanted.shape[0]), (1, 2)):
            out = np.empty((stop - start, wanted.shape[1]))
            values.write_rows(start, stop, out)
            np.testing.assert_allclose(out, wanted[start:stop], rtol=1e-15)
