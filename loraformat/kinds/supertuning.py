"""Supertuning: some numbers of the weight are changed, and with "Supra" a LoRA beside them.

    supertuning_values (n)    supertuning_indices (n): places in the flattened weight (out·in)
    supertuning_lora_A.weight (rank, in)    supertuning_lora_B.weight (out, rank)

The option `lora_scale` multiplies the LoRA alone.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._deltas import SumDelta, sort_sparse
from loraformat.kinds._factored import FactoredKind, name_options, number
from loraformat.kinds._matrices import scale_product
from loraformat.problems import Problem

_SPARSE: Final = {"supertuning_values": "n", "supertuning_indices": "n"}
_PAIR: Final = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")
_WHOLE: Final = frozenset({"supertuning_indices"})


class Supertuning(FactoredKind):
    """The kind `supertuning`."""

    name = "supertuning"
    formula = "W.flat[i] + s·v; W + s·lora_scale·B·A beside it"
    source = "PEFT SUPERTUNING"
    layouts = (
        Layout((SlotKind.LINEAR,), _SPARSE, whole=_WHOLE),
        Layout((SlotKind.LINEAR,), {**_SPARSE, _PAIR[0]: "rank in", _PAIR[1]: "out rank"}, whole=_WHOLE),
    )
    options = name_options(lora_scale=number(1.0))

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of indices that lie outside the weight; reads them."""
        places = target.factors["supertuning_indices"].read().astype(np.int64)
        if places.min() >= 0 and places.max() < change.shape[0] * change.shape[1]:
            return []
        found = f"indices from {places.min()} to {places.max()}"
        return [Problem("LF405", target.name, found, f"places in a weight of {change.shape}")]

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        out, inner = change.shape
        rows, columns = np.divmod(factors["supertuning_indices"].astype(np.intp), inner)
        values = factors["supertuning_values"]
        sparse = sort_sparse((out, inner), rows, columns, (values.astype(np.float64) * scale).astype(values.dtype))
        if _PAIR[0] not in factors:
            return sparse
        lora_scale = scale * float(self.option(target, "lora_scale"))
        return SumDelta((sparse, scale_product(factors[_PAIR[1]], factors[_PAIR[0]], lora_scale)))


KIND: Final = Supertuning()
