"""What every coded encoding keeps that only decodes. Its test class inherits `DecodedLaws`.

The class has no `Test` prefix, so that it is collected only where it is inherited.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from laws.coded_laws import held
from loraformat.dtypes import BY_NAME
from loraformat.encodings import CODED, CodedEncoding, Coder, Coding

Array = NDArray[Any]


class Stored(NamedTuple):
    """A quantised weight: its codes as rows of bytes, its companions, and by other means what they stand for."""

    form: str
    codes: Array
    companions: Mapping[str, Array]
    block: tuple[int, int]
    values: Array
    zero: int = 0
    rows_together: int = 1


class DecodedLaws:
    """The laws, for each of `examples`."""

    encoding: CodedEncoding

    @abstractmethod
    def examples(self) -> Mapping[str, Stored]:
        """Return some weights by a name."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "stored" in metafunc.fixturenames:
            made = self.examples()
            metafunc.parametrize("stored", made.values(), ids=made)

    def bind(self, stored: Stored) -> Coder:
        companions = {role: held(role, values) for role, values in stored.companions.items()}
        rows, columns = stored.values.shape
        coding = Coding(
            self.encoding.name,
            (rows, columns),
            stored.block,
            companions,
            stored.zero,
            rows_together=stored.rows_together,
        )
        return self.encoding.bind(coding, BY_NAME[stored.form])

    def decode(self, stored: Stored, step: int) -> NDArray[np.float32]:
        coder, out = self.bind(stored), np.full(stored.values.shape, 7, np.float32)
        for start in range(0, len(out), step):
            rows = range(start, min(start + step, len(out)))
            coder.decode(stored.codes[rows.start : rows.stop], rows, out[rows.start : rows.stop])
        return out

    def test_its_room_finds_it(self) -> None:
        assert CODED.find(self.encoding.name) is self.encoding
        assert self.encoding.is_read_only

    def test_decoding_is_that_of_the_definition(self, stored: Stored) -> None:
        assert np.unique(stored.values).size > 8
        np.testing.assert_allclose(self.decode(stored, len(stored.values)), stored.values, rtol=2e-7, atol=2e-7)

    def test_tiles_make_no_difference(self, stored: Stored) -> None:
        whole = self.decode(stored, len(stored.values))
        for count in (1, 3):
            np.testing.assert_array_equal(self.decode(stored, count * stored.rows_together), whole)

    def test_steps_are_the_largest_distance_of_neighbouring_codes(self, stored: Stored) -> None:
        """The numbers of one row that share a scale have no gap between codes that is wider."""
        coder, rows = self.bind(stored), range(len(stored.values))
        steps = np.broadcast_to(coder.steps(rows, stored.values.astype(np.float32)), stored.values.shape)
        for row, column in ((0, 0), (len(stored.values) - 1, stored.values.shape[1] - 1)):
            assert steps[row, column] == pytest.approx(self.widest(stored, row, column), rel=1e-5)

    @abstractmethod
    def widest(self, stored: Stored, row: int, column: int) -> float:
        """Return the widest distance of neighbouring codes in the block of a number."""

    def test_nothing_is_encoded(self, stored: Stored) -> None:
        coder = self.bind(stored)
        for attempt in (coder.start_fit, coder.start_afresh):
            with pytest.raises(NotImplementedError):
                attempt()
        with pytest.raises(NotImplementedError):
            coder.encode(stored.values, range(len(stored.values)), stored.codes.copy())
        assert not coder.tensors()
