"""The targets of an adapter under analysis, by module, and their singular directions."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Adapter, Target
from loraformat.algebra._lowrank import Svd, factor_svd
from loraformat.algebra._random import generator
from loraformat.algebra._randomised import leading_svd
from loraformat.algebra._targets import LORA, PAIRS, open_delta
from loraformat.algebra.analysis import SIDES
from loraformat.algebra.subspaces import find_directions

PURPOSE: Final = "loraformat-analyse-1"
MAX_RANK: Final = 64
"""Singular values that are sought of a change without factors, and directions for amplification."""
_ROUNDING: Final = 3e-6
"""Share of ‖ΔW‖ that single precision cannot tell from nothing."""
NUMBER: Final = re.compile(r"(?:(?<=[._])|^)\d+(?=[._]|$)")


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """One target with its directions.

    Attributes:
        target: the target.
        svd: of ΔW (out, in * kernel).
        sides: by side, directions as columns (n, count).
    """

    target: Target
    svd: Svd
    sides: Mapping[str, NDArray[np.float32]]

    @property
    def count(self) -> int:
        """How many directions the change has."""
        return int(min(side.shape[1] for side in self.sides.values()))


@dataclass(frozen=True, slots=True)
class Subject:
    """An adapter under analysis.

    Attributes:
        name: what it is called.
        adapter: its targets that have singular values.
        modules: target to module, numbers as `*`.
    """

    name: str
    adapter: Adapter
    modules: Mapping[str, str]

    def groups(self) -> dict[str, list[Target]]:
        """Return the targets of each module, in the order of their numbers."""
        groups: dict[str, list[Target]] = defaultdict(list)
        for target in sorted(self.adapter.targets, key=lambda target: order_of(target.name)):
            groups[self.modules[target.name]].append(target)
        return dict(sorted(groups.items()))


def name_modules(names: Sequence[str]) -> dict[str, str]:
    """Return each name's module: what follows its last number.

    Where that does not tell modules apart it is the whole name, numbers as `*`.
    """
    whole = {name: NUMBER.sub("*", name) for name in names}
    ends = {full: full.rpartition("*.")[2] for full in whole.values()}
    counts = Counter(ends.values())
    return {name: full if counts[ends[full]] > 1 else ends[full] for name, full in whole.items()}


def order_of(name: str) -> tuple[tuple[int, ...], str]:
    return tuple(map(int, NUMBER.findall(name))), name


def open_target(target: Target) -> Opened:
    """Return a target with its directions; of a change without factors those of the change itself."""
    roles = next((pair for pair in PAIRS if target.kind == LORA and set(pair) <= set(target.factors)), None)
    if roles is not None:
        down, up = (target.factors[role].read().astype(np.float64) for role in roles)
        down, up = down.reshape(down.shape[0], -1), up.reshape(up.shape[0], -1)
        svd = factor_svd(up * target.scale, down)
        return Opened(target, svd, dict(zip(SIDES, (find_directions(down), find_directions(up.T)), strict=True)))
    delta = open_delta(target)
    matrix = np.empty(delta.shape, np.float32)
    delta.write_rows(0, delta.shape[0], matrix)
    rng, leave = generator(PURPOSE, 0, target.name), _ROUNDING * float(np.linalg.norm(matrix))
    svd = leading_svd(matrix, rng, rank=min(MAX_RANK, *matrix.shape), leave=leave).svd
    right, left = svd.right.T.astype(np.float32), svd.left.astype(np.float32)
    return Opened(target, svd, dict(zip(SIDES, (right, left), strict=True)))
