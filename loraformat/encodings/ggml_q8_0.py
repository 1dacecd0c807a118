"""ggml's Q8_0: blocks of 32 numbers of a row, each a float16 scale and 32 codes of 8 bits, one after the other.

Scales lie between the codes, so each block is encoded by itself: its scale is the largest number over 127, and codes
are rounded with the scale as it was before its own rounding to float16, halves away from zero, as ggml's
`quantize_row_q8_0_ref` has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding

Array = NDArray[Any]
_BLOCK: Final = np.dtype([("scale", "<f2"), ("codes", "i1", 32)])
_MOST: Final = 127


class Q80Coder:
    """A `Coder`, and its own `Fit`: nothing hangs on other blocks."""

    def decode(self, codes: Array, rows: range, out: NDArray[np.float32]) -> None:
        """Write `code * scale`."""
        blocks = _open(codes, out.shape)
        scales = blocks["scale"].astype(np.float32)[..., None]
        np.multiply(blocks["codes"], scales, out=out.reshape(*blocks.shape, -1), casting="same_kind")

    def encode(self, values: NDArray[np.float32], rows: range, out: Array) -> None:
        """Write scales and codes; a block of zeros has a scale of zero."""
        blocks = _open(out, values.shape)
        numbers = values.reshape(*blocks.shape, -1)
        scales = np.abs(numbers).max(axis=-1) / np.float32(_MOST)
        inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
        steps = numbers * inverse[..., None]
        blocks["codes"] = np.trunc(steps + np.copysign(np.float32(0.5), steps))
        blocks["scale"] = scales

    def steps(self, rows: range, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the steps that the values have, were they encoded."""
        numbers = np.abs(values).reshape(len(values), -1, _BLOCK["codes"].shape[0])
        return np.repeat(numbers.max(axis=-1) / np.float32(_MOST), numbers.shape[-1], axis=1)

    def see(self, codes: Array, rows: range, values: NDArray[np.float32], delta: NDArray[np.float32]) -> None:
        """Do nothing: blocks are encoded by themselves."""

    def finish(self) -> Coder:
        """Return the coder."""
        return self

    def start_fit(self) -> "Q80Coder":
        """Return the coder."""
        return self

    def start_afresh(self) -> "Q80Coder":
        """Return the coder."""
        return self

    def tensors(self) -> Mapping[str, Array]:
        """Return nothing: scales lie between the codes."""
        return {}


def _open(stored: Array, shape: tuple[int, ...]) -> Array:
    """Return the blocks `(rows, blocks of a row)` over the bytes of rows."""
    return stored.view(np.uint8).reshape(-1).view(_BLOCK).reshape(shape[0], -1)


@dataclass(frozen=True, slots=True)
class GgmlQ80:
    """ggml's Q8_0."""

    name: str = "ggml_q8_0"
    bits: int = 8
    is_read_only: bool = False

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        return Q80Coder()


CODED: Final = GgmlQ80()
