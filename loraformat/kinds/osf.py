"""OSF: the smallest singular components of the weight are replaced by trained ones (arXiv 2504.07097).

    osf_svd_params.U_low    (out, few)
    osf_svd_params.S_low    (few)
    osf_svd_params.V_low    (few, in)

What is left of W are its components but the last `few`. Singular vectors have no sign of their own, but a component,
u·σ·vᵀ, has: the result is the same whoever decomposes W. It takes memory for the whole weight.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Nature
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._mixing_maps import WholeMap
from loraformat.kinds._singular import cut_smallest
from loraformat.problems import Problem

_PARTS: Final = "osf_svd_params."


class Osf(FactoredKind):
    """The kind `osf`."""

    name = "osf"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W without its smallest singular components + U·diag(S)·V"
    source = "arXiv 2504.07097; PEFT OSF"
    layouts = (Layout(MATRICES, {f"{_PARTS}U_low": "out few", f"{_PARTS}S_low": "few", f"{_PARTS}V_low": "few in"}),)
    is_scaled = False
    rank_axis = ""

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of more components than the weight has."""
        if axes["few"] <= min(axes["out"], axes["in"]):
            return []
        found = f"{axes['few']} components of a weight ({axes['out']}, {axes['in']})"
        return [Problem("LF203", target.name, found, "no more than its smaller side")]

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> WholeMap:
        """Return f for the matrix `(out, in)`."""
        left, sizes, right = (factors[f"{_PARTS}{part}"].astype(np.float64) for part in ("U_low", "S_low", "V_low"))

        def compute(weight: NDArray[np.float64]) -> NDArray[np.float64]:
            return cut_smallest(weight, len(sizes)) + (left * sizes) @ right

        return WholeMap((change.shape[0], change.shape[1]), compute)

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: the result comes from a pass before."""
        return 1


KIND: Final = Osf()
