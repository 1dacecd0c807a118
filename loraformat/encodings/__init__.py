"""Stored number forms: one file each, from stored numbers to tiles of float32 and back with one rounding.

Two sorts: an `Encoding` is of one tensor, number by number. A `CodedEncoding` is of a quantised weight: codes, and
beside them the scales and zero points without which they mean nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.registry import Registry
from loraformat.spans import HeldTensor, StoredTensor


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

    def add(self, stored: NDArray[Any], out: NDArray[Any]) -> None:
        """Add the values of `stored` to `out`, of the work form, as `decode` and a sum would.

        Both are of one shape and contiguous.
        """
        ...

    def encode(self, values: NDArray[Any], out: NDArray[Any]) -> None:
        """Round `values` once (nearest, ties to even) into `out`, of the same shape and the stored form.

        What leaves the range becomes infinity, or NaN where the form has no infinity; the caller looks for it.
        `values` may be overwritten.
        """
        ...


@dataclass(frozen=True, slots=True)
class Coding:
    """How the codes of a quantised weight are to be read: `(code - zero point) * scale`.

    Attributes:
        encoding: the coded encoding's name.
        matrix: rows and columns of the codes, the padding of blocks included.
        block: rows and columns that share a scale; the last block of a row or column may be smaller.
        companions: `scales`, and `zero_points` where there are some.
        zero: the zero point where there are none.
        fixed: why the scales must stay as they are; empty when they may change with the codes.
        read_beside: what else reads the scales where they are stored; a copy of the weight has its own.
        zeros_fixed: why zero points must stay where they are stored, even if all numbers are quantised afresh.
        padding: columns at the end of each row that fill up its last block: they stand for zeros, whatever their codes.
        unit: what stored scales are multiplied by: some quantisers store the largest number instead, so many steps.
        rows_together: rows that lie in one run of bytes, none of which can be read alone.
    """

    encoding: str
    matrix: tuple[int, int]
    block: tuple[int, int]
    companions: Mapping[str, StoredTensor | HeldTensor]
    zero: int = 0
    fixed: str = ""
    zeros_fixed: str = ""
    padding: int = 0
    read_beside: str = ""
    unit: float = 1.0
    rows_together: int = 1


class Coder(Protocol):
    """A coded encoding with the scales and zero points of one weight in hand."""

    def decode(self, codes: NDArray[Any], rows: range, out: NDArray[np.float32]) -> None:
        """Write the values of the stored rows `rows` into `out: (rows, columns)`.

        Args:
            codes: the rows as they are stored: `(rows, bytes of a row)`, or numbers of whole bytes.
            rows: which rows of the matrix they are.
            out: where the values go.
        """
        ...

    def encode(self, values: NDArray[np.float32], rows: range, out: NDArray[Any]) -> None:
        """Write the codes nearest to `values` (ties to even) into `out`, laid out as `decode` takes them.

        What lies beyond the first or last code becomes that code. `values` stay as they are, as do codes of padding.
        """
        ...

    def steps(self, rows: range, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return how far neighbouring codes are apart at decoded `values`: what broadcasts to the stored rows."""
        ...

    def start_fit(self) -> "Fit":
        """Return what finds the scales of other values of this weight."""
        ...

    def start_afresh(self) -> "Fit":
        """Return what finds scales and zero points as its quantiser would, had it seen these values."""
        ...

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """Return scales and, where they may differ from the stored ones, zero points, in their stored forms."""
        ...


class Fit(Protocol):
    """Sees new values of a weight, tile by tile, and gives the coder that holds them best."""

    def see(self, codes: NDArray[Any], rows: range, values: NDArray[np.float32], delta: NDArray[np.float32]) -> None:
        """Take in rows: their codes now, the values that they shall have, and by how much these differ."""
        ...

    def finish(self) -> Coder:
        """Return the new coder. Blocks that nothing was added to keep their scale, and so their codes."""
        ...


class CodedEncoding(Protocol):
    """What a file in this folder provides as `CODED`.

    Attributes:
        name: for messages and plans.
        bits: bits of one code that tell numbers of its size apart: all of a whole number's, the significand's of a
            float. Fewer than 8 lose a small change that is decoded, added and encoded again.
        is_read_only: whether codes are only decoded: what changes cannot be encoded as it was.
    """

    name: str
    bits: int
    is_read_only: bool

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight whose codes are stored as `form`, reading its companions."""
        ...


_USUAL: Final = "plain"
ENCODINGS: Registry[Encoding] = Registry("loraformat.encodings", "ENCODING")
CODED: Registry[CodedEncoding] = Registry("loraformat.encodings", "CODED", "loraformat.coded_encodings")


def choose_encoding(form: Dtype) -> str | None:
    """Return the name of the encoding that reads numbers of a form; None where there is none.

    That of floating-point numbers is asked first: it is nearly always the one, and no other is imported then.
    """
    names = sorted(ENCODINGS.names(), key=lambda name: name != _USUAL)
    return next((name for name in names if (found := ENCODINGS.find(name)) is not None and found.accepts(form)), None)
