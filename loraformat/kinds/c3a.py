"""C3A: a change of circulant blocks (Chen et al., arXiv 2407.19342).

With `c3a_kernel` (out / b, in / b, b), element (a, c) of a block is kernel[(c − a) mod b] / in.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._deltas import CirculantDelta
from loraformat.kinds._factored import MATRICES, FactoredKind


class C3a(FactoredKind):
    """The kind `c3a`."""

    name = "c3a"
    formula = "W + s·C / in, C of circulant blocks"
    source = "arXiv 2407.19342; PEFT C3A"
    layouts = (Layout(MATRICES, {"c3a_kernel": "down across size"}),)
    rank_axis = ""

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in)`."""
        axes = self.axes(target)
        return axes["down"] * axes["size"], axes["across"] * axes["size"]

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        kernel = factors["c3a_kernel"]
        return CirculantDelta((kernel.astype(np.float64) * (scale / change.shape[1])).astype(kernel.dtype))


KIND: Final = C3a()
