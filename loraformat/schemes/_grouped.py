"""Fused weights whose parts have factors of their own, one below the other: loralib's MergedLinear, litgpt's qkv.

Stored: A `(groups * rank, in)` and B `(rows of the groups, rank)`; group g of B acts on group g of A. In canonical form
that is one pair of the rank `groups * rank`, B a block diagonal with rows of zeros for parts without a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraformat.adapter import Factor
from loraformat.derived import NewFactor, derive
from loraformat.operations import Concatenate, Pad, Take

FUSED = "fused"
"""The provenance that says of which parts a fused target is made, and their ranks; 0 where they share one A."""


@dataclass(frozen=True, slots=True)
class Groups:
    """How the rows of a fused weight are divided.

    Attributes:
        sizes: rows of each part.
        present: which parts have factors, in order.
    """

    sizes: tuple[int, ...]
    present: tuple[int, ...]


def place_rows(up: Factor, groups: Groups) -> Factor:
    """Return canonical B `(all rows, groups * rank)` of stored B `(rows of the groups, rank)`."""
    total = sum(groups.sizes)
    columns: list[Factor] = []
    start = 0
    for part in groups.present:
        size, above = groups.sizes[part], sum(groups.sizes[:part])
        block = derive(Take(start, start + size), up)
        columns.append(derive(Pad(above, total - above - size), block))
        start += size
    return derive(Concatenate(axis=1), *columns)


def gather(
    down: Factor, up: Factor, ranks: Sequence[int], groups: Groups, wanted: Sequence[int], rank: int
) -> tuple[Factor, Factor]:
    """Return stored A and B of canonical ones.

    Args:
        down: A `(sum of the ranks, in)`.
        up: B `(all rows, sum of the ranks)`.
        ranks: rank of each present part; all 0 where the parts share the whole of A.
        groups: how the rows are divided, and which parts are present.
        wanted: the parts that are stored; those that are not present get zeros.
        rank: the rank of every group; lower ones are padded with zeros.
    """
    downs: list[Factor] = []
    ups: list[Factor] = []
    ends = np.cumsum([0, *ranks]).tolist()
    row_ends = np.cumsum([0, *groups.sizes]).tolist()
    for part in wanted:
        rows = derive(Take(row_ends[part], row_ends[part + 1]), up)
        if part not in groups.present:
            downs.append(NewFactor("zeros", np.zeros((rank, down.shape[1]), dtype=down.dtype.numpy())))
            ups.append(NewFactor("zeros", np.zeros((groups.sizes[part], rank), dtype=up.dtype.numpy())))
            continue
        index = groups.present.index(part)
        first, last = (ends[index], ends[index + 1]) if any(ranks) else (0, down.shape[0])
        downs.append(_pad(derive(Take(first, last), down), rank, 0))
        ups.append(_pad(derive(Take(first, last, axis=1), rows), rank, 1))
    return derive(Concatenate(), *downs), derive(Concatenate(), *ups)


def _pad(factor: Factor, rank: int, axis: int) -> Factor:
    missing = rank - factor.shape[axis]
    return derive(Pad(0, missing, axis), factor) if missing else factor
