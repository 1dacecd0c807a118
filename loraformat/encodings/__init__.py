"""Stored number forms: one file each, from stored numbers to tiles of float32 and back with one rounding."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.registry import Registry


class Encoding(Protocol):
    """What a file in this folder provides as `ENCODING`.

    Attributes:
        name: for messages and plans.
    """

    name: str

    def accepts(self, dtype: Dtype) -> bool:
        """Say whether weights of this number form are stored in this encoding."""
        ...

    def work_dtype(self, dtype: Dtype) -> np.dtype[Any]:
        """Return the form in which tiles are summed: float32, or float64 for a float64 weight."""
        ...

    def decode(self, stored: NDArray[Any], out: NDArray[Any]) -> None:
        """Write the values of `stored` into `out`, of the same shape and the work form; allocates nothing."""
        ...

    def encode(self, values: NDArray[Any], out: NDArray[Any]) -> None:
        """Round `values` once (nearest, ties to even) into `out`, of the same shape and the stored form.

        What leaves the range becomes infinity, or NaN where the form has no infinity; the caller looks for it.
        `values` may be overwritten.
        """
        ...


ENCODINGS: Registry[Encoding] = Registry("loraformat.encodings", "ENCODING")
