"""GLoRA as LyCORIS has it: W + s·(W·a1·a2 + b1·b2) (arXiv 2306.07967, two of its five parts).

    a1.weight    (in, rank, 1 ...)         a2.weight    (rank, in, 1 ...)
    b1.weight    (out, rank, 1 ...)        b2.weight    (rank, in, *kernel)

W·a1·a2 mixes the inputs of each place of the kernel apart. (PEFT's GLoRA has other parts: A, B, C, D, E.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import Change, Nature, WeightMap
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._maps import Tiles
from loraformat.kinds._matrices import LowRankDelta
from loraformat.kinds._mixing_maps import ProjectionMap

_A1, _A2, _B1, _B2 = _ROLES = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


@dataclass(frozen=True, slots=True)
class GloraMap:
    """W + W·a1·a2 + b1·b2.

    Attributes:
        projection: W + W·a1·a2.
        added: b1·b2.
    """

    projection: ProjectionMap
    added: LowRankDelta

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.added.shape

    @property
    def row_block(self) -> int:
        """That of the projection."""
        return self.projection.row_block

    def transposed(self) -> "GloraMap":
        """Return the same function of the transposed matrix."""
        return GloraMap(self.projection.transposed(), self.added.transposed())

    def prepare(self, tiles: Tiles) -> "GloraMap":
        """Return the map; transposed it takes a pass over the weight."""
        return replace(self, projection=self.projection.prepare(tiles))

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop` of f(W) into `out`."""
        self.projection.write_rows(start, stop, base, out)
        room = np.empty_like(out)
        self.added.write_rows(start, stop, room)
        np.add(out, room, out=out)


class Glora(FactoredKind):
    """The kind `lycoris_glora`."""

    name = "lycoris_glora"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W + s·(W·a1·a2 + b1·b2)"
    source = "LyCORIS 4.1, module glora; arXiv 2306.07967"
    layouts = (
        Layout(MATRICES, {_A1: "in rank", _A2: "rank in", _B1: "out rank", _B2: "rank in"}),
        Layout((SlotKind.CONV,), {_A1: "in rank *1", _A2: "rank in *1", _B1: "out rank *1", _B2: "rank in *kernel"}),
    )

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> WeightMap:
        """Return f for the matrix `(out, in * kernel)`; s is folded into a2 and b1 in float64, rounded once."""
        a1, a2, b1, b2 = (factors[role].reshape(len(factors[role]), -1) for role in _ROLES)
        each_place = np.eye(b2.shape[1] // len(a1), dtype=b2.dtype)
        right, left = np.kron(a1, each_place), np.kron(_scale(a2, target), each_place)
        shape = (len(b1), b2.shape[1])
        return GloraMap(ProjectionMap(shape, right, left), LowRankDelta(_scale(b1, target), np.ascontiguousarray(b2)))

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1 for either orientation."""
        return 1


def _scale(factor: NDArray[Any], target: Target) -> NDArray[Any]:
    scaled: NDArray[Any] = (factor.astype(np.float64) * target.scale).astype(factor.dtype)
    return scaled


KIND: Final = Glora()
