"""Whether rows of a stored matrix are those of a checkpoint's weight, or multiples of them, and where they begin."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

TELLING: Final = 8
"""Fewer columns do not tell a row from a multiple of another."""
_CLIPPED: Final = 2e-7
"""Converters to float16 lift tiny numbers to 1e-7."""


def find_factors(
    stored: NDArray[np.float32], reference: NDArray[np.float32], slack: float
) -> NDArray[np.float64] | None:
    """Return what the rows of one are multiples of the rows of the other by, None where they are not.

    Args:
        stored: (out, columns) of what a site applies.
        reference: (out, columns) of the checkpoint's weight.
        slack: how far a cast may part them, of the largest number of a row.

    Returns:
        (out,), 1 where a row is the same.
    """
    if stored.shape != reference.shape:
        return None
    c, w = stored.astype(np.float64), reference.astype(np.float64)
    if not (np.isfinite(c).all() and np.isfinite(w).all()):
        return None
    squares = (w * w).sum(axis=1)
    factors: NDArray[np.float64] = np.divide((c * w).sum(axis=1), squares, out=np.ones(len(w)), where=squares > 0)
    factors[np.abs(factors - 1) <= slack] = 1.0
    if len(w[0]) < TELLING or _are_poor(w):
        factors[:] = 1.0
    expected = factors[:, None] * w
    allowed = slack * np.abs(expected).max(axis=1, initial=0.0) + _CLIPPED
    if (factors == 0).any() or (np.abs(c - expected).max(axis=1, initial=0.0) > allowed).any():
        return None
    return factors


def _are_poor(w: NDArray[np.float64]) -> bool:
    """Say whether rows are so alike that one is a multiple of another: then factors would tell nothing."""
    lengths = np.linalg.norm(w, axis=1, keepdims=True)
    first = w[0] / lengths[0] if lengths[0] else w[0]
    alike = np.abs(np.divide(w, lengths, out=np.zeros_like(w), where=lengths > 0) @ first) > 1 - 1e-9
    return bool(alike[1:].any())


def find_starts(stored: NDArray[np.float32], reference: NDArray[np.float32]) -> list[int]:
    """Return the rows at which the reference may begin: where its largest row has its like."""
    if len(stored) == len(reference):
        return [0]
    anchor = int(np.argmax(np.abs(reference).max(axis=1)))
    line = reference[anchor] / max(float(np.linalg.norm(reference[anchor])), 1e-30)
    lengths = np.linalg.norm(stored, axis=1)
    cosines = np.abs(stored @ line) / np.maximum(lengths, 1e-30)
    hits = np.flatnonzero(cosines > 1 - 1e-3)
    return [int(hit) - anchor for hit in hits if 0 <= hit - anchor <= len(stored) - len(reference)]
