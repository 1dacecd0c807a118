"""Changes of other forms than a product of two factors, each formed some rows at a time."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraformat.kinds import Delta
from loraformat.kinds._matrices import LowRankDelta


@dataclass(frozen=True, slots=True)
class PartOf:
    """Some rows and columns of a change that has no part of its own kind.

    Attributes:
        whole: the change.
        rows: its rows that this one has.
        columns: its columns.
    """

    whole: Delta
    rows: range
    columns: range

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return len(self.rows), len(self.columns)

    def transposed(self) -> "PartOf":
        """Return the transposed change."""
        return PartOf(self.whole.transposed(), self.columns, self.rows)

    def part(self, rows: slice, columns: slice) -> "PartOf":
        """Return some of its rows and columns."""
        return PartOf(self.whole, self.rows[rows], self.columns[columns])

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        wanted = self.rows[start:stop]
        if not wanted:
            return
        room = np.empty((wanted[-1] + 1 - wanted[0], self.whole.shape[1]), out.dtype)
        self.whole.write_rows(wanted[0], wanted[-1] + 1, room)
        columns = slice(self.columns.start, self.columns.stop, self.columns.step)
        np.copyto(out, room[:: wanted.step, columns])


def cut(whole: Delta, rows: slice, columns: slice) -> PartOf:
    """Return some rows and columns of a change."""
    return PartOf(whole, range(whole.shape[0])[rows], range(whole.shape[1])[columns])


@dataclass(frozen=True, slots=True)
class HadamardDelta:
    """The product, number by number, of two products of factors.

    Attributes:
        one: (rows, columns), the scale folded in.
        other: (rows, columns).
    """

    one: LowRankDelta
    other: LowRankDelta

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.one.shape

    def transposed(self) -> "HadamardDelta":
        """Return the transposed change."""
        return HadamardDelta(self.one.transposed(), self.other.transposed())

    def part(self, rows: slice, columns: slice) -> "HadamardDelta":
        """Return some of its rows and columns."""
        return HadamardDelta(self.one.part(rows, columns), self.other.part(rows, columns))

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        self.one.write_rows(start, stop, out)
        room = np.empty_like(out)
        self.other.write_rows(start, stop, room)
        np.multiply(out, room, out=out)


@dataclass(frozen=True, slots=True)
class KroneckerDelta:
    """The Kronecker product of two matrices: row i·c + k, column j·d + l is left[i, j]·right[k, l].

    Attributes:
        left: (a, b), the scale folded in.
        right: (c, d).
    """

    left: NDArray[Any]
    right: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1]

    def transposed(self) -> "KroneckerDelta":
        """Return the transposed change."""
        return KroneckerDelta(np.ascontiguousarray(self.left.T), np.ascontiguousarray(self.right.T))

    def part(self, rows: slice, columns: slice) -> PartOf:
        """Return some of its rows and columns."""
        return cut(self, rows, columns)

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        outer, inner = np.divmod(np.arange(start, stop), self.right.shape[0])
        shaped = out.reshape(stop - start, self.left.shape[1], self.right.shape[1])
        np.multiply(self.left[outer][:, :, None], self.right[inner][:, None, :], out=shaped)


@dataclass(frozen=True, slots=True)
class GatheredDelta:
    """A small matrix whose rows and columns are repeated: element (i, j) is matrix[rows[i], columns[j]].

    Attributes:
        matrix: the numbers, the scale folded in.
        rows: (rows,) whole numbers.
        columns: (columns,) whole numbers.
    """

    matrix: NDArray[Any]
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return len(self.rows), len(self.columns)

    def transposed(self) -> "GatheredDelta":
        """Return the transposed change."""
        return GatheredDelta(np.ascontiguousarray(self.matrix.T), self.columns, self.rows)

    def part(self, rows: slice, columns: slice) -> "GatheredDelta":
        """Return some of its rows and columns."""
        return GatheredDelta(self.matrix, self.rows[rows], self.columns[columns])

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        np.copyto(out, self.matrix[self.rows[start:stop, None], self.columns[None, :]])


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """A change of some numbers alone; of two in one place, both are added.

    Attributes:
        shape: `(rows, columns)`.
        rows: (n,) row of each number, ascending.
        columns: (n,) its column.
        values: (n,) the number, the scale folded in.
    """

    shape: tuple[int, int]
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    values: NDArray[Any]

    def transposed(self) -> "SparseDelta":
        """Return the transposed change."""
        return sort_sparse(self.shape[::-1], self.columns, self.rows, self.values)

    def part(self, rows: slice, columns: slice) -> PartOf:
        """Return some of its rows and columns."""
        return cut(self, rows, columns)

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        out[...] = 0
        first, last = np.searchsorted(self.rows, (start, stop))
        np.add.at(out, (self.rows[first:last] - start, self.columns[first:last]), self.values[first:last])


def sort_sparse(
    shape: tuple[int, int], rows: NDArray[np.intp], columns: NDArray[np.intp], values: NDArray[Any]
) -> SparseDelta:
    """Return a sparse change from numbers in any order."""
    order = np.argsort(rows, kind="stable")
    return SparseDelta(shape, rows[order], columns[order], values[order])


@dataclass(frozen=True, slots=True)
class SpectralDelta:
    """The real part of the inverse Fourier transform of a matrix that is zero but for some numbers.

    Attributes:
        shape: `(rows, columns)`.
        rows: (n,) row frequency of each number.
        columns: (n,) column frequency, ascending.
        values: (n,) the number, the scale folded in.
    """

    shape: tuple[int, int]
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    values: NDArray[Any]

    def transposed(self) -> "SpectralDelta":
        """Return the transposed change."""
        order = np.argsort(self.rows, kind="stable")
        return SpectralDelta(self.shape[::-1], self.columns[order], self.rows[order], self.values[order])

    def part(self, rows: slice, columns: slice) -> PartOf:
        """Return some of its rows and columns."""
        return cut(self, rows, columns)

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`: one axis summed up, the other transformed."""
        height, width = self.shape
        turns = np.outer(np.arange(start, stop), self.rows) % height  # Exact, where angles would lose digits.
        waves = np.exp(2j * np.pi / height * turns) * (self.values.astype(np.float64) / height)
        firsts = np.flatnonzero(np.diff(self.columns, prepend=-1))
        spectra = np.zeros((stop - start, width), np.complex128)
        if len(firsts):
            spectra[:, self.columns[firsts]] = np.add.reduceat(waves, firsts, axis=1)
        np.copyto(out, np.fft.ifft(spectra, axis=1).real, casting="same_kind")


@dataclass(frozen=True, slots=True)
class CirculantDelta:
    """Blocks that are circulant matrices: element (a, c) of block (i, j) is kernels[i, j, (c - a) mod b].

    Attributes:
        kernels: (rows / b, columns / b, b), the scale folded in.
    """

    kernels: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        size = self.kernels.shape[2]
        return self.kernels.shape[0] * size, self.kernels.shape[1] * size

    def transposed(self) -> "CirculantDelta":
        """Return the transposed change."""
        backwards = -np.arange(self.kernels.shape[2]) % self.kernels.shape[2]
        return CirculantDelta(np.ascontiguousarray(self.kernels[:, :, backwards].transpose(1, 0, 2)))

    def part(self, rows: slice, columns: slice) -> PartOf:
        """Return some of its rows and columns."""
        return cut(self, rows, columns)

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        size = self.kernels.shape[2]
        block, inner = np.divmod(np.arange(start, stop), size)
        places = (np.arange(size)[None, :] - inner[:, None]) % size
        taken = np.take_along_axis(self.kernels[block], places[:, None, :], axis=2)
        np.copyto(out, taken.reshape(out.shape))


@dataclass(frozen=True, slots=True)
class SumDelta:
    """Several changes of one matrix.

    Attributes:
        parts: the changes, all of one shape.
    """

    parts: tuple[Delta, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.parts[0].shape

    def transposed(self) -> "SumDelta":
        """Return the transposed change."""
        return SumDelta(tuple(each.transposed() for each in self.parts))

    def part(self, rows: slice, columns: slice) -> "SumDelta":
        """Return some of its rows and columns."""
        return SumDelta(tuple(each.part(rows, columns) for each in self.parts))

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        self.parts[0].write_rows(start, stop, out)
        room = np.empty_like(out)
        for each in self.parts[1:]:
            each.write_rows(start, stop, room)
            np.add(out, room, out=out)
