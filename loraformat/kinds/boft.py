"""BOFT: the weight turned by butterflies of orthogonal blocks, its rows scaled (Liu et al., arXiv 2311.06243).

    boft_R (1, blocks, b, b)    boft_s (out, 1), of a convolution (1, out)

Several butterflies (m > 1) run in PEFT only with an extension for CUDA, which nothing here was compared with: refused.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import REST, UNKNOWN, Change, Nature
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import MATRICES, FactoredKind, check_width
from loraformat.kinds._maps import BlockMap
from loraformat.kinds._rotations import turn_by_cayley
from loraformat.problems import Problem


class Boft(FactoredKind):
    """The kind `boft`."""

    name = "boft"
    nature = Nature.FUNCTION_OF_BASE
    formula = "(W·Dᵀ)∘s, orthogonal blocks on the diagonal of D"
    source = "arXiv 2311.06243; PEFT BOFT"
    layouts = (
        Layout(MATRICES, {"boft_R": "factors blocks size size", "boft_s": "out 1"}),
        Layout((SlotKind.CONV,), {"boft_R": "factors blocks size size", "boft_s": "1 out"}),
    )
    is_scaled = False
    rank_axis = ""

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of several butterflies."""
        if axes["factors"] == 1:
            return []
        return [Problem("LF209", target.name, f"{axes['factors']} butterflies", "one (boft_n_butterfly_factor of 1)")]

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in)`; of a kernel the blocks tell the number of its elements."""
        axes = self.axes(target)
        if target.slot is SlotKind.CONV:
            return axes["out"], UNKNOWN, REST
        return axes["out"], axes["blocks"] * axes["size"]

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of a weight that the blocks do not cover."""
        axes = self.axes(target)
        return check_width(target, change, axes["blocks"] * axes["size"])

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> BlockMap:
        """Return the turned and scaled weight."""
        whole = factors["boft_R"][0].astype(np.float64)
        blocks = turn_by_cayley((whole - whole.transpose(0, 2, 1)) / 2).astype(factors["boft_R"].dtype)
        shape = change.shape[0], int(np.prod(change.shape[1:]))
        turned_back = np.ascontiguousarray(blocks.transpose(0, 2, 1))
        return BlockMap(shape, turned_back, is_on_rows=False, numbers=factors["boft_s"].reshape(-1, 1))

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return the rows of a block, where the stored matrix is transposed."""
        return self.axes(target)["size"] if transposed else 1


KIND: Final = Boft()
