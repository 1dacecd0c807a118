"""DoRA: m·(W + s·B·A) / ‖W + s·B·A‖ (Liu et al., arXiv 2402.09353).

The norm is taken over everything that makes one output: the rows of a linear or convolution weight, and of an embedding
the vocabulary, for each of its dimensions. Nothing is added to the norm.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import Change, Delta, Nature
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._maps import NormMap
from loraformat.kinds._matrices import Values, scale_product

_BIAS: Final = "base_layer.bias"
_MAGNITUDE: Final = "lora_magnitude_vector"
_PAIR: Final = ("lora_A.weight", "lora_B.weight")
_EMBEDDING_PAIR: Final = ("lora_embedding_A", "lora_embedding_B")


class Dora(FactoredKind):
    """The kind `dora`."""

    name = "dora"
    nature = Nature.FUNCTION_OF_BASE
    formula = "m·(W + s·B·A) / ‖W + s·B·A‖"
    source = "arXiv 2402.09353; PEFT LoraConfig.use_dora"
    layouts = (
        Layout(MATRICES, {_PAIR[0]: "rank in", _PAIR[1]: "out rank", _MAGNITUDE: "out"}, {_BIAS: "out"}),
        Layout(
            (SlotKind.CONV,),
            {_PAIR[0]: "rank in *kernel", _PAIR[1]: "out rank *1", _MAGNITUDE: "1 out *1"},
            {_BIAS: "out"},
        ),
        Layout(
            (SlotKind.EMBEDDING,), {_EMBEDDING_PAIR[0]: "rank in", _EMBEDDING_PAIR[1]: "out rank", _MAGNITUDE: "out"}
        ),
    )

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return the function of the weight, and the bias that was saved beside it."""
        shape = self.weight_shape(target)
        roles = tuple(role for role in target.factors if role != _BIAS)
        weight = Change("weight", shape, self.nature, roles, target.slot)
        if _BIAS not in target.factors:
            return (weight,)
        return weight, Change("bias", shape[:1], Nature.REPLACEMENT, (_BIAS,), SlotKind.PARAMETER)

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> NormMap:
        """Return the weight with rows of the lengths that the magnitudes say."""
        down, up = (factors[role] for role in (_EMBEDDING_PAIR if _EMBEDDING_PAIR[0] in factors else _PAIR))
        return NormMap(scale_product(up, down, target.scale), factors[_MAGNITUDE].reshape(-1))

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: a row has its own norm, and the norms of columns come from a pass before."""
        return 1

    def value(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> Delta:
        """Return the bias that was saved."""
        return Values(np.ascontiguousarray(factors[_BIAS].reshape(-1, 1)))


KIND: Final = Dora()
