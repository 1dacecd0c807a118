"""What codes that are only decoded have in common: packed numbers, a base class, tables of four-bit floats."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from loraformat.encodings import Coding, Fit

Array = NDArray[Any]

E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Values of the sixteen patterns of float4_e2m1fn."""


class ReadOnlyCoder:
    """A `Coder` that decodes; the plan refuses to have anything encoded.

    Args:
        coding: the weight's.
    """

    def __init__(self, coding: Coding) -> None:
        self.coding = coding

    @abstractmethod
    def decode(self, codes: Array, rows: range, out: NDArray[np.float32]) -> None:
        """Write the values of the stored rows into `out: (rows, columns)`."""

    @abstractmethod
    def steps(self, rows: range, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return how far codes that are neighbours are apart."""

    def encode(self, values: NDArray[np.float32], rows: range, out: Array) -> NoReturn:
        """Fail: nothing is encoded."""
        raise _NEVER

    def start_fit(self) -> Fit:
        """Fail: nothing is encoded."""
        raise _NEVER

    def start_afresh(self) -> Fit:
        """Fail: nothing is encoded."""
        raise _NEVER

    def tensors(self) -> Mapping[str, Array]:
        """Return nothing: nothing changes."""
        return {}


_NEVER: Final = NotImplementedError("the plan refuses codes that are only decoded")


def unpack(stored: Array, bits: int) -> NDArray[np.uint8]:
    """Return the codes of bytes `(rows, bytes)`, the lowest bits first, as `(rows, bytes * 8 / bits)`.

    Args:
        stored: the bytes.
        bits: of one code: 2, 4 or 8.
    """
    data = np.ascontiguousarray(stored).view(np.uint8).reshape(len(stored), -1)
    if bits == 8:
        return data
    per, mask = 8 // bits, (1 << bits) - 1
    codes = np.empty((len(data), data.shape[1] * per), np.uint8)
    for place in range(per):
        np.bitwise_and(data >> np.uint8(bits * place), mask, out=codes[:, place::per], casting="unsafe")
    return codes


def spread_groups(values: Array, size: int, columns: int) -> Array:
    """Return one value for each group of a row, `(rows, groups)`, as one for each of its columns."""
    return np.repeat(values, size, axis=1)[:, :columns] if values.shape[1] > 1 else values
