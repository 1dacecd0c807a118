"""LoRA of some slices of a fused matrix: loralib's MergedLinear, litgpt's qkv (query, key and value in one weight).

    A    lora_A.weight    (rank · n, in)      n slices are adapted, each by its own `rank` rows
    B    lora_B.weight    (rows, rank)        the rows of the adapted slices, one after the other

The change of slice g is s·B_g·A_g; slices that are not adapted stay. Which ones are is nowhere in the tensors, so the
options say it:

    enable_lora    true or false for each slice
    sizes          rows of each slice; equal parts where it is left out (grouped-query attention has fewer for key and
                   value)
    groups         in how many groups the slices are interleaved: the rows are q q k v, q q k v ... (litgpt before
                   2024-03)

Expanded to a B of all rows, zero outside its slices, it is a LoRA of rank `rank · n`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import MATRICES, FactoredKind, Option, count
from loraformat.kinds._matrices import LowRankDelta
from loraformat.problems import Problem
from loraformat.strict_json import JsonValue

_DOWN: Final = "lora_A.weight"
_UP: Final = "lora_B.weight"


@dataclass(frozen=True, slots=True)
class _Slices:
    """How the rows of a fused matrix belong to its slices.

    Attributes:
        enabled: which slices are adapted.
        sizes: rows of each slice.
        groups: groups that the slices are interleaved in.
    """

    enabled: tuple[bool, ...]
    sizes: tuple[int, ...]
    groups: int

    @property
    def adapted_sizes(self) -> list[int]:
        """Rows of each adapted slice."""
        return [size for size, enabled in zip(self.sizes, self.enabled, strict=True) if enabled]

    def rows_of(self, number: int) -> NDArray[np.intp]:
        """Return where the rows of one slice stand in the matrix."""
        within = [size // self.groups for size in self.sizes]
        starts = np.arange(self.groups) * sum(within) + sum(within[:number])
        return (starts[:, None] + np.arange(within[number])).reshape(-1)


def _are_flags(value: JsonValue) -> bool:
    return isinstance(value, list) and all(isinstance(each, bool) for each in value) and any(value)


def _are_sizes(value: JsonValue) -> bool:
    return isinstance(value, list) and all(type(each) is int and each > 0 for each in value)


class MergedLinear(FactoredKind):
    """The kind `merged_linear`."""

    name = "merged_linear"
    formula = "W + s·B_g·A_g in the rows of each adapted slice g"
    source = "loralib 0.1.2, MergedLinear; litgpt, LoRAQKVLinear"
    layouts = (Layout(MATRICES, {_DOWN: "slices in", _UP: "rows rank"}),)
    options: ClassVar[Mapping[str, Option]] = {
        "enable_lora": Option(_are_flags, "a list of true and false, one for each slice, at least one true"),
        "sizes": Option(_are_sizes, "a list of whole numbers, the rows of each slice", None),
        "groups": count(1),
    }

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return problems of slices that the factors do not have."""
        slices = self._slices(target)
        where, found = target.name, f"A ({axes['slices']}, {axes['in']}), B ({axes['rows']}, {axes['rank']})"
        if len(slices.sizes) != len(slices.enabled) or sum(slices.adapted_sizes) != axes["rows"]:
            sizes = f"{len(slices.enabled)} slices, the adapted ones of {axes['rows']} rows together"
            return [Problem("LF203", where, f"{found}, slices of {slices.sizes} rows", sizes)]
        adapted = sum(slices.enabled)
        if axes["slices"] != adapted * axes["rank"]:
            return [Problem("LF203", where, found, f"A with {adapted} · {axes['rank']} rows for {adapted} slices")]
        if any(size % slices.groups for size in slices.sizes):
            uneven = f"slices of {slices.sizes} rows in {slices.groups} groups"
            return [Problem("LF203", where, uneven, "as many rows of a slice in every group")]
        return []

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in)` of the fused weight."""
        return sum(self._slices(target).sizes), self.axes(target)["in"]

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`; s is folded into B in float64, rounded once."""
        right = np.ascontiguousarray(factors[_DOWN])
        left = _expand(self._slices(target), factors[_UP].astype(np.float64) * scale, change.shape[0])
        return LowRankDelta(left.astype(right.dtype), right)

    def norm(self, target: Target, factors: Mapping[str, NDArray[Any]]) -> float:
        """Return the norm from the Gram matrices of each slice; slices do not overlap."""
        down, up = factors[_DOWN].astype(np.float64), factors[_UP].astype(np.float64)
        squared, row, rank = 0.0, 0, up.shape[1]
        for place, size in enumerate(self._slices(target).adapted_sizes):
            left, right = up[row : row + size], down[place * rank : (place + 1) * rank]
            squared += float(np.sum((left.T @ left) * (right @ right.T)))
            row += size
        return abs(target.scale) * math.sqrt(max(squared, 0.0))

    def _slices(self, target: Target) -> _Slices:
        """Return the slices that the options say."""
        enabled = tuple(self.option(target, "enable_lora"))
        sizes = self.option(target, "sizes")
        if sizes is None:
            sizes = [target.factors[_UP].shape[0] // sum(enabled)] * len(enabled)
        return _Slices(enabled, tuple(sizes), self.option(target, "groups"))


def _expand(slices: _Slices, up: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """Return B of all rows `(rows, rank * n)`: each adapted slice has columns of its own, the rest is zero."""
    rank = up.shape[1]
    adapted = [number for number, enabled in enumerate(slices.enabled) if enabled]
    wide = np.zeros((rows, rank * len(adapted)))
    row = 0
    for place, number in enumerate(adapted):
        where = slices.rows_of(number)
        wide[where, place * rank : (place + 1) * rank] = up[row : row + len(where)]
        row += len(where)
    return wide


KIND: Final = MergedLinear()
