"""Rows of a torch checkpoint's weight that stand in other places in a stored matrix."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

_PROBED: Final = 8
"""Rows that are looked for first: of another matrix hardly one is found."""
_CLOSEST: Final = 64
"""Rows that look alike up to this many are compared one by one; more are not told apart."""


def find_order(stored: NDArray[np.float32], reference: NDArray[np.float32], slack: float) -> tuple[int, ...] | None:
    """Return which row of the reference each stored row is, or None where that is not the case or not sure.

    Args:
        stored: `(rows, columns)`.
        reference: the same shape, some columns of the weight, no two rows of which may be alike.
        slack: relative difference that a cast leaves.
    """
    places = find_places(stored, reference, slack) if stored.shape == reference.shape else None
    return tuple(int(row) for row in np.argsort(np.array(places))) if places is not None else None


def find_places(stored: NDArray[np.float32], reference: NDArray[np.float32], slack: float) -> list[int] | None:
    """Return at which stored row each row of the reference is, or None where one is at none, or at several.

    Args:
        stored: `(rows, columns)`.
        reference: `(at most as many rows, columns)`.
        slack: relative difference that a cast leaves.
    """
    if len(stored) < len(reference) or not (np.isfinite(stored).all() and np.isfinite(reference).all()):
        return None
    direction = np.random.default_rng(0).standard_normal(stored.shape[1])
    marks = stored.astype(np.float64) @ direction
    order = np.argsort(marks)
    marks = marks[order]
    reach = slack * (np.abs(reference) @ np.abs(direction)) + 1e-6
    wanted = reference.astype(np.float64) @ direction
    for rows in (slice(0, len(reference), max(1, len(reference) // _PROBED)), slice(None)):
        low = np.searchsorted(marks, wanted[rows] - reach[rows])
        high = np.searchsorted(marks, wanted[rows] + reach[rows], side="right")
        if (high - low < 1).any() or (high - low > _CLOSEST).any():
            return None
    found = [
        _find_row(stored, order[i:j], reference[row], slack) for row, (i, j) in enumerate(zip(low, high, strict=True))
    ]
    known = [row for row in found if row is not None]
    return known if len(set(known)) == len(reference) else None


def _find_row(
    stored: NDArray[np.float32], rows: NDArray[np.intp], line: NDArray[np.float32], slack: float
) -> int | None:
    """Return the one of some stored rows that is a row of the reference; None for none or several."""
    near = np.abs(stored[rows] - line).max(axis=1) <= slack * np.abs(line).max() + 2e-7
    return int(rows[near][0]) if near.sum() == 1 else None
