"""RoAd: the outputs turned and stretched in pairs (Liao and Monz, arXiv 2409.00119).

In a group of g outputs, output i and output i + g/2 are a pair. Both have numbers c = α·cos θ and s = α·sin θ:
yᵢ' = cᵢ·yᵢ − sᵢ·y_{i+g/2}, and y_{i+g/2}' = c_{i+g/2}·y_{i+g/2} + s_{i+g/2}·yᵢ. The bias is turned as the rows are.

    road_1    θ, α (out / 2)    a pair shares both
    road_2    θ, α (out)
    road_4    θ, α (2·out)      per group g numbers for c, then g for s
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import UNKNOWN, Change, Nature
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import MATRICES, FactoredKind, Option, name_options
from loraformat.kinds._mixing_maps import BlockMap
from loraformat.problems import Problem

_NUMBERS: Final = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Numbers of θ for every two outputs."""


class Road(FactoredKind):
    """The kind `road`."""

    name = "road"
    nature = Nature.FUNCTION_OF_BASE
    formula = "R·W, R·b, R of blocks that turn pairs of outputs"
    source = "arXiv 2409.00119; PEFT ROAD"
    layouts = (Layout(MATRICES, {"road_theta": "numbers", "road_alpha": "numbers"}),)
    options = name_options(
        variant=Option(lambda value: value in _NUMBERS, f"one of {', '.join(_NUMBERS)}"),
        group_size=Option(
            lambda value: type(value) is int and value > 0 and value % 2 == 0, "an even number, at least 2"
        ),
    )
    is_scaled = False
    rank_axis = ""
    is_beside_bias = False

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of numbers that make no whole groups."""
        group = int(self.option(target, "group_size"))
        per_group = group * _NUMBERS[self.option(target, "variant")] // 2
        if axes["numbers"] % per_group == 0:
            return []
        found = f"{axes['numbers']} numbers"
        return [Problem("LF203", target.name, found, f"a multiple of {per_group}, for groups of {group} outputs")]

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return the function of the weight and that of the bias."""
        out = self.axes(target)["numbers"] * 2 // _NUMBERS[self.option(target, "variant")]
        roles, own = tuple(target.factors), SlotKind.PARAMETER
        weight = Change("weight", (out, UNKNOWN), self.nature, roles, target.slot)
        return weight, Change("bias", (out,), self.nature, roles, own, is_optional=True)

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> BlockMap:
        """Return the turned weight or bias."""
        group, half = int(self.option(target, "group_size")), int(self.option(target, "group_size")) // 2
        cosines, sines = self._read_numbers(target, factors, group)
        blocks = np.zeros((len(cosines), group, group))
        whole, first = np.arange(group), np.arange(half)
        blocks[:, whole, whole] = cosines
        blocks[:, first, first + half] = -sines[:, :half]
        blocks[:, first + half, first] = sines[:, half:]
        shape = change.shape[0], change.shape[1] if len(change.shape) > 1 else 1
        return BlockMap(shape, blocks.astype(factors["road_theta"].dtype), is_on_rows=True)

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return the rows of a group, unless the stored matrix is transposed."""
        return 1 if transposed else int(self.option(target, "group_size"))

    def _read_numbers(
        self, target: Target, factors: Mapping[str, NDArray[Any]], group: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return α·cos θ and α·sin θ, each `(groups, group)`."""
        theta, alpha = (factors[role].astype(np.float64) for role in ("road_theta", "road_alpha"))
        cosines, sines = alpha * np.cos(theta), alpha * np.sin(theta)
        variant = self.option(target, "variant")
        if variant == "road_4":
            return cosines.reshape(-1, 2, group)[:, 0], sines.reshape(-1, 2, group)[:, 1]
        if variant == "road_1":
            cosines, sines = (np.tile(each.reshape(-1, group // 2), 2) for each in (cosines, sines))
        return cosines.reshape(-1, group), sines.reshape(-1, group)


KIND: Final = Road()
