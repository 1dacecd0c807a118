"""What a conversion does to tensors: operations that can be undone, and `Scale`, the only one that can round.

All but `Scale` move numbers without looking at them, so any number form passes bit by bit. `row_orders.py` has those
that only put rows in another order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraformat.derived import Moves, Shape, name_axis
from loraformat.dtypes import BY_NAME, Dtype


@dataclass(frozen=True, slots=True)
class Transpose(Moves):
    """Exchange the axes: `axes[i]` is the source's axis that becomes axis i."""

    axes: tuple[int, ...] = (1, 0)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the sizes in the new order."""
        (sizes,) = shapes
        if sorted(self.axes) != list(range(len(sizes))):
            raise ValueError(f"axes {self.axes} of a tensor of shape {sizes}")
        return tuple(sizes[axis] for axis in self.axes)

    def apply(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the transposed array."""
        return np.ascontiguousarray(arrays[0].transpose(self.axes))

    def undo(self) -> "Transpose":
        """Return the operation that leads back."""
        return Transpose(tuple(self.axes.index(axis) for axis in range(len(self.axes))))

    def __str__(self) -> str:
        return "transpose" if self.axes == (1, 0) else f"transpose to axes {list(self.axes)}"


@dataclass(frozen=True, slots=True)
class Reshape(Moves):
    """The same numbers in the same order under another shape."""

    to: Shape

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the new shape."""
        if math.prod(shapes[0]) != math.prod(self.to):
            raise ValueError(f"{shapes[0]} as {self.to}")
        return self.to

    def apply(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the reshaped array."""
        return arrays[0].reshape(self.to)

    def __str__(self) -> str:
        return f"reshape to {list(self.to)}"


@dataclass(frozen=True, slots=True)
class Take(Moves):
    """A range of one axis."""

    start: int
    stop: int
    axis: int = 0

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape of the range."""
        (sizes,) = shapes
        if self.axis >= len(sizes) or not 0 <= self.start <= self.stop <= sizes[self.axis]:
            raise ValueError(f"{self} of a tensor of shape {sizes}")
        return *sizes[: self.axis], self.stop - self.start, *sizes[self.axis + 1 :]

    def apply(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return a copy of the range."""
        index = (slice(None),) * self.axis + (slice(self.start, self.stop),)
        return np.ascontiguousarray(arrays[0][index])

    def __str__(self) -> str:
        return f"{name_axis(self.axis)} {self.start}:{self.stop}"


@dataclass(frozen=True, slots=True)
class Concatenate(Moves):
    """The sources one after the other along an axis."""

    axis: int = 0

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the summed shape."""
        first = shapes[0]
        rests = {(*sizes[: self.axis], *sizes[self.axis + 1 :]) for sizes in shapes}
        if len(rests) != 1 or self.axis >= len(first):
            raise ValueError(f"shapes {', '.join(map(str, shapes))} along axis {self.axis}")
        return *first[: self.axis], sum(sizes[self.axis] for sizes in shapes), *first[self.axis + 1 :]

    def apply(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the joined array."""
        return np.concatenate(arrays, axis=self.axis)

    def __str__(self) -> str:
        return f"concatenate {name_axis(self.axis)}"


@dataclass(frozen=True, slots=True)
class BlockDiagonal(Moves):
    """The sources `(out, rank, 1 ...)` as blocks on a diagonal `(sum of out, sum of rank, 1 ...)`, zeros elsewhere."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the summed shape."""
        if len({sizes[2:] for sizes in shapes}) != 1 or min(map(len, shapes)) < 2:
            raise ValueError(f"shapes {', '.join(map(str, shapes))} on a diagonal")
        return sum(sizes[0] for sizes in shapes), sum(sizes[1] for sizes in shapes), *shapes[0][2:]

    def apply(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the blocks in place."""
        whole = np.zeros(self.shape([array.shape for array in arrays]), dtype=arrays[0].dtype)
        row = column = 0
        for array in arrays:
            whole[row : row + array.shape[0], column : column + array.shape[1]] = array
            row, column = row + array.shape[0], column + array.shape[1]
        return whole

    def __str__(self) -> str:
        return "block-diagonal"


@dataclass(frozen=True, slots=True)
class Pad(Moves):
    """Zeros before and after, along an axis."""

    before: int
    after: int
    axis: int = 0

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the grown shape."""
        (sizes,) = shapes
        if min(self.before, self.after) < 0 or self.axis >= len(sizes):
            raise ValueError(f"{self} of a tensor of shape {sizes}")
        return *sizes[: self.axis], self.before + sizes[self.axis] + self.after, *sizes[self.axis + 1 :]

    def apply(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the padded array."""
        whole = np.zeros(self.shape([arrays[0].shape]), dtype=arrays[0].dtype)
        index = (slice(None),) * self.axis + (slice(self.before, self.before + arrays[0].shape[self.axis]),)
        whole[index] = arrays[0]
        return whole

    def undo(self, shape: Shape) -> Take:
        """Return the operation that leads back to a source of this shape."""
        return Take(self.before, self.before + shape[self.axis], self.axis)

    def __str__(self) -> str:
        what = name_axis(self.axis)
        return f"pad {what} with {self.before} zeros before and {self.after} after"


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply by a number, in float64, and round once to a number form: the one operation that can lose something.

    Attributes:
        factor: the number.
        form: name of the number form of the result.
    """

    factor: float
    form: str

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the same shape."""
        return shapes[0]

    def dtype(self, dtypes: Sequence[Dtype]) -> Dtype:
        """Return the form that is rounded to."""
        return BY_NAME[self.form]

    def apply(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the scaled array."""
        with np.errstate(over="ignore", under="ignore"):  # What is lost is measured, not raised.
            return (arrays[0].astype(np.float64) * self.factor).astype(BY_NAME[self.form].numpy())

    def __str__(self) -> str:
        return f"scale by {self.factor:.9g} as {self.form}"


@dataclass(frozen=True, slots=True)
class WholeNumbers:
    """Whole numbers, such as indices, that were stored as floats."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the source's shape."""
        return shapes[0]

    def dtype(self, dtypes: Sequence[Dtype]) -> Dtype:
        """Return 32-bit integers."""
        return BY_NAME["int32"]

    def apply(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the numbers as integers."""
        return arrays[0].astype(np.int32)

    def __str__(self) -> str:
        return "floats to whole numbers"
