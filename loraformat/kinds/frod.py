"""FRoD: the weight is put together again from its own directions and from factors that modules of one kind share.

    frod_V                  (in, in)     shared by the modules of one name in all layers
    frod_lambda_l           (in)         the diagonal
    frod_lambda_s_values    (n)          numbers beside it
    frod_s_indices          (2, n)       their rows and columns, shared
    frod_s_size             (2)          in, twice

U has the columns of W·V⁻ᵀ, each brought to length 1; the merged weight is U·(diag(λ) + S)·Vᵀ. It takes memory for the
whole weight.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import UNKNOWN, Change, Nature
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind, check_width
from loraformat.kinds._mixing_maps import WholeMap
from loraformat.problems import Problem

_SHARED: Final = "frod_V"
_INDICES: Final = "frod_s_indices"
_SIZE: Final = "frod_s_size"
_SHORTEST: Final = 1e-12
_CUT: Final = 1e-6
"""What PEFT takes for a length of nothing, and for a singular value of nothing."""


class Frod(FactoredKind):
    """The kind `frod`."""

    name = "frod"
    nature = Nature.FUNCTION_OF_BASE
    formula = "U·(diag(λ) + S)·Vᵀ, U = W·V⁻ᵀ with columns of length 1"
    source = "PEFT FROD"
    layouts = (
        Layout(
            MATRICES,
            {
                _SHARED: "in in",
                "frod_lambda_l": "in",
                "frod_lambda_s_values": "n",
                _INDICES: "2 n",
                _SIZE: "2",
            },
            whole=frozenset({_INDICES, _SIZE}),
        ),
    )
    is_scaled = False
    rank_axis = ""

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in)`, of which the factors only tell the second."""
        return UNKNOWN, self.axes(target)["in"]

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return problems of another width, or of places outside the matrix between; reads them."""
        width, places = self.axes(target)["in"], target.factors[_INDICES].read()
        problems = check_width(target, change, width)
        if int(places.min()) < 0 or int(places.max()) >= width or set(target.factors[_SIZE].read().tolist()) != {width}:
            found = f"places from {places.min()} to {places.max()} in a matrix {target.factors[_SIZE].read().tolist()}"
            problems.append(Problem("LF405", target.name, found, f"places in a matrix of {width} by {width}"))
        return problems

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> WholeMap:
        """Return f for the matrix `(out, in)`."""
        shared = factors[_SHARED].astype(np.float64)
        middle = np.diag(factors["frod_lambda_l"].astype(np.float64))
        rows, columns = factors[_INDICES].astype(np.intp)
        np.add.at(middle, (rows, columns), factors["frod_lambda_s_values"].astype(np.float64))

        def compute(weight: NDArray[np.float64]) -> NDArray[np.float64]:
            directions = _divide(weight, shared)
            lengths = np.linalg.norm(directions, axis=0)
            directions *= np.where(lengths > _SHORTEST, 1 / np.maximum(lengths, _SHORTEST), 0)
            return np.asarray(directions @ middle @ shared.T)

        return WholeMap((change.shape[0], change.shape[1]), compute)

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: the result comes from a pass before."""
        return 1


def _divide(weight: NDArray[np.float64], shared: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return W·V⁻ᵀ."""
    try:
        return np.asarray(np.linalg.solve(shared, weight.T).T, np.float64)
    except np.linalg.LinAlgError:
        return np.asarray(weight @ np.linalg.pinv(shared, rcond=_CUT).T, np.float64)


KIND: Final = Frod()
