"""ggml's forms of few bits, from Q4_0 and Q6_K to MXFP4: decoded, never encoded.

A block has its scales between its codes. llama.cpp finds codes of the K forms by search, and by an importance matrix
where it has one; here they are read.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding
from loraformat.encodings._ggml_forms import FORMS, Form
from loraformat.encodings._read_only import ReadOnlyCoder

Array = NDArray[Any]
_SAME: Final = np.float32(1e-6)
"""Of the largest number: what is nearer than that is one value, rounded."""


class BlockCoder(ReadOnlyCoder):
    """A `Coder` that decodes.

    Args:
        coding: the weight's; `block` is one row of as many columns as a block has numbers.
        form: what the bytes of a block stand for.
    """

    def __init__(self, coding: Coding, form: Form) -> None:
        super().__init__(coding)
        self._form = form

    def decode(self, codes: Array, rows: range, out: NDArray[np.float32]) -> None:
        """Write the numbers of the blocks."""
        count = out.size // self.coding.block[1]
        blocks = np.ascontiguousarray(codes).view(np.uint8).reshape(count, -1)
        np.copyto(out, self._form.decode(blocks).reshape(out.shape))

    def steps(self, rows: range, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the widest distance of codes that are neighbours, by the narrowest that is seen in each part."""
        parts = np.sort(values.reshape(-1, self._form.part), axis=1)
        gaps = np.diff(parts, axis=1)
        gaps[gaps <= _SAME * np.abs(parts).max(axis=1, keepdims=True)] = np.inf
        narrowest = gaps.min(axis=1)
        found = np.isfinite(narrowest)
        narrowest[~found] = narrowest[found].max(initial=0)  # All its codes are the same, and tell no step.
        steps = np.repeat(narrowest * np.float32(self._form.widest), self._form.part)
        return steps.reshape(values.shape)


@dataclass(frozen=True, slots=True)
class GgmlBlocks:
    """ggml's forms of few bits."""

    name: str = "ggml_blocks"
    bits: int = 4
    is_read_only: bool = True

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        return BlockCoder(coding, FORMS[form.name])


CODED: Final = GgmlBlocks()
