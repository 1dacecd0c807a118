"""Functions of a weight in which its rows or columns go into each other, each computed some rows at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraformat.kinds import Delta
from loraformat.kinds._maps import Tiles, add_rows


@dataclass(frozen=True, slots=True)
class BlockMap:
    """D·W, or W·D, with a matrix D of square blocks on its diagonal; one block stands for all of them.

    Where the blocks reach beyond the matrix, the last one is cut off.

    Attributes:
        shape: `(rows, columns)`.
        blocks: (blocks or 1, b, b).
        is_on_rows: whether D stands on the left.
        numbers: what every row `(rows, 1)` or column `(1, columns)` is multiplied by in the end, or None.
    """

    shape: tuple[int, int]
    blocks: NDArray[Any]
    is_on_rows: bool
    numbers: NDArray[Any] | None = None

    @property
    def row_block(self) -> int:
        """A block of rows, where D stands on the left; all rows where the last block is cut off."""
        size = self.blocks.shape[1]
        if not self.is_on_rows:
            return 1
        return size if self.shape[0] % size == 0 else self.shape[0]

    def transposed(self) -> "BlockMap":
        """Return the same function of the transposed matrix."""
        blocks = np.ascontiguousarray(self.blocks.transpose(0, 2, 1))
        numbers = self.numbers.T if self.numbers is not None else None
        return BlockMap(self.shape[::-1], blocks, not self.is_on_rows, numbers)

    def prepare(self, tiles: Tiles) -> "BlockMap":
        """Return the map; it needs no pass."""
        return self

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop` of f(W) into `out`; a block of rows begins at `start` where D stands on the left."""
        if self.is_on_rows:
            out[...] = self._turn(base.T, start).T
        else:
            out[...] = self._turn(base, 0)
        if self.numbers is not None:
            np.multiply(out, self.numbers[start:stop] if len(self.numbers) > 1 else self.numbers, out=out)

    def _turn(self, rows: NDArray[Any], first: int) -> NDArray[Any]:
        """Return rows (n, columns), each stretch of b columns times its block; the first column is `first` of W's."""
        size, width = self.blocks.shape[1], rows.shape[1]
        count = -(-width // size)
        padded = rows
        if count * size != width:
            padded = np.zeros((len(rows), count * size), rows.dtype)
            padded[:, :width] = rows
        blocks = self.blocks if len(self.blocks) == 1 else self.blocks[first // size : first // size + count]
        if self.is_on_rows:
            blocks = blocks.transpose(0, 2, 1)
        parts = padded.reshape(len(rows), count, size).transpose(1, 0, 2)
        turned = np.matmul(parts, blocks).transpose(1, 0, 2).reshape(len(rows), count * size)
        return np.asarray(turned[:, :width])


@dataclass(frozen=True, slots=True)
class ProjectionMap:
    """W + g(W·U)·V + D, or U·g(V·W) + W + D with the projection on the left.

    Attributes:
        shape: `(rows, columns)`.
        left: U (columns, k), or (rows, k) on the left.
        right: V (k, columns), or (k, rows).
        is_on_rows: whether the projection stands on the left.
        added: D, or None.
        between: g, which maps `(n, k)` row by row, the k numbers of a row of W, or of a column on the left; or None.
        projected: g(V·W) (k, columns) on the left, known after a pass.
    """

    shape: tuple[int, int]
    left: NDArray[Any]
    right: NDArray[Any]
    is_on_rows: bool = False
    added: Delta | None = None
    between: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    projected: NDArray[Any] | None = None

    @property
    def row_block(self) -> int:
        """The projection of all rows comes from a pass before."""
        return 1

    def transposed(self) -> "ProjectionMap":
        """Return the same function of the transposed matrix."""
        added = self.added.transposed() if self.added is not None else None
        turned = replace(self, shape=self.shape[::-1], left=self.right.T, right=self.left.T, added=added)
        return replace(turned, is_on_rows=not self.is_on_rows)

    def prepare(self, tiles: Tiles) -> "ProjectionMap":
        """Return the map with the projection of all rows, which takes a pass."""
        if not self.is_on_rows:
            return self
        projected = np.zeros((self.right.shape[0], self.shape[1]), np.float64)
        for start, base in tiles:
            projected += self.right[:, start : start + len(base)] @ base
        if self.between is not None:
            projected = self.between(projected.T).T
        return replace(self, projected=np.ascontiguousarray(projected.astype(self.left.dtype)))

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop` of f(W) into `out`."""
        if self.is_on_rows:
            assert self.projected is not None, "the map is prepared"
            np.matmul(self.left[start:stop], self.projected, out=out)
        else:
            projected = base @ self.left
            np.matmul(self.between(projected) if self.between is not None else projected, self.right, out=out)
        np.add(out, base, out=out)
        add_rows(self.added, start, stop, out)


@dataclass(frozen=True, slots=True)
class WholeMap:
    """A function that must see all of a weight at once, such as one of its singular vectors.

    Attributes:
        shape: `(rows, columns)`.
        compute: f, from W and to W′ in float64.
        is_turned: whether the matrix is the transpose of what `compute` takes.
        result: f(W), known after a pass.
    """

    shape: tuple[int, int]
    compute: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    is_turned: bool = False
    result: NDArray[Any] | None = None

    @property
    def row_block(self) -> int:
        """All of it comes from a pass before."""
        return 1

    def transposed(self) -> "WholeMap":
        """Return the same function of the transposed matrix."""
        return replace(self, shape=self.shape[::-1], is_turned=not self.is_turned)

    def prepare(self, tiles: Tiles) -> "WholeMap":
        """Return the map with its result, which takes a pass and memory for the whole weight."""
        whole, form = np.empty(self.shape, np.float64), np.dtype(np.float64)
        for start, base in tiles:
            whole[start : start + len(base)], form = base, base.dtype
        result = self.compute(whole.T).T if self.is_turned else self.compute(whole)
        return replace(self, result=result.astype(form, copy=False))

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop` of f(W) into `out`."""
        assert self.result is not None, "the map is prepared"
        np.copyto(out, self.result[start:stop])
