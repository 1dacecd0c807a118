"""One target, or a sum of them, in the best form of a lower rank."""

from collections.abc import Callable, Sequence

import numpy as np

from loraformat.adapter import Target
from loraformat.algebra._dense import Tiles, add, cut_tiles, transposed, walk
from loraformat.algebra._lowrank import Cut, Svd, Truncated, factor_svd, truncate
from loraformat.algebra._sums import DIFFERENCE, Share, add_biases
from loraformat.algebra._targets import is_weight_alone, open_delta, pair_roles, read_pair, with_factors
from loraformat.algebra.reduction import Reduction
from loraformat.dtypes import BY_NAME
from loraformat.kinds import Delta


def cut_target(target: Target, cut: Cut) -> tuple[Target, Reduction]:
    """Return one target cut; the target as it is where its rank would not sink."""
    kept, reduction = cut_sum([(target, 1.0)], cut)
    if pair_roles(target) is not None and reduction.after >= target.rank:
        return target, Reduction(target.name, target.rank, target.rank, 0.0)
    return kept, reduction


def cut_sum(shares: Sequence[Share], cut: Cut) -> tuple[Target, Reduction]:
    """Return Σ cᵢΔᵢ cut: from the factors where all are LoRAs, else tile by tile."""
    first = shares[0][0]
    if all(pair_roles(target) is not None for target, _ in shares):
        svd = sum_svd(shares)
        truncated = truncate(svd, cut.choose(svd.values))
    else:
        weights = [weight for _, weight in shares]
        truncated = cut_dense(
            [open_delta(target) for target, _ in shares], lambda parts: _walk_sum(parts, weights), cut
        )
    target = with_factors(first, truncated, BY_NAME[cut.dtype], add_biases(shares, 1.0))
    return target, Reduction(first.name, sum(target.rank for target, _ in shares), target.rank, truncated.error)


def stays_dense(targets: Sequence[Target], cut: Cut) -> bool:
    """Say whether the targets' sum is a difference that was saved as a whole, which no cut would make a LoRA."""
    dense = all(target.kind == DIFFERENCE for target in targets)
    return dense and (cut.is_none or not all(map(is_weight_alone, targets)))


def sum_svd(shares: Sequence[Share]) -> Svd:
    """Return the SVD of Σ cᵢΔᵢ of LoRAs, from their factors."""
    pairs = [(read_pair(target), weight) for target, weight in shares]
    up = np.concatenate([pair[0] * weight for pair, weight in pairs], axis=1)
    return factor_svd(up, np.concatenate([pair[1] for pair, _ in pairs]))


def cut_dense(deltas: Sequence[Delta], make: Callable[[Sequence[Delta]], Tiles], cut: Cut) -> Truncated:
    """Return what `make` makes of the changes, cut; it is given them the way round that needs the least memory."""
    rows, columns = deltas[0].shape
    if columns <= rows:
        return cut_tiles((rows, columns), lambda: make(deltas), cut)
    turned = [delta.transposed() for delta in deltas]
    return transposed(cut_tiles((columns, rows), lambda: make(turned), cut))


def _walk_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Tiles:
    for tiles in zip(*map(walk, deltas), strict=True):
        yield add(tiles, weights)
