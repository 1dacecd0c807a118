"""LLaMA-Adapter v2 as litgpt has it: scale∘(W·x + b + bias) in every linear layer (arXiv 2304.15010).

    adapter_scale    (out,)
    adapter_bias     (out,)

The merged layer is scale∘W and scale∘(b + bias). A base without a bias has no place for the second, and the merge says
so. (What the first version adds, gated attention over learned tokens, is in no weight.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import UNKNOWN, Change, Nature, WeightMap
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._maps import ScaleMap, Tiles

_SCALE: Final = "adapter_scale"
_BIAS: Final = "adapter_bias"


@dataclass(frozen=True, slots=True)
class ShiftedScaleMap:
    """scale∘(b + shift) for a bias as a column, or as a row.

    Attributes:
        scale: the scale, in the shape of the matrix.
        shift: what is added before, in the shape of the matrix.
    """

    scale: NDArray[Any]
    shift: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.scale.shape[0], self.scale.shape[1]

    @property
    def row_block(self) -> int:
        """Each number is computed from itself."""
        return 1

    def transposed(self) -> "ShiftedScaleMap":
        """Return the same function of the transposed matrix."""
        return replace(self, scale=self.scale.T, shift=self.shift.T)

    def prepare(self, tiles: Tiles) -> "ShiftedScaleMap":
        """Return the map; it needs no pass."""
        return self

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop` of f(b) into `out`."""
        np.add(base, self.shift[start:stop], out=out)
        np.multiply(out, self.scale[start:stop], out=out)


class AdapterV2(FactoredKind):
    """The kind `adapter_v2`."""

    name = "adapter_v2"
    nature = Nature.FUNCTION_OF_BASE
    formula = "scale∘W, scale∘(b + bias)"
    source = "litgpt, adapter_v2; arXiv 2304.15010"
    layouts = (Layout(MATRICES, {_SCALE: "out", _BIAS: "out"}),)
    rank_axis = ""
    is_scaled = False
    is_beside_bias = False

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return the change of the weight, `(out, in)`, and that of the bias."""
        out = self.axes(target)["out"]
        return (
            Change("weight", (out, UNKNOWN), self.nature, (_SCALE,), target.slot),
            Change("bias", (out,), self.nature, (_SCALE, _BIAS), SlotKind.PARAMETER),
        )

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> WeightMap:
        """Return f for the weight `(out, in)`, or for the bias as `(out, 1)`."""
        scale = factors[_SCALE][:, None]
        if change.parameter == "weight":
            return ScaleMap((change.shape[0], change.shape[1]), scale)
        return ShiftedScaleMap(scale, factors[_BIAS][:, None])

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: each number is computed from itself."""
        return 1


KIND: Final = AdapterV2()
