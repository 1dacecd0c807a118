"""SHiRA: some numbers of the weight are changed, everywhere else nothing (Bhardwaj et al., arXiv 2406.13175).

The numbers are `shira_weight` (n), and `shira_indices` (2, n) are their rows and columns.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._deltas import sort_sparse
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.problems import Problem


class Shira(FactoredKind):
    """The kind `shira`."""

    name = "shira"
    formula = "W[i, j] + s·v"
    source = "arXiv 2406.13175; PEFT SHIRA"
    layouts = (Layout(MATRICES, {"shira_weight": "n", "shira_indices": "2 n"}, whole=frozenset({"shira_indices"})),)
    rank_axis = ""

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of indices that lie outside the weight; reads them."""
        indices = target.factors["shira_indices"].read().astype(np.int64)
        largest = indices.max(axis=1)
        if indices.min() >= 0 and largest[0] < change.shape[0] and largest[1] < change.shape[1]:
            return []
        found = f"indices up to ({largest[0]}, {largest[1]}), down to {indices.min()}"
        return [Problem("LF405", target.name, found, f"places in a weight of {change.shape}")]

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        rows, columns = factors["shira_indices"].astype(np.intp)
        weight = factors["shira_weight"]
        out, inner = change.shape
        return sort_sparse((out, inner), rows, columns, (weight.astype(np.float64) * scale).astype(weight.dtype))


KIND: Final = Shira()
