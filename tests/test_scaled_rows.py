import numpy as np
import pytest

from loraformat.kinds._matrices import Values
from loraformat.scaled_rows import ScaledRows


@pytest.mark.parametrize("turned", [False, True])
def test_rows_are_scaled_whichever_way_the_matrix_lies(turned: bool) -> None:
    rng = np.random.default_rng(1)
    matrix, factors = rng.standard_normal((7, 4)), rng.standard_normal(7)
    scaled, expected = ScaledRows(Values(matrix), factors), matrix * factors[:, None]
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
