"""Lengths of two changes and the angle between them, each taken as one long vector."""

import math

import numpy as np

from loraformat.adapter import Target
from loraformat.algebra._dense import walk
from loraformat.algebra._targets import open_delta, pair_roles, read_pair


def measure_angle(one: Target, other: Target) -> tuple[float, float, float]:
    """Return ‖Δ₁‖, ‖Δ₂‖ and ⟨Δ₁, Δ₂⟩ of two additive targets of one shape, scales in them.

    Of LoRAs from Gram matrices of the factors, ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂)∘(A₁A₂ᵀ); of others tile by tile.
    """
    if pair_roles(one) is not None and pair_roles(other) is not None:
        (up, down), (other_up, other_down) = read_pair(one), read_pair(other)
        first = float(np.sum((up.T @ up) * (down @ down.T)))
        second = float(np.sum((other_up.T @ other_up) * (other_down @ other_down.T)))
        inner = float(np.sum((up.T @ other_up) * (down @ other_down.T)))
        return math.sqrt(max(0.0, first)), math.sqrt(max(0.0, second)), inner
    sums = np.zeros(3)
    for tile, other_tile in zip(walk(open_delta(one)), walk(open_delta(other)), strict=True):
        x, y = (part.reshape(-1).astype(np.float64) for part in (tile, other_tile))
        sums += x @ x, y @ y, x @ y
    return math.sqrt(sums[0]), math.sqrt(sums[1]), float(sums[2])
