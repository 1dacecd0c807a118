"""TinyLoRA: a few numbers mix fixed matrices between fixed factors.

    tinylora_A (rank, in)    tinylora_B (out, rank)    tinylora_P (u, rank, rank)    tinylora_v (u), which targets share

A and B of PEFT's files are of the base's singular vectors. Of an embedding A is (rank, dim) and B (vocabulary, rank).
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._matrices import scale_product

_AXES: Final = {
    "tinylora_A": "rank in",
    "tinylora_B": "out rank",
    "tinylora_P": "u rank rank",
    "tinylora_v": "u",
}


class Tinylora(FactoredKind):
    """The kind `tinylora`."""

    name = "tinylora"
    formula = "W + s·B·(Σ vᵢ·Pᵢ)·A"
    source = "PEFT TINYLORA"
    layouts = (
        Layout(MATRICES, _AXES),
        Layout((SlotKind.EMBEDDING,), {**_AXES, "tinylora_A": "rank out", "tinylora_B": "in rank"}),
    )

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`, of an embedding as `(dim, vocabulary)`."""
        middle = np.einsum("i,ijk->jk", factors["tinylora_v"], factors["tinylora_P"])
        product = scale_product(factors["tinylora_B"] @ middle, factors["tinylora_A"], scale)
        return product.transposed() if target.slot is SlotKind.EMBEDDING else product


KIND: Final = Tinylora()
