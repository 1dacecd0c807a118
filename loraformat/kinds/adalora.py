"""AdaLoRA: W + s·B·(E∘A), singular values E of their own (Zhang et al., arXiv 2303.10512).

PEFT divides alpha by the rank that training began with; that quotient is the scale here, whatever rank is left.
"""

from collections.abc import Mapping
from typing import Any, Final

from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._matrices import scale_product


class Adalora(FactoredKind):
    """The kind `adalora`."""

    name = "adalora"
    formula = "W + s·B·(E∘A)"
    source = "arXiv 2303.10512; PEFT ADALORA"
    layouts = (Layout(MATRICES, {"lora_A": "rank in", "lora_B": "out rank", "lora_E": "rank 1"}),)

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        return scale_product(factors["lora_B"] * factors["lora_E"].reshape(1, -1), factors["lora_A"], scale)


KIND: Final = Adalora()
