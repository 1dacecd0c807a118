"""HiRA: W∘(1 + B·A), a low-rank factor for every number (Huang et al., ICLR 2025, openreview TwJrTz9cRS)."""

from collections.abc import Mapping
from typing import Any, Final

from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import Change, Nature
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._maps import ElementwiseMap
from loraformat.kinds._matrices import scale_product


class Hira(FactoredKind):
    """The kind `hira`."""

    name = "hira"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W∘(1 + s·B·A)"
    source = "openreview TwJrTz9cRS; PEFT HIRA"
    layouts = (
        Layout(MATRICES, {"hira_A": "rank in", "hira_B": "out rank"}),
        Layout((SlotKind.CONV,), {"hira_A": "rank in *kernel", "hira_B": "out rank *1"}),
        Layout((SlotKind.EMBEDDING,), {"hira_embedding_A": "rank in", "hira_embedding_B": "out rank"}),
    )

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> ElementwiseMap:
        """Return the weight with every number multiplied."""
        down, up = sorted(factors)
        return ElementwiseMap(scale_product(factors[up], factors[down], target.scale))

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: each number is computed from itself."""
        return 1


KIND: Final = Hira()
