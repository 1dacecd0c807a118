"""8-bit floats with scales beside them: one for the tensor, for each row, or for each block of a matrix.

`value = float8 * scale`, as checkpoints of DeepSeek V3 (`weight_scale_inv`, blocks of 128 x 128), compressed-tensors,
FBGEMM and ModelOpt (`weight_scale`) and ComfyUI (`scale_weight`) have it. Four significant bits or fewer: what is
decoded, changed a little and encoded again has lost most of the change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding, Fit
from loraformat.encodings._affine import Blocks
from loraformat.encodings.plain import ENCODING as PLAIN

Array = NDArray[Any]
_NEVER: Final = np.float32(np.inf)
_ABOVE_ROUNDING: Final = np.float32(1 + 2**-16)
"""The quotient of a product may lie a little below the power of two that it was."""


class Float8Coder:
    """A `Coder`.

    Args:
        coding: where the scale of an element is.
        form: the 8-bit form.
        scales: `(blocks down, blocks across)` in the stored form.
    """

    def __init__(self, coding: Coding, form: Dtype, scales: Array) -> None:
        self.coding = coding
        self.form = form
        self.blocks = Blocks(coding.matrix, coding.block)
        self.stored_scales = scales
        self.scales = scales.astype(np.float32)
        self._limits: Any = ml_dtypes.finfo(form.numpy())  # type: ignore[no-untyped-call]

    @property
    def largest(self) -> float:
        """The largest number of the form."""
        return float(self._limits.max)

    def decode(self, codes: Array, rows: range, out: NDArray[np.float32]) -> None:
        """Write `float8 * scale`, of which only the product is rounded."""
        PLAIN.decode(codes.view(self.form.numpy()).reshape(out.shape), out)
        np.multiply(out, self.blocks.spread(self.scales, rows), out=out)

    def encode(self, values: NDArray[np.float32], rows: range, out: Array) -> None:
        """Write the nearest numbers of the form; what lies beyond the largest becomes that."""
        scales = self.blocks.spread(self.scales, rows)
        quotients = np.divide(values, np.where(scales == 0, _NEVER, scales))
        np.clip(quotients, -self.largest, self.largest, out=quotients)
        PLAIN.encode(quotients, out.view(self.form.numpy()).reshape(values.shape))

    def steps(self, rows: range, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the distance of neighbours in the binade of each value."""
        scales = np.abs(self.blocks.spread(self.scales, rows))
        _, exponents = np.frexp(np.divide(values, np.where(scales == 0, 1, scales)) * _ABOVE_ROUNDING)
        lowest = int(self._limits.minexp)
        binades = np.where(values == 0, lowest, np.maximum(exponents - 1, lowest)) - int(self._limits.nmant)
        return np.asarray(np.ldexp(np.float32(1), binades) * scales, np.float32)

    def start_fit(self) -> Fit:
        """Return what finds other scales."""
        return Float8Fit(self)

    def start_afresh(self) -> Fit:
        """Return what finds other scales: quantisers take the same ones."""
        return Float8Fit(self)

    def tensors(self) -> Mapping[str, Array]:
        """Return the scales."""
        return {"scales": self.stored_scales}

    def with_scales(self, scales: Array) -> "Float8Coder":
        """Return the same with other scales, rounded to the stored form."""
        with np.errstate(over="ignore"):
            return Float8Coder(self.coding, self.form, scales.astype(self.stored_scales.dtype))


class Float8Fit:
    """A `Fit`: the scale with which the largest number of the form is the largest of the block.

    Args:
        coder: how the weight is coded now.
    """

    def __init__(self, coder: Float8Coder) -> None:
        self._coder = coder
        self._largest, self._change = np.zeros((2, *coder.blocks.shape), np.float32)

    def see(self, codes: Array, rows: range, values: NDArray[np.float32], delta: NDArray[np.float32]) -> None:
        """Take in the extremes of a tile."""
        self._coder.blocks.reduce(np.maximum, np.abs(values), rows, self._largest)
        self._coder.blocks.reduce(np.maximum, np.abs(delta), rows, self._change)

    def finish(self) -> Coder:
        """Return the coder with the new scales; blocks that nothing was added to keep theirs."""
        kept = (self._change == 0) | (self._largest == 0)
        scales = self._largest / np.float32(self._coder.largest)
        return self._coder.with_scales(np.where(kept, self._coder.scales, scales))


@dataclass(frozen=True, slots=True)
class Float8Scaled:
    """8-bit floats with scales."""

    name: str = "float8_scaled"
    bits: int = 4
    is_read_only: bool = False

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        shape = Blocks(coding.matrix, coding.block).shape
        return Float8Coder(coding, form, coding.companions["scales"].read().reshape(shape))


CODED: Final = Float8Scaled()
