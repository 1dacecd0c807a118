"""Arithmetic of codes with scales and zero points: `(code - zero point) * scale`, in blocks of a matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.encodings import Coder, Coding

Array = NDArray[Any]
_NEVER: Final = np.float32(np.inf)


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a matrix is cut into blocks.

    Attributes:
        matrix: rows and columns.
        block: rows and columns of one block.
    """

    matrix: tuple[int, int]
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)` of the blocks."""
        return -(-self.matrix[0] // self.block[0]), -(-self.matrix[1] // self.block[1])

    def spread(self, values: Array, rows: range) -> Array:
        """Return one value for each block as what broadcasts to the stored rows `rows`."""
        if self.block[0] >= self.matrix[0]:
            part = values[:1]
        elif self.block[0] == 1:
            part = values[rows.start : rows.stop]
        else:
            part = values[np.arange(rows.start, rows.stop) // self.block[0]]
        if self.block[1] == 1 or self.shape[1] == 1:
            return part
        return np.repeat(part, self.block[1], axis=1)[:, : self.matrix[1]]

    def reduce(self, function: np.ufunc, values: Array, rows: range, held: Array) -> None:
        """Fold the stored rows `rows` into `held`, one value for each block, with a ufunc such as `np.maximum`."""
        if self.shape[1] == 1:
            values = function.reduce(values, axis=1, keepdims=True)
        elif self.block[1] > 1:
            values = function.reduceat(values, np.arange(0, self.matrix[1], self.block[1]), axis=1)
        if self.block[0] == 1:
            function(held[rows.start : rows.stop], values, out=held[rows.start : rows.stop])
            return
        blocks = np.arange(rows.start, rows.stop) // self.block[0]
        starts = np.flatnonzero(np.diff(blocks, prepend=-1))
        places = blocks[starts]
        held[places] = function(held[places], function.reduceat(values, starts, axis=0))


@dataclass(frozen=True, slots=True)
class Layout:
    """How codes lie in their tensor.

    Attributes:
        least: the first code.
        most: the last one.
        narrow: first and last code of what leaves out a bit, or half of the codes; quantisers do so (`reduce_range`)
            for processors that would overflow otherwise.
        bits: of one code; fewer than 8 lie in one byte, the lowest bits first.
        signed: whether codes have a sign.
    """

    least: int
    most: int
    narrow: tuple[int, int]
    bits: int = 8
    signed: bool = False

    @property
    def per_byte(self) -> int:
        """How many codes lie in one byte, or begin there."""
        return max(8 // self.bits, 1)

    @property
    def form(self) -> str:
        """Codes of whole bytes as numpy calls them."""
        return f"<{'i' if self.signed else 'u'}{max(self.bits // 8, 1)}"

    def unpack(self, stored: Array, columns: int) -> Array:
        """Return codes `(rows, columns)`."""
        if self.per_byte == 1:
            return stored.view(self.form).reshape(len(stored), columns)
        flat, per, mask = stored.view(np.uint8).reshape(len(stored), -1), self.per_byte, (1 << self.bits) - 1
        codes = np.empty((len(flat), per * flat.shape[1]), np.int8)
        for place in range(per):
            codes[:, place::per] = flat >> (place * self.bits) & mask
        sign = 1 << (self.bits - 1)
        return ((codes ^ sign) - sign if self.signed else codes)[:, :columns]

    def pack(self, codes: Array, out: Array) -> None:
        """Write codes into their tensor's rows."""
        if self.per_byte == 1:
            np.copyto(out.view(self.form).reshape(codes.shape), codes, casting="unsafe")
            return
        per, packed = self.per_byte, out.view(np.uint8).reshape(len(out), -1)
        parts = codes.astype(np.int8).view(np.uint8) & ((1 << self.bits) - 1)
        if parts.shape[1] % per:
            parts = np.pad(parts, ((0, 0), (0, -parts.shape[1] % per)))
        np.copyto(packed, parts[:, 0::per])
        for place in range(1, per):
            np.bitwise_or(packed, parts[:, place::per] << (place * self.bits), out=packed)


class AffineCoder:
    """A `Coder`.

    Args:
        coding: where scale and zero point of an element are.
        layout: how the codes lie.
        scales: `(blocks down, blocks across)` in the stored form.
        zeros: the same of float32, or of one element.
        stored_zeros: their bytes, where they may change.
    """

    def __init__(
        self, coding: Coding, layout: Layout, scales: Array, zeros: Array, stored_zeros: Array | None = None
    ) -> None:
        self.coding = coding
        self.layout = layout
        self.blocks = Blocks(coding.matrix, coding.block)
        self.stored_scales = scales
        self.scales = scales.astype(np.float32) * np.float32(coding.unit)
        self.zeros = zeros
        self.stored_zeros = stored_zeros
        self._are_codes = bool((zeros == np.rint(zeros)).all())

    def decode(self, codes: Array, rows: range, out: NDArray[np.float32]) -> None:
        """Write `(code - zero point) * scale`, of which only the product is rounded."""
        np.subtract(self.layout.unpack(codes, out.shape[1]), self._zeros(rows), out=out, casting="unsafe")
        np.multiply(out, self.blocks.spread(self.scales, rows), out=out)
        out[:, out.shape[1] - self.coding.padding :] = 0

    def encode(self, values: NDArray[np.float32], rows: range, out: Array) -> None:
        """Write the nearest codes; of a block whose scale is zero, its zero points."""
        scales, zeros = self.blocks.spread(self.scales, rows), self._zeros(rows)
        quotients = np.divide(values, np.where(scales == 0, _NEVER, scales))
        if not self._are_codes:
            np.add(quotients, zeros, out=quotients)
        np.rint(quotients, out=quotients)
        if self._are_codes:  # Quantisers add them after rounding.
            np.add(quotients, zeros, out=quotients)
        np.nan_to_num(quotients, copy=False)
        np.clip(quotients, self.layout.least, self.layout.most, out=quotients)
        if self.coding.padding:
            width = values.shape[1] - self.coding.padding
            quotients[:, width:] = self.layout.unpack(out, values.shape[1])[:, width:]
        self.layout.pack(quotients, out)

    def steps(self, rows: range, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scales without their signs."""
        return np.abs(self.blocks.spread(self.scales, rows))

    def start_fit(self) -> "AffineFit":
        """Return what finds other scales."""
        return AffineFit(self)

    def start_afresh(self) -> "AffineFit":
        """Return what finds other scales, and zero points where these may change."""
        return FreshFit(self)

    def tensors(self) -> Mapping[str, Array]:
        """Return the scales, and zero points that may have changed, in their stored form."""
        held = {} if self.stored_zeros is None else {"zero_points": self.stored_zeros}
        return {"scales": self.stored_scales, **held}

    def with_scales(self, scales: Array, zeros: Array | None = None) -> "AffineCoder":
        """Return the same with other scales, rounded to the stored form, and other zero points."""
        with np.errstate(over="ignore"):
            stored = (scales / np.float32(self.coding.unit)).astype(self.stored_scales.dtype)
        scales = np.where(scales == self.scales, self.stored_scales, stored)
        if zeros is None or self.stored_zeros is None:
            return AffineCoder(self.coding, self.layout, scales, self.zeros, self.stored_zeros)
        stored = _pack_zeros(zeros, self.layout, self.stored_zeros)
        return AffineCoder(self.coding, self.layout, scales, zeros.astype(np.float32), stored)

    def _zeros(self, rows: range) -> Array:
        return self.zeros if self.zeros.size == 1 else self.blocks.spread(self.zeros, rows)


class AffineFit:
    """A `Fit`: keeps zero points, and takes for each block the smallest scale whose codes reach its values.

    Scales may be negative where some are in the base: quantisers do so to use the one code more below zero than above.

    Args:
        coder: how the weight is coded now.
    """

    def __init__(self, coder: AffineCoder) -> None:
        self._coder = coder
        shape = coder.blocks.shape
        self._most, self._least, self._change = np.zeros((3, *shape), np.float32)
        self._codes = (coder.layout.most, coder.layout.least)

    def see(self, codes: Array, rows: range, values: NDArray[np.float32], delta: NDArray[np.float32]) -> None:
        """Take in the extremes of a tile; codes tell how much of their range the quantiser uses."""
        blocks = self._coder.blocks
        blocks.reduce(np.maximum, values, rows, self._most)
        blocks.reduce(np.minimum, values, rows, self._least)
        blocks.reduce(np.maximum, np.abs(delta), rows, self._change)
        found = self._coder.layout.unpack(codes, values.shape[1])
        self._codes = (min(self._codes[0], int(found.min())), max(self._codes[1], int(found.max())))

    def finish(self) -> Coder:
        """Return the coder with the new scales."""
        coder = self._coder
        first, last = self._find_range()
        zeros = np.broadcast_to(coder.zeros, coder.blocks.shape)
        down, up = first - zeros, last - zeros
        with np.errstate(divide="ignore", invalid="ignore"):
            scales = np.maximum(_reach(self._most, up), _reach(self._least, down))
            if (coder.scales < 0).any():
                turned = np.maximum(_reach(self._most, -down), _reach(self._least, -up))
                scales = np.where(turned < scales, -turned, scales)
        kept = (self._change == 0) | (scales == 0)
        return coder.with_scales(np.where(kept, coder.scales, scales))

    def _find_range(self) -> tuple[int, int]:
        """Return the first and the last code that the quantiser gives."""
        layout = self._coder.layout
        least, most = self._codes
        if layout.narrow[0] <= least and most <= layout.narrow[1]:
            return layout.narrow
        symmetric = (
            layout.least < 0 and least > layout.least
        )  # int8 from -127 up: so quantisers keep zero in the middle.
        return (layout.least + 1 if symmetric else layout.least), layout.most


class FreshFit(AffineFit):
    """A `Fit` that gives the scales that a quantiser would, had it seen the new values: as onnxruntime's of blocks.

    With zero points of their own, blocks have scales by which the codes reach from the least to the largest value, zero
    among them. Without, the number furthest from zero gets the first code, whose scale is negative for one above. Where
    no scale of the base is negative, another sort of quantiser has made it, and the smallest that reaches is taken.
    """

    def finish(self) -> Coder:
        """Return the coder with the new scales and zero points."""
        coder = self._coder
        if coder.stored_zeros is not None and (coder.zeros != coder.zeros.flat[0]).any():
            return self._finish_ranges()
        if not (coder.scales < 0).any():
            return super().finish()
        down = coder.layout.least - np.broadcast_to(coder.zeros, coder.blocks.shape)
        scales = np.where(self._most > -self._least, self._most, self._least) / down
        return coder.with_scales(np.where((self._change == 0) | (scales == 0), coder.scales, scales))

    def _finish_ranges(self) -> Coder:
        coder, least, most = self._coder, self._coder.layout.least, self._coder.layout.most
        scales = (self._most - self._least) / np.float32(most - least)
        kept = (self._change == 0) | (scales == 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            zeros = np.floor(np.clip(least - self._least / scales, least, most) + np.float32(0.5))
        return coder.with_scales(np.where(kept, coder.scales, scales), np.where(kept, coder.zeros, zeros))


def _reach(extreme: Array, codes: Array) -> Array:
    """Return the scale at which `codes` steps reach an extreme; zero where there is no way to go, or no need."""
    return np.where((extreme == 0) | (codes == 0), 0, extreme / np.where(codes == 0, 1, codes)).astype(np.float32)


def bind_affine(coding: Coding, layout: Layout) -> AffineCoder:
    """Return the coder of a weight, its scales and zero points read."""
    shape = Blocks(coding.matrix, coding.block).shape
    scales = coding.companions["scales"].read().reshape(shape)
    held = coding.companions.get("zero_points")
    if held is None:
        return AffineCoder(coding, layout, scales, np.full((1, 1), coding.zero, np.float32))
    if held.dtype.family == "float":
        return AffineCoder(coding, layout, scales, held.read().astype(np.float32).reshape(shape))
    stored = held.read_bytes()
    rows, columns = _arrange_zeros(stored, layout, shape)
    zeros = layout.unpack(stored.reshape(rows, -1), columns).astype(np.float32).reshape(shape)
    return AffineCoder(coding, layout, scales, zeros, None if coding.zeros_fixed else stored)


def _arrange_zeros(stored: Array, layout: Layout, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns in which zero points are stored: packed ones are padded row by row, or at the end."""
    if layout.per_byte == 1 or stored.size == shape[0] * -(-shape[1] // layout.per_byte):
        return shape
    return 1, shape[0] * shape[1]


def _pack_zeros(zeros: Array, layout: Layout, stored: Array) -> Array:
    """Return zero points `(blocks down, blocks across)` as they are stored; what fills up a byte stays."""
    rows, columns = _arrange_zeros(stored, layout, zeros.shape)
    out = np.empty_like(stored)
    layout.pack(zeros.reshape(rows, columns), out.reshape(rows, -1))
    if columns % layout.per_byte:
        used = (1 << (columns % layout.per_byte * layout.bits)) - 1
        out.reshape(rows, -1)[:, -1] |= stored.reshape(rows, -1)[:, -1] & (0xFF ^ used)
    return out
