"""LoRA of a weight that has more inputs than the base's: [W 0] + s·B·A (FLUX's control adapters).

    A    lora_A.weight      (rank, in)
    B    lora_B.weight      (out, rank)
    b    lora_B.bias        (out)

The base's weight is filled up with columns of zeros to `(out, in)` first, so that what it computed of its own inputs
stays, and the others are new. A base that has the larger weight already is changed as by `lora`. b adds s·b to the bias
of the module.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import Change, Delta, Nature
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import FactoredKind
from loraformat.kinds._matrices import LowRankDelta, Values

_DOWN: Final = "lora_A.weight"
_UP: Final = "lora_B.weight"
_BIAS: Final = "lora_B.bias"


class PaddedLora(FactoredKind):
    """The kind `padded_lora`."""

    name = "padded_lora"
    is_beside_bias = False
    formula = "[W 0] + s·B·A"
    source = "BFL's control adapters of FLUX.1; ComfyUI, reshape_weight; diffusers 0.42, FluxControlPipeline"
    layouts = (Layout((SlotKind.LINEAR,), {_DOWN: "rank in", _UP: "out rank"}, {_BIAS: "out"}),)

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return the change of the weight, which may be wider than the base's, and that of the bias."""
        shape = self.weight_shape(target)
        weight = Change("weight", shape, Nature.ADDITIVE, (_DOWN, _UP), target.slot, widens=True)
        bias = Change("bias", shape[:1], Nature.ADDITIVE, (_BIAS,), SlotKind.PARAMETER)
        return (weight, bias) if _BIAS in target.factors else (weight,)

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return s·B·A as `(out, in)`, or s·b as `(out, 1)`; s is folded into B in float64, rounded once."""
        if change.parameter == "bias":
            bias = factors[_BIAS].reshape(-1, 1)
            return Values((bias.astype(np.float64) * scale).astype(bias.dtype))
        left = (factors[_UP].astype(np.float64) * scale).astype(factors[_DOWN].dtype)
        return LowRankDelta(np.ascontiguousarray(left), np.ascontiguousarray(factors[_DOWN]))

    def norm(self, target: Target, factors: Mapping[str, NDArray[Any]]) -> float:
        """Return the norm from the two Gram matrices of the factors."""
        up, down = factors[_UP].astype(np.float64), factors[_DOWN].astype(np.float64)
        squared = float(np.sum((up.T @ up) * (down @ down.T)))
        return abs(target.scale) * math.sqrt(max(squared, 0.0))


KIND: Final = PaddedLora()
