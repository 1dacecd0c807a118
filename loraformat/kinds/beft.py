"""BEFT: a trained bias is added to the module's (PEFT BEFT)."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._matrices import Values


class Beft(FactoredKind):
    """The kind `beft`."""

    name = "beft"
    formula = "b + s·v"
    source = "PEFT BEFT"
    layouts = (Layout(MATRICES, {"beft_bias": "1 out"}),)
    rank_axis = ""
    is_beside_bias = False

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return the change of the bias."""
        out = self.axes(target)["out"]
        return (Change("bias", (out,), self.nature, ("beft_bias",), SlotKind.PARAMETER),)

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, 1)`."""
        bias = factors["beft_bias"].reshape(-1, 1)
        return Values((bias.astype(np.float64) * scale).astype(bias.dtype))


KIND: Final = Beft()
