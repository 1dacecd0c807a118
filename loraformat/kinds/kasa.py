"""KaSA: a LoRA with a diagonal between its factors, on a base without its smallest singular components.

    lora_A.weight (rank, in)    lora_B.weight (out, rank)    lora_diag (rank)

As many components are cut off the base as the LoRA has rank (Wang et al., arXiv 2412.06071). It takes memory for the
whole weight.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import Change, Nature
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import FactoredKind
from loraformat.kinds._mixing_maps import WholeMap
from loraformat.kinds._singular import cut_smallest
from loraformat.problems import Problem

_DOWN: Final = "lora_A.weight"
_UP: Final = "lora_B.weight"
_MIDDLE: Final = "lora_diag"


class Kasa(FactoredKind):
    """The kind `kasa`."""

    name = "kasa"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W without its smallest singular components + s·B·diag(d)·A"
    source = "arXiv 2412.06071; PEFT LoraConfig.kasa_config"
    layouts = (Layout((SlotKind.LINEAR,), {_DOWN: "rank in", _UP: "out rank", _MIDDLE: "rank"}),)

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of a rank that leaves nothing of the base."""
        if axes["rank"] < min(axes["out"], axes["in"]):
            return []
        found = f"rank {axes['rank']} for a weight ({axes['out']}, {axes['in']})"
        return [Problem("LF203", target.name, found, "less than its smaller side")]

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> WholeMap:
        """Return f for the matrix `(out, in)`."""
        down, up, middle = (factors[role].astype(np.float64) for role in (_DOWN, _UP, _MIDDLE))

        def compute(weight: NDArray[np.float64]) -> NDArray[np.float64]:
            return cut_smallest(weight, len(middle)) + (up * (target.scale * middle)) @ down

        return WholeMap((change.shape[0], change.shape[1]), compute)

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: the result comes from a pass before."""
        return 1


KIND: Final = Kasa()
