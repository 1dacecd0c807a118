"""BOFT: the weight turned by butterflies of orthogonal blocks, its rows scaled (Liu et al., arXiv 2311.06243).

    boft_R (factors, blocks, b, b)    boft_s (out, 1), of a convolution (1, out)

S = ½·(R − Rᵀ) of every block gives an orthogonal one, (I − S)·(I + S)⁻¹. Factor i has it on the diagonal of a matrix of
inputs in another order: in every run of 2^i·b inputs the first half and the second are dealt out in turn, b / 2 inputs
at a time, and put back after. Factor 0 acts first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import REST, UNKNOWN, Change, Nature, WeightMap
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import MATRICES, FactoredKind, check_width
from loraformat.kinds._maps import Tiles
from loraformat.kinds._mixing_maps import BlockMap
from loraformat.kinds._rotations import turn_by_cayley
from loraformat.problems import Problem


@dataclass(frozen=True, slots=True)
class ButterflyColumns:
    """W·D₀·D₁ ..., each of blocks on the diagonal of a matrix of columns in an order of its own.

    Attributes:
        shape: `(rows, columns)`.
        blocks: (factors, blocks, b, b).
        numbers: what every row `(rows, 1)` or column `(1, columns)` is multiplied by in the end.
        is_turned: whether the matrix is the transpose of what is turned.
    """

    shape: tuple[int, int]
    blocks: NDArray[Any]
    numbers: NDArray[Any]
    is_turned: bool = False

    @property
    def row_block(self) -> int:
        """Rows that the last factor mixes, where they are what is turned."""
        return _reach(self.blocks.shape) if self.is_turned else 1

    def transposed(self) -> "ButterflyColumns":
        """Return the same function of the transposed matrix."""
        return replace(self, shape=self.shape[::-1], numbers=self.numbers.T, is_turned=not self.is_turned)

    def prepare(self, tiles: Tiles) -> "ButterflyColumns":
        """Return the map; it needs no pass."""
        return self

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop` of f(W) into `out`; whole blocks of rows where they are what is turned."""
        turned = self._turn(np.ascontiguousarray(base.T), start).T if self.is_turned else self._turn(base, 0)
        np.multiply(turned, self.numbers[start:stop] if len(self.numbers) > 1 else self.numbers, out=out)

    def _turn(self, rows: NDArray[Any], first: int) -> NDArray[Any]:
        """Return rows `(n, columns)`, of which the first column is column `first` of the weight's."""
        count, size = len(rows), self.blocks.shape[2]
        begin, runs = first // size, rows.shape[1] // size
        for factor, blocks in enumerate(self.blocks):
            apart = 2**factor
            dealt = rows.reshape(count, -1, 2, apart, size // 2).swapaxes(2, 3).reshape(count, runs, size)
            turned = np.matmul(dealt.swapaxes(0, 1), blocks[begin : begin + runs]).swapaxes(0, 1)
            rows = turned.reshape(count, -1, apart, 2, size // 2).swapaxes(2, 3).reshape(count, -1)
        return rows


class Boft(FactoredKind):
    """The kind `boft`."""

    name = "boft"
    nature = Nature.FUNCTION_OF_BASE
    formula = "(W·D₀ᵀ·D₁ᵀ···)∘s, orthogonal blocks on the diagonal of each D in its order"
    source = "arXiv 2311.06243; PEFT BOFT"
    layouts = (
        Layout(MATRICES, {"boft_R": "factors blocks size size", "boft_s": "out 1"}),
        Layout((SlotKind.CONV,), {"boft_R": "factors blocks size size", "boft_s": "1 out"}),
    )
    is_scaled = False
    rank_axis = ""

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of factors that reach beyond the inputs."""
        factors, blocks, size = (axes[name] for name in ("factors", "blocks", "size"))
        if factors == 1 or (factors <= blocks.bit_length() and blocks % 2 ** (factors - 1) == size % 2 == 0):
            return []
        found = f"{factors} factors over {blocks} blocks of {size}"
        expected = "blocks of an even size, and a multiple of 2^(factors - 1) of them"
        return [Problem("LF203", target.name, found, expected)]

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in)`; of a kernel the blocks tell the number of its elements."""
        axes = self.axes(target)
        if target.slot is SlotKind.CONV:
            return axes["out"], UNKNOWN, REST
        return axes["out"], axes["blocks"] * axes["size"]

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of a weight that the blocks do not cover."""
        axes = self.axes(target)
        return check_width(target, change, axes["blocks"] * axes["size"])

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> WeightMap:
        """Return the turned and scaled weight."""
        given = factors["boft_R"]
        whole = given.reshape(-1, *given.shape[2:]).astype(np.float64)
        blocks = turn_by_cayley((whole - whole.transpose(0, 2, 1)) / 2).astype(given.dtype)
        shape, numbers = (change.shape[0], int(np.prod(change.shape[1:]))), factors["boft_s"].reshape(-1, 1)
        turned_back = np.ascontiguousarray(blocks.transpose(0, 2, 1))
        if len(given) == 1:
            return BlockMap(shape, turned_back, is_on_rows=False, numbers=numbers)
        return ButterflyColumns(shape, turned_back.reshape(given.shape), numbers)

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return how many inputs the last factor mixes, where these are the rows."""
        return _reach(target.factors["boft_R"].shape) if transposed else 1


def _reach(shape: tuple[int, ...]) -> int:
    return int(2 ** (shape[0] - 1) * shape[2])


KIND: Final = Boft()
