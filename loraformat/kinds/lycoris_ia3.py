"""(IA)³ as LyCORIS has it: every output, or every input, of a weight is multiplied by 1 + w (arXiv 2205.05638).

    weight    (out,) or (in,); of a convolution (1, out, 1 ...) or (1, in, 1 ...)

LyCORIS stores w, not 1 + w as PEFT does, and says in the tensor `on_input` which side is meant: here the option
`on_input`, since a weight may be square. The bias stays: LyCORIS trains with W∘(1 + w) in the layer, unless
it was told to bypass.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import UNKNOWN, Change, Nature, WeightMap
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind, Option, flag
from loraformat.kinds._maps import ScaleMap

_ROLE: Final = "weight"


class LycorisIa3(FactoredKind):
    """The kind `lycoris_ia3`."""

    name = "lycoris_ia3"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W∘(1 + s·w), for each output or each input"
    source = "LyCORIS 4.1, module ia3; arXiv 2205.05638"
    layouts = (
        Layout(MATRICES, {_ROLE: "width"}),
        Layout((SlotKind.CONV,), {_ROLE: "1 width *1"}),
    )
    options: ClassVar[Mapping[str, Option]] = {"on_input": flag()}
    rank_axis = ""

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in, *kernel)`, of which the factor tells one."""
        width = self.axes(target)["width"]
        kernel = (len(target.factors[_ROLE].shape) - 2) if target.slot is SlotKind.CONV else 0
        sides = (UNKNOWN, width) if self.option(target, "on_input") else (width, UNKNOWN)
        return *sides, *(UNKNOWN,) * kernel

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> WeightMap:
        """Return f for the matrix `(out, in * kernel)`."""
        numbers = factors[_ROLE].reshape(-1)
        numbers = (1 + numbers.astype(np.float64) * target.scale).astype(numbers.dtype)
        rows, columns = change.shape[0], int(np.prod(change.shape[1:]))
        if self.option(target, "on_input"):
            return ScaleMap((rows, columns), np.repeat(numbers, columns // len(numbers))[None, :])
        return ScaleMap((rows, columns), numbers[:, None])

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: each number is computed from itself."""
        return 1


KIND: Final = LycorisIa3()
