"""DEFT: a subspace is taken out of the weight, and something trained put in its place; PaRa takes it out alone.

    deft_P    (out, rank)
    deft_R    (rank, in), missing for PaRa

W + Q·(s·R − Vᵀ·W). With `decomposition_method` "relu" Q is P and V is max(P, 0); with "qr" both are the orthogonal
factor of P, of which LAPACK's reflections choose the signs.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Nature
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import MATRICES, FactoredKind, name_options, one_of
from loraformat.kinds._matrices import scale_product
from loraformat.kinds._mixing_maps import ProjectionMap
from loraformat.problems import Problem

_PROJECTION: Final = "deft_P"
_INJECTED: Final = "deft_R"


class Deft(FactoredKind):
    """The kind `deft`."""

    name = "deft"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W + Q·(s·R − Vᵀ·W), Q and V from P"
    source = "PEFT DEFT"
    layouts = (Layout(MATRICES, {_PROJECTION: "out rank"}, {_INJECTED: "rank in"}),)
    options = name_options(decomposition_method=one_of("relu", "qr"))

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of a subspace larger than the space."""
        if axes["rank"] <= axes["out"]:
            return []
        return [Problem("LF203", target.name, f"rank {axes['rank']} for {axes['out']} outputs", "no more than outputs")]

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> ProjectionMap:
        """Return f for the matrix `(out, in)`."""
        given = factors[_PROJECTION]
        left, right = given, np.maximum(given, 0)
        if self.option(target, "decomposition_method") == "qr":
            left = right = np.linalg.qr(given.astype(np.float64))[0].astype(given.dtype)
        added = scale_product(left, factors[_INJECTED], target.scale) if _INJECTED in factors else None
        shape = change.shape[0], change.shape[1]
        return ProjectionMap(shape, left, np.ascontiguousarray(-right.T), is_on_rows=True, added=added)

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: the projection of all rows comes from a pass before."""
        return 1


KIND: Final = Deft()
