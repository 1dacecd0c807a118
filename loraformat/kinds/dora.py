"""DoRA: m·(W + s·B·A) / ‖W + s·B·A‖ (Liu et al., arXiv 2402.09353).

The norm is taken over everything that makes one output: the rows of a linear or convolution weight, and of an embedding
the vocabulary, for each of its dimensions. Nothing is added to the norm. Two dialects take it over everything that
leaves one input, and name their magnitudes otherwise:

    dora_scale    (1, in, 1 ...)    LyCORIS with wd_on_out = False, OneTrainer; an epsilon is added to the norm
    m             (vocabulary,)     mlx-lm, for each token of an embedding
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import Change, Nature
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._maps import NormMap
from loraformat.kinds._matrices import scale_product

_MAGNITUDE: Final = "lora_magnitude_vector"
_OVER_INPUTS: Final = {"dora_scale": float(np.finfo(np.float32).eps), "m": 0.0}
"""Magnitudes of inputs, and what is added to the norm."""
_PAIR: Final = ("lora_A.weight", "lora_B.weight")
_EMBEDDING_PAIR: Final = ("lora_embedding_A", "lora_embedding_B")


class Dora(FactoredKind):
    """The kind `dora`."""

    name = "dora"
    nature = Nature.FUNCTION_OF_BASE
    formula = "m·(W + s·B·A) / ‖W + s·B·A‖"
    source = "arXiv 2402.09353; PEFT LoraConfig.use_dora"
    layouts = (
        Layout(MATRICES, {_PAIR[0]: "rank in", _PAIR[1]: "out rank", _MAGNITUDE: "out"}),
        Layout(
            (SlotKind.CONV,),
            {_PAIR[0]: "rank in *kernel", _PAIR[1]: "out rank *1", _MAGNITUDE: "1 out *1"},
        ),
        Layout(
            (SlotKind.EMBEDDING,), {_EMBEDDING_PAIR[0]: "rank in", _EMBEDDING_PAIR[1]: "out rank", _MAGNITUDE: "out"}
        ),
        Layout(MATRICES, {_PAIR[0]: "rank in", _PAIR[1]: "out rank", "dora_scale": "1 in"}),
        Layout((SlotKind.CONV,), {_PAIR[0]: "rank in *kernel", _PAIR[1]: "out rank *1", "dora_scale": "1 in *1"}),
        Layout((SlotKind.EMBEDDING,), {_EMBEDDING_PAIR[0]: "rank in", _EMBEDDING_PAIR[1]: "out rank", "m": "in"}),
    )

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> NormMap:
        """Return the weight with rows, or columns, of the lengths that the magnitudes say."""
        down, up = (factors[role] for role in (_EMBEDDING_PAIR if _EMBEDDING_PAIR[0] in factors else _PAIR))
        delta = scale_product(up, down, target.scale)
        role = next((role for role in _OVER_INPUTS if role in factors), _MAGNITUDE)
        lengths = factors[role].reshape(-1)
        if role == _MAGNITUDE:
            return NormMap(delta, lengths)
        return NormMap(delta, lengths, is_by_rows=False, epsilon=_OVER_INPUTS[role], spread=math.prod(down.shape[2:]))

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1, as norms of columns come from a pass before; or how many rows are of one input."""
        by_inputs = transposed and any(role in target.factors for role in _OVER_INPUTS)
        return math.prod(self.axes(target).kernel or ()) if by_inputs else 1


KIND: Final = Dora()
