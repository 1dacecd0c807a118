"""Orthogonal fine-tuning as LyCORIS and kohya have it: blocks of outputs are rotated (arXiv 2306.07280).

    oft_blocks    (blocks, b, b)
    rescale       (out, 1 ...): what each output is multiplied by in the end

Q = B − Bᵀ and R = (I + Q)·(I − Q)⁻¹ of every block; its outputs become Rᵀ·W, as LyCORIS multiplies. (PEFT's OFT rotates
inputs.)
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import Change, WeightMap
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES
from loraformat.kinds._mixing_maps import BlockMap
from loraformat.kinds._output_rotations import BLOCKS, RESCALE, OutputRotation


class LycorisOft(OutputRotation):
    """The kind `lycoris_oft`."""

    name = "lycoris_oft"
    formula = "rescale∘(blockdiag(R)ᵀ·W)"
    source = "LyCORIS 4.1, module diag_oft; kohya, networks/oft.py"
    layouts = (
        Layout(MATRICES, {BLOCKS: "blocks size size"}, {RESCALE: "out 1"}),
        Layout((SlotKind.CONV,), {BLOCKS: "blocks size size"}, {RESCALE: "out 1 *1"}),
    )

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> WeightMap:
        """Return f for the matrix `(out, in * kernel)`."""
        shape = change.shape[0], math.prod(change.shape[1:])
        turned = np.ascontiguousarray(self.rotations(target, factors).swapaxes(-1, -2))
        return BlockMap(shape, turned, is_on_rows=True, numbers=self.rescaling(factors))

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return the size of a block of outputs, where these are the rows."""
        return 1 if transposed else self.axes(target)["size"]


KIND: Final = LycorisOft()
