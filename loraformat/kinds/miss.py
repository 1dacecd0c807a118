"""MiSS, and Bone before it: one small block, repeated along the inputs (Kang et al., arXiv 2409.15371).

    miss_block (rank, out)      column i of the change is row i mod rank of the block
    miss_block (rank, few)      with `init_weights` "mini": the block is first repeated along the outputs

The variant "bat" is a function of the weight and has a kind of its own, `miss_bat`.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import UNKNOWN, Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._deltas import GatheredDelta
from loraformat.kinds._factored import MATRICES, FactoredKind, flag, name_options
from loraformat.problems import Problem


class Miss(FactoredKind):
    """The kind `miss`."""

    name = "miss"
    formula = "W + [D D ... D]ᵀ, D the block"
    source = "arXiv 2409.15371; PEFT MISS, BONE"
    layouts = (Layout(MATRICES, {"miss_block": "rank few"}),)
    options = name_options(is_repeated_along_outputs=flag(False))

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return what the block tells."""
        repeated = self.option(target, "is_repeated_along_outputs")
        return UNKNOWN if repeated else self.axes(target)["few"], UNKNOWN

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of a weight that the block does not fit into."""
        axes = self.axes(target)
        if change.shape[0] % axes["few"] == 0 and axes["rank"] <= change.shape[1]:
            return []
        expected = f"a multiple of {axes['few']} rows, and at least {axes['rank']} columns"
        return [Problem("LF405", target.name, f"a weight of {change.shape}", expected)]

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        block = factors["miss_block"]
        scaled = (block.astype(np.float64) * scale).astype(block.dtype)
        rank, few = block.shape
        rows, columns = np.arange(change.shape[0]) % few, np.arange(change.shape[1]) % rank
        return GatheredDelta(np.ascontiguousarray(scaled.T), rows, columns)


KIND: Final = Miss()
