"""BOFT as LyCORIS has it: outputs are rotated in the stages of a butterfly (arXiv 2311.06243).

    oft_blocks    (stages, blocks, b, b)
    rescale       (out, 1 ...): what each output is multiplied by in the end

Q = B − Bᵀ and R = (I + Q)·(I − Q)⁻¹ of every block. Stage i brings outputs that are 2^i · b / 2 apart together,
turns each block of b by R, and puts them back.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import Change, WeightMap
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import MATRICES
from loraformat.kinds._maps import Tiles
from loraformat.kinds._output_rotations import BLOCKS, RESCALE, OutputRotation
from loraformat.problems import Problem


@dataclass(frozen=True, slots=True)
class ButterflyMap:
    """W with its outputs rotated in stages.

    Attributes:
        shape: `(rows, columns)`.
        rotations: (stages, blocks, b, b).
        is_on_rows: whether the outputs are the rows.
        numbers: what every output is multiplied by in the end, `(rows, 1)` or `(1, columns)`, or None.
    """

    shape: tuple[int, int]
    rotations: NDArray[Any]
    is_on_rows: bool = True
    numbers: NDArray[Any] | None = None

    @property
    def row_block(self) -> int:
        """Rows that the last stage mixes."""
        return _reach(self.rotations.shape) if self.is_on_rows else 1

    def transposed(self) -> "ButterflyMap":
        """Return the same function of the transposed matrix."""
        numbers = self.numbers.T if self.numbers is not None else None
        return replace(self, shape=self.shape[::-1], is_on_rows=not self.is_on_rows, numbers=numbers)

    def prepare(self, tiles: Tiles) -> "ButterflyMap":
        """Return the map; it needs no pass."""
        return self

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop` of f(W) into `out`; whole blocks of rows."""
        if self.is_on_rows:
            out[...] = self._rotate(base, start)
        else:
            out[...] = self._rotate(np.ascontiguousarray(base.T), 0).T
        if self.numbers is not None:
            np.multiply(out, self.numbers[start:stop] if self.is_on_rows else self.numbers, out=out)

    def _rotate(self, outputs: NDArray[Any], first: int) -> NDArray[Any]:
        """Return outputs `(n, columns)`, of which the first is output `first` of the weight."""
        columns, size = outputs.shape[1], self.rotations.shape[2]
        begin = first // size
        for stage, blocks in enumerate(self.rotations):
            apart = 2**stage * size // 2
            ordered = outputs.reshape(-1, 2, apart, columns).swapaxes(1, 2).reshape(-1, size, columns)
            turned = np.matmul(blocks[begin : begin + len(ordered)], ordered)
            outputs = turned.reshape(-1, apart, 2, columns).swapaxes(1, 2).reshape(-1, columns)
        return outputs


class LycorisBoft(OutputRotation):
    """The kind `lycoris_boft`."""

    name = "lycoris_boft"
    formula = "rescale∘(R_m···R_1·W), each R block-diagonal in the order of its stage"
    source = "LyCORIS 4.1, module boft; arXiv 2311.06243"
    layouts = (
        Layout(MATRICES, {BLOCKS: "stages blocks size size"}, {RESCALE: "out 1"}),
        Layout((SlotKind.CONV,), {BLOCKS: "stages blocks size size"}, {RESCALE: "out 1 *1"}),
    )

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return problems of stages that reach beyond the outputs, and those of any rotation."""
        stages, blocks, size = (axes[name] for name in ("stages", "blocks", "size"))
        if size % 2 or stages > blocks.bit_length() or blocks % 2 ** (stages - 1):
            found = f"{stages} stages over {blocks} blocks of {size}"
            expected = "blocks of an even size, and a multiple of 2^(stages - 1) of them"
            return [Problem("LF203", target.name, found, expected)]
        return super().check_more(target, axes)

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> WeightMap:
        """Return f for the matrix `(out, in * kernel)`."""
        shape = change.shape[0], math.prod(change.shape[1:])
        return ButterflyMap(shape, self.rotations(target, factors), numbers=self.rescaling(factors))

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return how many outputs the last stage mixes, where these are the rows."""
        return 1 if transposed else _reach(target.factors[BLOCKS].shape)


def _reach(shape: tuple[int, ...]) -> int:
    stages, _, size, _ = shape
    return int(2 ** (stages - 1) * size)


KIND: Final = LycorisBoft()
