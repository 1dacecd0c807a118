"""Singular components of whole weights."""

import numpy as np
from numpy.typing import NDArray


def cut_smallest(weight: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return a weight without its `count` smallest singular components, from the fewer of those that stay and go.

    One with a number that is none has none of them, and all that is returned is NaN.
    """
    if not np.isfinite(weight).all():
        return np.full_like(weight, np.nan)
    left, sizes, right = np.linalg.svd(weight, full_matrices=False)
    kept = len(sizes) - count
    if kept <= count:
        return np.asarray((left[:, :kept] * sizes[:kept]) @ right[:kept])
    return np.asarray(weight - (left[:, kept:] * sizes[kept:]) @ right[kept:])
