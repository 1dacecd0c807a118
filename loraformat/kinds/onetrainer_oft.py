"""OFT as OneTrainer trains it: inputs are turned in orthogonal blocks (Qiu et al., arXiv 2306.07280).

    oft_R.weight    (blocks, b·(b−1)/2): the entries above the diagonal of a skew matrix Q of every block

R is I + 2Q + 2Q² + 2Q³ + Q⁴, which is near (I + Q)·(I − Q)⁻¹; D has R on its diagonal, and one block stands for all
that there are. A linear layer turns what it is given, which makes W·Dᵀ of its weight; a convolution turns its kernel,
`(out, in * kernel)`, to W·D. With the option `scaled`, Q is divided by 2·√(b−1) first.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import REST, UNKNOWN, Change, Nature
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import FactoredKind, flag, name_options
from loraformat.kinds._mixing_maps import BlockMap
from loraformat.kinds._rotations import count_entries, make_skew, turn_by_neumann
from loraformat.problems import Problem

_ENTRIES: Final = "oft_R.weight"
_TERMS: Final = 5
_MATRIX_AXES: Final = 2


class OneTrainerOft(FactoredKind):
    """The kind `onetrainer_oft`."""

    name = "onetrainer_oft"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W·Dᵀ, of a kernel W·D, orthogonal blocks on the diagonal of D"
    source = "arXiv 2306.07280; OneTrainer, modules/module/LoRAModule.py"
    layouts = (Layout((SlotKind.LINEAR, SlotKind.CONV), {_ENTRIES: "blocks entries"}),)
    options = name_options(scaled=flag(False))
    is_scaled = False
    is_flat = True
    rank_axis = ""

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of entries that make no triangle."""
        if _block_size(axes):
            return []
        return [Problem("LF203", target.name, f"{axes['entries']} entries", "b·(b−1)/2 of them for a block of b")]

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return what the blocks tell, their number and size, unless one stands for all."""
        axes = self.axes(target)
        if target.slot is SlotKind.CONV:
            return UNKNOWN, UNKNOWN, REST
        return UNKNOWN, axes["blocks"] * _block_size(axes) if axes["blocks"] > 1 else UNKNOWN

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of a weight that the blocks do not cover."""
        axes = self.axes(target)
        columns, size = math.prod(change.shape[1:]), _block_size(axes)
        if columns % size == 0 and axes["blocks"] in (1, columns // size):
            return []
        return [Problem("LF405", target.name, f"a weight of {change.shape}", f"{axes['blocks']} blocks of {size}")]

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> BlockMap:
        """Return the turned weight."""
        skew = make_skew(factors[_ENTRIES].astype(np.float64))
        if self.option(target, "scaled"):
            skew = skew / (2 * math.sqrt(skew.shape[1] - 1))
        turns = turn_by_neumann(skew, _TERMS, 1)
        if len(change.shape) == _MATRIX_AXES:
            turns = turns.transpose(0, 2, 1)
        shape = change.shape[0], math.prod(change.shape[1:])
        return BlockMap(shape, np.ascontiguousarray(turns.astype(factors[_ENTRIES].dtype)), is_on_rows=False)

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1, or the size of a block where inputs are the rows of the stored matrix."""
        return _block_size(self.axes(target)) if transposed else 1


def _block_size(axes: Axes) -> int:
    """Return b; 0 for entries that make no triangle."""
    size = int((1 + (1 + 8 * axes["entries"]) ** 0.5) / 2)
    return size if count_entries(size) == axes["entries"] else 0


KIND: Final = OneTrainerOft()
