"""Functions of a weight that multiply its numbers, each computed some rows at a time."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraformat.kinds import Delta

Tiles = Iterable[tuple[int, NDArray[Any]]]
"""First row and rows of the base, as `WeightMap.prepare` takes them."""


def add_rows(added: Delta | None, start: int, stop: int, out: NDArray[Any]) -> None:
    """Add rows `start:stop` of a change, if there is one, to `out`."""
    if added is not None:
        room = np.empty_like(out)
        added.write_rows(start, stop, room)
        np.add(out, room, out=out)


@dataclass(frozen=True, slots=True)
class ElementwiseMap:
    """W∘(1 + F) + D, number by number.

    Attributes:
        factor: F.
        added: D, or None.
    """

    factor: Delta
    added: Delta | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.factor.shape

    @property
    def row_block(self) -> int:
        """Each number is computed from itself."""
        return 1

    def transposed(self) -> "ElementwiseMap":
        """Return the same function of the transposed matrix."""
        return ElementwiseMap(self.factor.transposed(), self.added.transposed() if self.added else None)

    def prepare(self, tiles: Tiles) -> "ElementwiseMap":
        """Return the map; it needs no pass."""
        return self

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop` of f(W) into `out`."""
        self.factor.write_rows(start, stop, out)
        np.add(out, 1, out=out)
        np.multiply(out, base, out=out)
        add_rows(self.added, start, stop, out)


@dataclass(frozen=True, slots=True)
class ScaleMap:
    """W with every row, or every column, multiplied by a number of its own.

    Attributes:
        shape: `(rows, columns)`.
        numbers: `(rows, 1)` or `(1, columns)`.
    """

    shape: tuple[int, int]
    numbers: NDArray[Any]

    @property
    def row_block(self) -> int:
        """Each number is computed from itself."""
        return 1

    def transposed(self) -> "ScaleMap":
        """Return the same function of the transposed matrix."""
        return ScaleMap(self.shape[::-1], self.numbers.T)

    def prepare(self, tiles: Tiles) -> "ScaleMap":
        """Return the map; it needs no pass."""
        return self

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop` of f(W) into `out`."""
        np.multiply(base, self.numbers[start:stop] if len(self.numbers) > 1 else self.numbers, out=out)


@dataclass(frozen=True, slots=True)
class NormMap:
    """V = W + Δ with each row, or each column, brought to the length that its magnitude says: m / (‖V‖ + ε) · V.

    Attributes:
        delta: Δ.
        magnitudes: (rows / spread,), or (columns / spread,) where columns have lengths.
        is_by_rows: whether rows have lengths.
        epsilon: added to the norm.
        spread: how many neighbouring rows, or columns, share one length: the places of a kernel.
        factors: m / (‖V‖ + ε) of all columns, known after a pass.
    """

    delta: Delta
    magnitudes: NDArray[Any]
    is_by_rows: bool = True
    epsilon: float = 0.0
    spread: int = 1
    factors: NDArray[Any] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.delta.shape

    @property
    def row_block(self) -> int:
        """Rows of one length; the norms of columns come from a pass before."""
        return self.spread if self.is_by_rows else 1

    def transposed(self) -> "NormMap":
        """Return the same function of the transposed matrix."""
        return replace(self, delta=self.delta.transposed(), is_by_rows=not self.is_by_rows)

    def prepare(self, tiles: Tiles) -> "NormMap":
        """Return the map with the norms of columns, which take a pass."""
        if self.is_by_rows:
            return self
        squares = np.zeros(self.shape[1], np.float64)
        for start, base in tiles:
            values = np.empty(base.shape, base.dtype)
            self.delta.write_rows(start, start + len(base), values)
            np.add(values, base, out=values)
            squares += np.einsum("ij,ij->j", values, values, dtype=np.float64)
        return replace(self, factors=self._count_factors(squares, self.magnitudes)[None, :])

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop` of f(W) into `out`."""
        self.delta.write_rows(start, stop, out)
        np.add(out, base, out=out)
        factors = self.factors
        if self.is_by_rows:
            squares = np.einsum("ij,ij->i", out, out, dtype=np.float64)
            magnitudes = self.magnitudes[start // self.spread : -(-stop // self.spread)]
            factors = self._count_factors(squares, magnitudes)[:, None]
        assert factors is not None, "the map is prepared"
        np.multiply(out, factors.astype(out.dtype, copy=False), out=out)

    def _count_factors(self, squares: NDArray[np.float64], magnitudes: NDArray[Any]) -> NDArray[np.float64]:
        lengths = np.sqrt(squares.reshape(-1, self.spread).sum(axis=1)) + self.epsilon
        factors: NDArray[np.float64] = np.repeat(magnitudes.astype(np.float64) / lengths, self.spread)
        return factors
