"""What every coded encoding keeps. Its test class inherits `CodedLaws`; see `tests/encodings/test_affine8.py`.

The class has no `Test` prefix, so that it is collected only where it is inherited.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from loraformat.dtypes import BY_NAME
from loraformat.encodings import CODED, CodedEncoding, Coder, Coding, Fit
from loraformat.spans import HeldTensor

Array = NDArray[Any]


class Example(NamedTuple):
    """A quantised weight: unpacked codes `(rows, columns)`, one scale and zero point for each block."""

    form: str
    codes: Array
    block: tuple[int, int]
    scales: Array
    zeros: Array | None
    zero: int = 0


def held(name: str, values: Array) -> HeldTensor:
    return HeldTensor(name, BY_NAME[values.dtype.name], values)


class CodedLaws:
    """The laws, for each of `forms`."""

    encoding: CodedEncoding
    forms: Sequence[str]

    @abstractmethod
    def store(self, codes: Array, form: str) -> Array:
        """Return the bytes `(rows, bytes of a row)` that codes are stored as, by other means than the encoding's."""

    @abstractmethod
    def bounds(self, form: str) -> tuple[int, int]:
        """Return the first and the last code."""

    @abstractmethod
    def store_zeros(self, zeros: Array, form: str) -> Array:
        """Return zero points as they are stored."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "example" in metafunc.fixturenames:
            pairs = [(form, block) for form in self.forms for block in ((12, 20), (1, 20), (12, 1), (1, 8), (5, 1))]
            examples = [self.make(form, block, zeros) for form, block in pairs for zeros in (True, False)]
            metafunc.parametrize("example", examples, ids=lambda e: f"{e.form}-{e.block}-{e.zeros is not None}")

    def make(self, form: str, block: tuple[int, int], with_zeros: bool) -> Example:
        rng = np.random.default_rng([*block, with_zeros, *form.encode()])
        least, most = self.bounds(form)
        codes = rng.integers(least, most + 1, (12, 20))
        shape = (-(-12 // block[0]), -(-20 // block[1]))
        zeros = rng.integers(least + 2, most - 1, shape) if with_zeros else None
        scales = rng.uniform(0.01, 0.03, shape).astype(np.float32)
        return Example(form, codes, block, scales, zeros, 0 if with_zeros else (least + most + 1) // 2)

    def bind(self, example: Example, padding: int = 0) -> Coder:
        companions = {"scales": held("s", example.scales)}
        if example.zeros is not None:
            companions["zero_points"] = held("z", self.store_zeros(example.zeros, example.form))
        coding = Coding(self.encoding.name, (12, 20), example.block, companions, example.zero, padding=padding)
        return self.encoding.bind(coding, BY_NAME[example.form])

    def spread(self, example: Example, values: Array) -> Array:
        rows, columns = example.block
        return np.repeat(np.repeat(values, rows, axis=0)[:12], columns, axis=1)[:, :20]

    def values_of(self, example: Example) -> NDArray[np.float32]:
        zeros = self.spread(example, example.zeros) if example.zeros is not None else example.zero
        steps = (example.codes - zeros).astype(np.float32)
        return steps * self.spread(example, example.scales)

    def decode(self, coder: Coder, stored: Array, step: int = 12) -> NDArray[np.float32]:
        out = np.full((12, 20), 7, np.float32)
        for start in range(0, 12, step):
            rows = range(start, min(start + step, 12))
            coder.decode(stored[rows.start : rows.stop], rows, out[rows.start : rows.stop])
        return out

    def encode(self, coder: Coder, values: Array, like: Array) -> Array:
        out = np.zeros_like(like)
        coder.encode(values.astype(np.float32), range(12), out)
        return out

    def refit(self, coder: Coder, stored: Array, delta: Array, step: int = 12) -> tuple[Coder, NDArray[np.float32]]:
        values = self.decode(coder, stored)
        new = (values + delta).astype(np.float32)
        return self.see(coder.start_fit(), stored, new, delta, step), new

    def see(self, fit: Fit, stored: Array, new: Array, delta: Array, step: int = 12) -> Coder:
        for start in range(0, 12, step):
            cut = slice(start, min(start + step, 12))
            fit.see(stored[cut], range(start, cut.stop), new[cut], delta[cut].astype(np.float32))
        return fit.finish()

    def test_its_room_finds_it(self) -> None:
        assert CODED.find(self.encoding.name) is self.encoding

    def test_decoding_is_that_of_the_definition(self, example: Example) -> None:
        found = self.decode(self.bind(example), self.store(example.codes, example.form))
        np.testing.assert_array_equal(found, self.values_of(example))

    def test_tiles_make_no_difference(self, example: Example) -> None:
        coder, stored = self.bind(example), self.store(example.codes, example.form)
        for step in (1, 5, 7):
            np.testing.assert_array_equal(self.decode(coder, stored, step), self.decode(coder, stored))

    def test_what_was_decoded_encodes_to_itself(self, example: Example) -> None:
        coder, stored = self.bind(example), self.store(example.codes, example.form)
        assert self.encode(coder, self.decode(coder, stored), stored).tobytes() == stored.tobytes()

    def test_encoding_takes_the_nearest_code_or_the_last(self, example: Example) -> None:
        coder, stored = self.bind(example), self.store(example.codes, example.form)
        rng = np.random.default_rng(3)
        values = (self.values_of(example) + rng.uniform(-2, 2, (12, 20))).astype(np.float32)
        found = self.decode(coder, self.encode(coder, values, stored))
        scales = self.spread(example, example.scales).astype(np.float64)
        zeros = self.spread(example, example.zeros) if example.zeros is not None else example.zero
        least, most = self.bounds(example.form)
        every = (np.arange(least, most + 1)[:, None, None] - zeros) * scales
        best = np.abs(every - values).min(axis=0)
        np.testing.assert_allclose(np.abs(found - values), best, atol=1e-6)
        assert (np.abs(values) > np.abs(every).max(axis=0)).any()  # Some lay beyond.

    def test_nothing_added_changes_nothing(self, example: Example) -> None:
        coder, stored = self.bind(example), self.store(example.codes, example.form)
        again, values = self.refit(coder, stored, np.zeros((12, 20)))
        np.testing.assert_array_equal(again.tensors()["scales"], example.scales)
        assert self.encode(again, values, stored).tobytes() == stored.tobytes()

    def test_only_blocks_that_change_get_another_scale(self, example: Example) -> None:
        coder, stored = self.bind(example), self.store(example.codes, example.form)
        delta = np.zeros((12, 20))
        delta[4, 6] = 9.0
        again, _ = self.refit(coder, stored, delta, step=5)
        changed = again.tensors()["scales"] != example.scales
        place = (4 // example.block[0], 6 // example.block[1])
        assert changed[place]
        assert changed.sum() == 1

    def test_new_scales_reach_the_new_values(self, example: Example) -> None:
        coder, stored = self.bind(example), self.store(example.codes, example.form)
        delta = np.random.default_rng(4).standard_normal((12, 20))
        again, values = self.refit(coder, stored, delta, step=7)
        found = self.decode(again, self.encode(again, values, stored))
        steps = np.abs(self.spread(example, np.asarray(again.tensors()["scales"], np.float64)))
        assert (np.abs(found - values) <= steps * 0.501 + 1e-6).all()

    def test_new_scales_are_no_larger_than_need_be(self, example: Example) -> None:
        coder, stored = self.bind(example), self.store(example.codes, example.form)
        delta = np.random.default_rng(5).standard_normal((12, 20))
        again, values = self.refit(coder, stored, delta)
        scales = np.asarray(again.tensors()["scales"], np.float64)
        zeros = self.spread(example, example.zeros) if example.zeros is not None else example.zero
        steps = np.rint(values / self.spread(example, scales) + zeros)
        least, most = self.bounds(example.form)
        reached = (steps <= least + 1) | (
            steps >= most
        )  # Quantisers leave int8's -128 out, to reach as far up as down.
        rows, columns = example.block
        for row in range(0, 12, rows):
            for column in range(0, 20, columns):
                assert reached[row : row + rows, column : column + columns].any()

    def test_steps_are_the_distances_of_codes(self, example: Example) -> None:
        steps = self.bind(example).steps(range(3, 9), self.values_of(example)[3:9])
        np.testing.assert_array_equal(np.broadcast_to(steps, (6, 20)), self.spread(example, example.scales)[3:9])

    def test_padding_stands_for_zeros_and_keeps_its_codes(self, example: Example) -> None:
        coder, stored = self.bind(example, padding=3), self.store(example.codes, example.form)
        values = self.decode(coder, stored)
        np.testing.assert_array_equal(values[:, :17], self.values_of(example)[:, :17])
        assert not values[:, 17:].any()
        out = stored.copy()
        coder.encode(values, range(12), out)
        assert out.tobytes() == stored.tobytes()

    def test_afresh_nothing_added_changes_nothing(self, example: Example) -> None:
        coder, stored = self.bind(example), self.store(example.codes, example.form)
        nothing = np.zeros((12, 20), np.float32)
        again = self.see(coder.start_afresh(), stored, self.decode(coder, stored), nothing, step=5)
        for role, values in coder.tensors().items():
            assert again.tensors()[role].tobytes() == values.tobytes()

    def test_afresh_all_values_are_within_reach(self, example: Example) -> None:
        """Quantisers cut off at most half a step for a zero point that is rounded."""
        coder, stored = self.bind(example), self.store(example.codes, example.form)
        values = np.random.default_rng(6).standard_normal((12, 20)).astype(np.float32) + np.float32(0.3)
        again = self.see(coder.start_afresh(), stored, values, values, step=7)
        found = self.decode(again, self.encode(again, values, stored))
        steps = np.abs(self.spread(example, np.asarray(again.tensors()["scales"], np.float64)))
        assert (np.abs(found - values) <= steps * 1.001 + 1e-6).all()
