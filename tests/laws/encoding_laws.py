"""What every encoding keeps. An encoding's test class inherits `EncodingLaws`; see `tests/encodings/test_plain.py`.

The class has no `Test` prefix, so that it is collected only where it is inherited.
"""

import threading
import tracemalloc
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loraformat.dtypes import BY_NAME, Dtype
from loraformat.encodings import ENCODINGS, Encoding

LARGE = (1 << 10, (1 << 11) + 3)
"""More than a tile, and no multiple of any step."""


def widen(array: NDArray[Any]) -> NDArray[np.float64]:
    """Return `array` in float64; a signalling NaN in it is no matter."""
    with np.errstate(invalid="ignore"):
        return array.astype(np.float64)


class EncodingLaws:
    """The laws, for each of `dtypes`."""

    encoding: Encoding
    dtypes: Sequence[Dtype]

    @abstractmethod
    def stored_samples(self, dtype: Dtype) -> NDArray[Any]:
        """Return stored numbers, one-dimensional: all patterns where they can be listed, else many of each sort."""

    @abstractmethod
    def decode_reference(self, stored: NDArray[Any]) -> NDArray[np.float64]:
        """Return the exact values of `stored`, by other means than the encoding's."""

    @abstractmethod
    def encode_reference(self, values: NDArray[Any], dtype: Dtype) -> NDArray[Any]:
        """Return `values` rounded once, to nearest with ties to even, by other means than the encoding's."""

    @abstractmethod
    def value_samples(self, dtype: Dtype) -> NDArray[Any]:
        """Return numbers of the work form to be rounded: values, midpoints, their neighbours, the specials."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=lambda dtype: dtype.name)

    def decode(self, stored: NDArray[Any], dtype: Dtype) -> NDArray[Any]:
        out = np.full(stored.shape, 7, dtype=self.encoding.work_dtype(dtype))
        self.encoding.decode(stored, out)
        return out

    def encode(self, values: NDArray[Any], dtype: Dtype) -> NDArray[Any]:
        out = np.ones(values.shape, dtype=dtype.numpy())
        self.encoding.encode(values.copy(), out)
        return out

    def test_its_room_finds_it(self) -> None:
        assert any(member is self.encoding for _, member in ENCODINGS)

    def test_it_accepts_its_forms_and_no_others(self) -> None:
        accepted = {name for name, dtype in BY_NAME.items() if self.encoding.accepts(dtype)}
        assert accepted == {dtype.name for dtype in self.dtypes}

    def test_tiles_are_float32_unless_the_weight_is_wider(self, dtype: Dtype) -> None:
        assert self.encoding.work_dtype(dtype) == (np.float64 if dtype.name == "float64" else np.float32)

    def test_decoding_is_exact(self, dtype: Dtype) -> None:
        stored = self.stored_samples(dtype)
        found, expected = widen(self.decode(stored, dtype)), self.decode_reference(stored)
        np.testing.assert_array_equal(found, expected)
        assert (np.signbit(found) == np.signbit(expected))[~np.isnan(expected)].all()

    def test_decoding_leaves_the_stored_numbers(self, dtype: Dtype) -> None:
        stored = self.stored_samples(dtype)
        before = stored.tobytes()
        stored.setflags(write=False)
        self.decode(stored, dtype)
        assert stored.tobytes() == before

    @pytest.mark.parametrize("shape", [(0, 3), (5, 7), (3, 70_001)], ids=str)
    def test_adding_is_decoding_and_a_sum(self, dtype: Dtype, shape: tuple[int, ...]) -> None:
        stored = np.resize(self.stored_samples(dtype), shape)
        sums = np.random.default_rng(7).standard_normal(shape).astype(self.encoding.work_dtype(dtype))
        with np.errstate(all="ignore"):
            expected = self.decode(stored, dtype) + sums
            self.encoding.add(stored, sums)
        nan = np.isnan(expected)
        assert (np.isnan(sums) == nan).all()
        assert sums[~nan].tobytes() == expected[~nan].tobytes()

    def test_encoding_rounds_once_to_the_nearest(self, dtype: Dtype) -> None:
        values = self.value_samples(dtype)
        found, expected = self.encode(values, dtype), self.encode_reference(values, dtype)
        finite = ~np.isnan(self.decode_reference(expected))
        assert finite.any()
        assert found[finite].tobytes() == expected[finite].tobytes()
        assert np.isnan(self.decode_reference(found[~finite])).all()

    def test_what_was_decoded_encodes_to_itself(self, dtype: Dtype) -> None:
        stored = self.stored_samples(dtype)
        again = self.encode(self.decode(stored, dtype), dtype)
        nan = np.isnan(self.decode_reference(stored))
        assert again[~nan].tobytes() == stored[~nan].tobytes()
        assert np.isnan(self.decode_reference(again[nan])).all()

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (2, 3, 5)], ids=str)
    def test_any_shape_will_do(self, dtype: Dtype, shape: tuple[int, ...]) -> None:
        stored = np.resize(self.stored_samples(dtype)[1:], shape)
        tile = self.decode(stored, dtype)
        np.testing.assert_array_equal(widen(tile), self.decode_reference(stored.ravel()).reshape(shape))
        assert self.encode(tile, dtype).shape == shape

    def test_strides_do_not_matter(self, dtype: Dtype) -> None:
        whole = np.resize(self.stored_samples(dtype)[1:], (6, 22))
        for view in (whole.T, whole[::2, 3:], whole[:, ::-3], whole.reshape(2, 3, 22).transpose(2, 0, 1)):
            out = np.zeros(view.shape[::-1], dtype=self.encoding.work_dtype(dtype)).T
            self.encoding.decode(view, out)
            np.testing.assert_array_equal(out, self.decode(np.ascontiguousarray(view), dtype))
            frame = np.zeros((*view.shape[:-1], 2 * view.shape[-1]), dtype=dtype.numpy())
            self.encoding.encode(out.copy(order="F"), frame[..., ::2])
            assert frame[..., ::2].tobytes() == self.encode(out, dtype).tobytes()
            assert not widen(frame[..., 1::2]).any()

    def test_nan_stays_nan(self, dtype: Dtype) -> None:
        work = self.encoding.work_dtype(dtype)
        patterns = {4: (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF)}.get(work.itemsize)
        values = np.array(patterns, dtype=np.uint32).view(work) if patterns else np.array([np.nan, -np.nan])
        assert np.isnan(self.decode(self.encode(values, dtype), dtype)).all()

    def test_no_temporary_of_the_size_of_a_tile(self, dtype: Dtype) -> None:
        stored = np.resize(self.stored_samples(dtype)[1:], LARGE)
        tile = self.decode(stored, dtype)
        out = np.empty_like(stored)
        self.encode(tile[:1], dtype)
        tracemalloc.start()
        try:
            self.encoding.decode(stored, tile)
            self.encoding.encode(tile, out)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < tile.nbytes / 4

    def test_threads_do_not_meet(self, dtype: Dtype) -> None:
        samples = np.resize(self.stored_samples(dtype)[1:], (4, 70_001))
        expected = [self.decode(row, dtype) for row in samples]
        found: list[NDArray[Any]] = [np.empty(0)] * len(samples)

        def work(index: int) -> None:
            for _ in range(5):
                found[index] = self.decode(self.encode(expected[index], dtype), dtype)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(samples))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
