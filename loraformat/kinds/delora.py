"""DeLoRA: a product of factors of length 1, times one strength and the norms of the base (arXiv 2503.18225).

    delora_A (rank, in)    delora_B (out, rank)    delora_lambda (1)    delora_w_norm (in)

Norms below 1e-4 count as 1e-4. `delora_w_norm` are the norms of the base's columns that the adapter was made for.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._matrices import scale_product

_LEAST_NORM: Final = 1e-4


class Delora(FactoredKind):
    """The kind `delora`."""

    name = "delora"
    formula = "W + s·(λ/rank)·(B/‖B‖)·(A/‖A‖)∘w"
    source = "arXiv 2503.18225; PEFT DELORA"
    layouts = (
        Layout(
            MATRICES,
            {"delora_A": "rank in", "delora_B": "out rank", "delora_lambda": "1", "delora_w_norm": "in"},
        ),
    )

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        down, up = factors["delora_A"].astype(np.float64), factors["delora_B"].astype(np.float64)
        norms = np.maximum(np.linalg.norm(down, axis=1), _LEAST_NORM)
        norms *= np.maximum(np.linalg.norm(up, axis=0), _LEAST_NORM)
        strengths = float(factors["delora_lambda"][0]) / len(down) / norms
        form = factors["delora_A"].dtype
        return scale_product(up * strengths, (down * factors["delora_w_norm"]).astype(form), scale)


KIND: Final = Delora()
