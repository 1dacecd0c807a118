"""The variant "bat" of MiSS and Bone: W + W·D + D in blocks (Kang et al., arXiv 2409.15371).

`miss_block` is (out / rank, rank, rank). Rank rows of W belong to one block D; they are cut into squares S, and each
becomes S + S·D + D.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import UNKNOWN, Change, Nature
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._maps import Tiles
from loraformat.problems import Problem


@dataclass(frozen=True, slots=True)
class BatMap:
    """Squares S of the weight become S + S·D + D.

    Attributes:
        shape: `(rows, columns)`.
        blocks: (blocks, rank, rank).
        is_turned: whether the matrix is the transposed one, so that the blocks belong to columns.
    """

    shape: tuple[int, int]
    blocks: NDArray[Any]
    is_turned: bool = False

    @property
    def row_block(self) -> int:
        """A row of squares, where it is cut from columns."""
        return self.blocks.shape[1] if self.is_turned else 1

    def transposed(self) -> "BatMap":
        """Return the same function of the transposed matrix."""
        return BatMap(self.shape[::-1], self.blocks, not self.is_turned)

    def prepare(self, tiles: Tiles) -> "BatMap":
        """Return the map; it needs no pass."""
        return self

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop` of f(W) into `out`."""
        if self.is_turned:
            out[...] = self._fill(base.T, range(self.shape[1])).T
        else:
            out[...] = self._fill(base, range(start, stop))

    def _fill(self, rows: NDArray[Any], which: range) -> NDArray[Any]:
        """Return rows `which` of the untransposed weight, changed; any whole number of squares wide."""
        rank = self.blocks.shape[1]
        filled = np.empty(rows.shape, rows.dtype)
        first = which.start
        while first < which.stop:
            block, inner = divmod(first, rank)
            last = min((block + 1) * rank, which.stop)
            part = rows[first - which.start : last - which.start]
            squares = part.reshape(len(part), -1, rank)
            added = self.blocks[block][inner : inner + len(part), None, :]
            filled[first - which.start : last - which.start] = (squares + squares @ self.blocks[block] + added).reshape(
                part.shape
            )
            first = last
        return filled


class MissBat(FactoredKind):
    """The kind `miss_bat`."""

    name = "miss_bat"
    nature = Nature.FUNCTION_OF_BASE
    formula = "S + S·D + D for every square S of W"
    source = 'arXiv 2409.15371; PEFT MISS and BONE with init_weights="bat"'
    layouts = (Layout(MATRICES, {"miss_block": "blocks rank rank"}),)
    is_scaled = False

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return the rows that the blocks tell."""
        axes = self.axes(target)
        return axes["blocks"] * axes["rank"], UNKNOWN

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of columns that are no whole squares."""
        rank = self.axes(target)["rank"]
        if change.shape[1] % rank == 0:
            return []
        return [Problem("LF405", target.name, f"a weight of {change.shape}", f"a multiple of {rank} columns")]

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> BatMap:
        """Return the changed weight."""
        out, inner = change.shape
        return BatMap((out, inner), factors["miss_block"])

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return the side of a square, where the stored matrix is transposed."""
        return self.axes(target)["rank"] if transposed else 1


KIND: Final = MissBat()
