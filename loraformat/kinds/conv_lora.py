"""loralib's LoRA of a convolution, whose product is reshaped to the kernel instead of multiplied into it.

    A    lora_A.weight    (rank · k, in · k)
    B    lora_B.weight    (out / groups · k, rank · k)
    W    (out, in / groups, k, k)

ΔW = s · (B·A).reshape(out, in / groups, k, k): loralib's `view`, which fits two kernel axes of one size, or any number
of axes of size 1. k, the groups and the number of kernel axes stand in no tensor: `kernel_size`, `groups` and `axes` of
the options say them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor, SlotKind, Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._deltas import PartOf, cut
from loraformat.kinds._factored import FactoredKind, Option, count
from loraformat.kinds._matrices import Values
from loraformat.problems import Problem

_DOWN: Final = "lora_A.weight"
_UP: Final = "lora_B.weight"


@dataclass(frozen=True, slots=True)
class ReshapedDelta:
    """The matrix `left @ right` in another shape, formed only row by row.

    Attributes:
        left: (rows of the product, rank), the scale folded in.
        right: (rank, columns of the product).
        columns: columns of the matrix in its new shape.
    """

    left: NDArray[Any]
    right: NDArray[Any]
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.left.shape[0] * self.right.shape[1] // self.columns, self.columns

    def transposed(self) -> Values:
        """Return the transposed change, formed whole: no kernel is stored so."""
        return Values((self.left @ self.right).reshape(self.shape)).transposed()

    def part(self, rows: slice, columns: slice) -> PartOf:
        """Return some of its rows and columns."""
        return cut(self, rows, columns)

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        width = self.right.shape[1]
        first, last = start * self.columns // width, -(-stop * self.columns // width)
        flat = (self.left[first:last] @ self.right).reshape(-1)
        skipped = start * self.columns - first * width
        np.copyto(out, flat[skipped : skipped + out.size].reshape(out.shape))


class ConvLora(FactoredKind):
    """The kind `conv_lora`."""

    name = "conv_lora"
    formula = "W + s·(B·A), reshaped to the kernel"
    source = "loralib 0.1.2, ConvLoRA"
    layouts = (Layout((SlotKind.CONV,), {_DOWN: "wide_rank wide_in", _UP: "wide_out wide_rank"}),)
    options: ClassVar[Mapping[str, Option]] = {"kernel_size": count(), "groups": count(1), "axes": count(2)}
    rank_axis = "wide_rank"

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return problems of a kernel that the product does not have as many numbers as."""
        size, groups, kernel_axes = self._kernel(target)
        if kernel_axes > 3 or (size > 1 and kernel_axes != 2):
            found = f"{kernel_axes} kernel axes of size {size}"
            return [Problem("LF203", target.name, found, "two, or one to three of size 1, as loralib's view needs")]
        if any(each % size for each in axes.sizes.values()) or axes["wide_in"] // size % groups:
            found = f"A ({axes['wide_rank']}, {axes['wide_in']}), B ({axes['wide_out']}, {axes['wide_rank']})"
            return [Problem("LF203", target.name, found, f"multiples of {size}, and inputs in {groups} groups")]
        return []

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in / groups, *kernel)`."""
        axes = self.axes(target)
        size, groups, kernel_axes = self._kernel(target)
        return axes["wide_out"] // size * groups, axes["wide_in"] // size // groups, *(size,) * kernel_axes

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in / groups * kernel)`; s is folded into B in float64, rounded once."""
        right = np.ascontiguousarray(factors[_DOWN])
        left = (factors[_UP].astype(np.float64) * scale).astype(right.dtype)
        return ReshapedDelta(np.ascontiguousarray(left), right, math.prod(change.shape[1:]))

    def rank(self, factors: Mapping[str, Factor]) -> int:
        """Return 0: the factors show a multiple of it by the kernel's size, which only the options say."""
        return 0

    def _check_rank(self, target: Target) -> list[Problem]:
        wide, size = self.axes(target)["wide_rank"], self.option(target, "kernel_size")
        if target.rank * size == wide:
            return []
        found = f"rank {target.rank} stated, {wide} rows of A for a kernel of {size}"
        return [Problem("LF205", target.name, found, f"rank {wide // size}")]

    def _kernel(self, target: Target) -> tuple[int, int, int]:
        """Return k, the groups and the number of kernel axes."""
        size, groups, axes = (self.option(target, name) for name in ("kernel_size", "groups", "axes"))
        return size, groups, axes


KIND: Final = ConvLora()
