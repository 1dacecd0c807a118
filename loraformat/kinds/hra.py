"""HRA: the weight reflected at hyperplanes, one after the other (Yuan et al., arXiv 2405.17484).

    hra_u (in * kernel, rank): W·(I − 2·u₁u₁ᵀ)·(I − 2·u₂u₂ᵀ)..., each u of length 1

With `apply_GS` the u are first made orthogonal to one another (Gram-Schmidt).
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import REST, UNKNOWN, Change, Nature
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind, check_width, flag, name_options
from loraformat.kinds._mixing_maps import ProjectionMap
from loraformat.problems import Problem


class Hra(FactoredKind):
    """The kind `hra`."""

    name = "hra"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W·Π(I − 2·uᵢuᵢᵀ), ‖uᵢ‖ = 1"
    source = "arXiv 2405.17484; PEFT HRA"
    layouts = (Layout((*MATRICES, SlotKind.CONV), {"hra_u": "columns rank"}),)
    options = name_options(apply_GS=flag(False))
    is_scaled = False
    is_flat = True

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return the columns of a matrix; the rest only the base knows."""
        if target.slot is SlotKind.CONV:
            return UNKNOWN, UNKNOWN, REST
        return UNKNOWN, self.axes(target)["columns"]

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of a weight with other columns than the vectors."""
        return check_width(target, change, self.axes(target)["columns"])

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> ProjectionMap:
        """Return the reflected weight: the product of reflections is I plus a matrix of their number as rank."""
        vectors = factors["hra_u"].astype(np.float64)
        if self.option(target, "apply_GS"):
            vectors = _orthogonalise(vectors)
        left, right = _gather(vectors / np.linalg.norm(vectors, axis=0))
        form = factors["hra_u"].dtype
        return ProjectionMap((change.shape[0], len(vectors)), left.astype(form), right.astype(form))

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: what the transposed map needs of all rows comes from a pass before."""
        return 1


def _orthogonalise(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return vectors (columns, rank) made orthogonal from the first to the last, each of length 1."""
    made: list[NDArray[np.float64]] = []
    for vector in vectors.T:
        for before in made:
            vector = vector - (before @ vector) * before
        made.append(vector / np.linalg.norm(vector))
    return np.stack(made, axis=1)


def _gather(units: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return L and R with I + L·R equal to the product of the reflections at the units (columns, rank)."""
    left, right = np.zeros_like(units), units.T.copy()
    for place, unit in enumerate(units.T):
        left[:, place] = -2 * (unit + left[:, :place] @ (right[:place] @ unit))
    return left, right


KIND: Final = Hra()
