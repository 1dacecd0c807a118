"""Operations that put the numbers along an axis in another order; each can be undone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraformat.derived import Moves, Shape, name_axis


@dataclass(frozen=True, slots=True)
class Permute(Moves):
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
        return f"permute {name_axis(self.axis)} {list(self.blocks)} to {list(self.order)}"


@dataclass(frozen=True, slots=True)
class GroupHeads(Moves):
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
class SwapHalves(Moves):
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
        return f"swap halves of {name_axis(self.axis)}"
