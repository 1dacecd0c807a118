"""What a conversion does to tensors: operations that can be undone, and `Scale`, the only one that can round.

A conversion never edits tensors in place. It builds `DerivedFactor`s, each an operation over other factors, which read
and compute when their own numbers are asked for: nothing is held for all targets at once. All but `Scale` move numbers
without looking at them, so any number form passes bit by bit. The tree is at the same time the record of what is done,
for `convert --dry-run`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor
from loraformat.dtypes import BY_NAME, Dtype

Shape = tuple[int, ...]


class Operation(Protocol):
    """One step; raises ValueError where its sources do not fit it."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape of the result for sources of these shapes."""
        ...

    def dtype(self, dtypes: Sequence[Dtype]) -> Dtype:
        """Return the number form of the result."""
        ...

    def apply(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the result."""
        ...

    def __str__(self) -> str:
        """Say what is done, in few words."""
        ...


class _Moves:
    """An operation that moves numbers and leaves their form alone."""

    __slots__ = ()

    def dtype(self, dtypes: Sequence[Dtype]) -> Dtype:
        if len(set(dtypes)) != 1:
            raise ValueError(f"sources of the number forms {', '.join(sorted({each.name for each in dtypes}))}")
        return dtypes[0]


@dataclass(frozen=True, slots=True)
class Transpose(_Moves):
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
class Reshape(_Moves):
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
class Take(_Moves):
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
        return f"{_AXIS_WORDS.get(self.axis, f'axis {self.axis}')} {self.start}:{self.stop}"


_AXIS_WORDS = {0: "rows", 1: "columns"}


@dataclass(frozen=True, slots=True)
class Concatenate(_Moves):
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
        return f"concatenate {_AXIS_WORDS.get(self.axis, f'axis {self.axis}')}"


@dataclass(frozen=True, slots=True)
class BlockDiagonal(_Moves):
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
class Pad(_Moves):
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
        what = _AXIS_WORDS.get(self.axis, f"axis {self.axis}")
        return f"pad {what} with {self.before} zeros before and {self.after} after"


@dataclass(frozen=True, slots=True)
class Permute(_Moves):
    """Another order of one axis: seen as `blocks`, its parts are put in the order `order`.

    Rotary embeddings pair the rows of a head in two ways. Half-split to interleaved is `blocks (heads, 2, half)` and
    `order (0, 2, 1)`; the way back is `blocks (heads, half, 2)` and the same order.

    Attributes:
        blocks: sizes whose product is that of the axis.
        order: `order[i]` is the block axis that becomes the i-th.
        axis: which axis.
    """

    blocks: tuple[int, ...]
    order: tuple[int, ...]
    axis: int = 0

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the same shape."""
        (sizes,) = shapes
        if self.axis >= len(sizes) or math.prod(self.blocks) != sizes[self.axis]:
            raise ValueError(f"blocks {self.blocks} of axis {self.axis} of a tensor of shape {sizes}")
        return sizes

    def apply(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the array in the new order."""
        indices = np.arange(math.prod(self.blocks)).reshape(self.blocks).transpose(self.order).reshape(-1)
        return np.ascontiguousarray(np.take(arrays[0], indices, axis=self.axis))

    def undo(self) -> "Permute":
        """Return the operation that leads back."""
        blocks = tuple(self.blocks[axis] for axis in self.order)
        return Permute(blocks, tuple(self.order.index(axis) for axis in range(len(self.order))), self.axis)

    def __str__(self) -> str:
        return f"permute {_AXIS_WORDS.get(self.axis, f'axis {self.axis}')} {list(self.blocks)} to {list(self.order)}"


@dataclass(frozen=True, slots=True)
class GroupHeads(_Moves):
    """The rows of q, k and v, one below the other, in groups: the q heads of a key-value head, then its k and its v.

    Megatron stores fused attention so, and splits it among its processes by groups.

    Attributes:
        heads: heads of q.
        kv_heads: heads of k and of v, which is the number of groups.
        head_dim: rows of one head.
        undone: whether it leads from the groups back to q, k and v.
    """

    heads: int
    kv_heads: int
    head_dim: int
    undone: bool = False

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the same shape."""
        (sizes,) = shapes
        if not sizes or sizes[0] != (self.heads + 2 * self.kv_heads) * self.head_dim or self.heads % self.kv_heads:
            raise ValueError(f"{self} of a tensor of shape {sizes}")
        return sizes

    def apply(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the rows in the new order."""
        rows = np.arange((self.heads + 2 * self.kv_heads) * self.head_dim)
        ends = self.heads * self.head_dim, (self.heads + self.kv_heads) * self.head_dim
        parts = [part.reshape(self.kv_heads, -1) for part in np.split(rows, ends)]
        order = np.concatenate(parts, axis=1).reshape(-1)
        return np.ascontiguousarray(arrays[0][np.argsort(order) if self.undone else order])

    def undo(self) -> "GroupHeads":
        """Return the operation that leads back."""
        return GroupHeads(self.heads, self.kv_heads, self.head_dim, not self.undone)

    def __str__(self) -> str:
        what = f"{self.heads} heads in {self.kv_heads} groups"
        return f"rows from {what} to q, k, v" if self.undone else f"rows of q, k, v to {what}"


@dataclass(frozen=True, slots=True)
class SwapHalves(_Moves):
    """The second half of an axis before the first; its own way back."""

    axis: int = 0

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the same shape."""
        (sizes,) = shapes
        if self.axis >= len(sizes) or sizes[self.axis] % 2:
            raise ValueError(f"halves of axis {self.axis} of a tensor of shape {sizes}")
        return sizes

    def apply(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the swapped array."""
        return np.roll(arrays[0], arrays[0].shape[self.axis] // 2, axis=self.axis)

    def undo(self) -> "SwapHalves":
        """Return the operation that leads back."""
        return self

    def __str__(self) -> str:
        return f"swap halves of {_AXIS_WORDS.get(self.axis, f'axis {self.axis}')}"


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
class DerivedFactor:
    """A tensor that an operation makes of others when it is read.

    Attributes:
        name: what it is called in messages: that of its first source.
        operation: what is done.
        sources: to what.
        dtype: its number form.
        shape: its dimensions.
    """

    name: str
    operation: Operation
    sources: tuple[Factor, ...]
    dtype: Dtype
    shape: Shape

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def read(self) -> NDArray[Any]:
        """Read the sources and return what the operation makes of them."""
        return self.operation.apply([source.read() for source in self.sources])


@dataclass(frozen=True, slots=True, eq=False)
class NewFactor:
    """A tensor that no source has, such as an alpha that its source keeps in a configuration."""

    name: str
    array: NDArray[Any]

    @property
    def dtype(self) -> Dtype:
        """Its number form."""
        return BY_NAME[self.array.dtype.name]

    @property
    def shape(self) -> Shape:
        """Its dimensions."""
        return self.array.shape

    @property
    def elements(self) -> int:
        """The number of elements."""
        return int(self.array.size)

    def read(self) -> NDArray[Any]:
        """Return its numbers."""
        return self.array


def derive(operation: Operation, *sources: Factor) -> Factor:
    """Return the tensor that `operation` makes of `sources`; raises ValueError where they do not fit."""
    dtype = operation.dtype([source.dtype for source in sources])
    shape = operation.shape([source.shape for source in sources])
    return DerivedFactor(sources[0].name, operation, sources, dtype, shape)


def find_origins(factor: Factor) -> Iterator[Factor]:
    """Yield the stored tensors that a factor is made of, from left to right.

    Whoever makes factors of others says of which: by `sources`, or by `source` where it is one.
    """
    single = getattr(factor, "source", None)
    sources = getattr(factor, "sources", () if single is None else (single,))
    if not sources:
        yield factor
    for source in sources:
        yield from find_origins(source)


def list_steps(factor: Factor) -> list[str]:
    """Return what is done to make a factor, innermost first, each step once."""
    if not isinstance(factor, DerivedFactor):
        return []
    inner = [step for source in factor.sources for step in list_steps(source)]
    return list(dict.fromkeys([*inner, str(factor.operation)]))
