"""LoCon with a core: a convolution's change as a Tucker product (LyCORIS `lora_mid`, arXiv 2309.14859).

    down    lora_A.weight      (rank, in, 1 ...)
    core    lora_mid.weight    (rank, rank, *kernel)
    up      lora_B.weight      (out, rank, 1 ...)

ΔW[o, i, k] = s · Σ_m Σ_n up[o, m] · core[m, n, k] · down[n, i]. Core and down together are the A of a LoRA, so that it
is formed row by row like one. (Without a core it is `lora`.)
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import FactoredKind
from loraformat.kinds._matrices import LowRankDelta

_DOWN: Final = "lora_A.weight"
_UP: Final = "lora_B.weight"
_CORE: Final = "lora_mid.weight"


class LoCon(FactoredKind):
    """The kind `locon`."""

    name = "locon"
    formula = "W + s·B·(core·A), the core of the kernel's size"
    source = "LyCORIS 4.1, module locon with use_tucker; arXiv 2309.14859"
    layouts = (Layout((SlotKind.CONV,), {_DOWN: "rank in *1", _UP: "out rank *1", _CORE: "rank rank *kernel"}),)

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return s·B·(core·A) as `(out, in * kernel)`; s is folded into B in float64, rounded once."""
        right = _fold(factors[_CORE], factors[_DOWN])
        up = factors[_UP].reshape(len(factors[_UP]), -1)
        left = (up.astype(np.float64) * scale).astype(right.dtype)
        return LowRankDelta(np.ascontiguousarray(left), right)

    def norm(self, target: Target, factors: Mapping[str, NDArray[Any]]) -> float:
        """Return the norm from the Gram matrices of B and of core·A."""
        up = factors[_UP].reshape(len(factors[_UP]), -1).astype(np.float64)
        right = _fold(factors[_CORE].astype(np.float64), factors[_DOWN].astype(np.float64))
        squared = float(np.sum((up.T @ up) * (right @ right.T)))
        return abs(target.scale) * math.sqrt(max(squared, 0.0))


def _fold(core: NDArray[Any], down: NDArray[Any]) -> NDArray[Any]:
    """Return `(m, in * kernel)`: Σ_n core[m, n, k] · down[n, i] for every input and place of the kernel."""
    wide = core.reshape(*core.shape[:2], -1)
    folded = np.tensordot(wide, down.reshape(len(down), -1), axes=(1, 0))  # (m, kernel, in)
    return np.ascontiguousarray(folded.transpose(0, 2, 1).reshape(len(core), -1))


KIND: Final = LoCon()
