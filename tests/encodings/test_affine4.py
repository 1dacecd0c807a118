"""Codes of 4 bits: the laws, and packed zero points."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from laws.coded_laws import CodedLaws, held
from loraformat.dtypes import BY_NAME
from loraformat.encodings import Coding
from loraformat.encodings.affine4 import CODED


def pack(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Pack rows, the first of two codes in the lower four bits."""
    rows = [
        [(int(row[i]) & 15) | ((int(row[i + 1]) & 15 if i + 1 < len(row) else 0) << 4) for i in range(0, len(row), 2)]
        for row in codes
    ]
    return np.array(rows, np.uint8)


class TestAffine4(CodedLaws):
    encoding = CODED
    forms = ("uint8", "int4")

    def store(self, codes: NDArray[Any], form: str) -> NDArray[Any]:
        return pack(codes)

    def bounds(self, form: str) -> tuple[int, int]:
        return (-8, 7) if form == "int4" else (0, 15)

    def store_zeros(self, zeros: NDArray[Any], form: str) -> NDArray[Any]:
        return pack(zeros)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_zero_points_are_padded_row_by_row(blocks: int) -> None:
    """As onnxruntime's quantiser leaves them, in one dimension or two."""
    rng = np.random.default_rng(blocks)
    zeros, codes = rng.integers(0, 16, (6, blocks)), rng.integers(0, 16, (6, 16 * blocks))
    scales = rng.uniform(0.1, 0.2, 6 * blocks).astype(np.float32)
    companions = {"scales": held("s", scales), "zero_points": held("z", pack(zeros).reshape(-1))}
    coder = CODED.bind(Coding("affine4", (6, 16 * blocks), (1, 16), companions), BY_NAME["uint8"])
    out = np.empty(codes.shape, np.float32)
    coder.decode(pack(codes), range(6), out)
    wide = np.repeat(scales.reshape(6, blocks), 16, axis=1)
    np.testing.assert_array_equal(out, (codes - np.repeat(zeros, 16, axis=1)).astype(np.float32) * wide)


def afresh(values: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any] | None) -> Any:
    companions = {"scales": held("s", scales.astype(np.float32))}
    if zeros is not None:
        companions["zero_points"] = held("z", pack(zeros))
    coder = CODED.bind(Coding("affine4", values.shape, (1, 4), companions, 8), BY_NAME["uint8"])
    fit = coder.start_afresh()
    fit.see(np.zeros((len(values), values.shape[1] // 2), np.uint8), range(len(values)), values, values)
    return fit.finish().tensors()


def test_afresh_the_largest_number_has_the_first_code() -> None:
    """onnxruntime's rule for blocks without zero points: max / -8, with its sign."""
    values = np.array([[1, -2, 4, 0, 3, -6, 5, 0]], np.float32)
    found = afresh(values, np.array([[-1.0, 1.0]]), None)
    np.testing.assert_array_equal(found["scales"], [[-0.5, 0.75]])


def test_afresh_scales_that_were_never_negative_are_not() -> None:
    found = afresh(np.array([[1, -2, 4, 0, 3, -8, 5, 0]], np.float32), np.array([[1.0, 1.0]]), None)
    np.testing.assert_array_equal(found["scales"], np.array([[4 / 7, 1]], np.float32))


def test_afresh_zero_points_follow() -> None:
    """onnxruntime's rule for blocks with them: (max - min) / 15 and -min / scale, zero in the range."""
    values = np.array([[1, 15, 4, 0, 3, -6, 9, 0], [2, 3, 4, 15, -15, -3, -1, -9]], np.float32)
    found = afresh(values, np.ones((2, 2)), np.array([[1, 2], [3, 4]]))
    np.testing.assert_array_equal(found["scales"], np.ones((2, 2), np.float32))
    np.testing.assert_array_equal(found["zero_points"].reshape(2, 1), pack(np.array([[0, 6], [0, 15]])))
