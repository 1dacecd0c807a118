"""The arrays that go into the inputs of a model: factors of all changes that are added at one place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraformat.containers.onnx_adapter import write_onnx_adapter
from loraformat.errors import refuse
from loraformat.runtime.layouts import Layout
from loraformat.runtime.targets import Served

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair of inputs, and what goes into it.

    Attributes:
        layout: the inputs.
        slots: size of the stack; 0 for none.
        found: for each slot the changes that are added up in it; one list for all where there is no stack.
    """

    layout: Layout
    slots: int
    found: Sequence[Sequence[Served]]

    @property
    def rank(self) -> int:
        """The rank of the arrays: the largest of a stack."""
        return max(sum(each.rank for each in changes) for changes in self.found)

    def tensors(self) -> "list[tuple[str, tuple[int, ...], Callable[[], Array]]]":
        """Return A and B by name and shape, each computed when it is asked for."""
        stack = (self.slots,) if self.slots else ()
        down, up = ((*stack, *shape) for shape in self.layout.list_shapes(self.rank))
        return [
            (self.layout.down, down, lambda: self._make(down, _put_down)),
            (self.layout.up, up, lambda: self._make(up, _put_up)),
        ]

    def _make(self, shape: tuple[int, ...], put: Callable[[Layout, Array, Served, range], None]) -> Array:
        whole: Array = np.zeros(shape, np.float32)
        for slot, changes in enumerate(self.found):
            start = 0
            for change in changes:
                put(self.layout, whole[slot] if self.slots else whole, change, range(start, start + change.rank))
                start += change.rank
        return _round(whole, self.layout)


def _put_down(layout: Layout, room: Array, change: Served, ranks: range) -> None:
    """Put A of one change at its ranks."""
    right = change.read_product().right
    if layout.form == "conv":
        room[ranks.start : ranks.stop] = right.reshape(len(ranks), *room.shape[1:])
    else:
        room[:, ranks.start : ranks.stop] = right.T


def _put_up(layout: Layout, room: Array, change: Served, ranks: range) -> None:
    """Put B of one change at its ranks, and at the columns of its module."""
    left = change.read_product().left
    if layout.form == "conv":
        room[slice(*change.rows), ranks.start : ranks.stop] = left.reshape(*left.shape, *room.shape[2:])
    else:
        room[ranks.start : ranks.stop, slice(*change.rows)] = left.T


def _round(values: Array, layout: Layout) -> Array:
    """Return numbers in the form of the inputs; LF503 where one becomes infinite."""
    with np.errstate(over="ignore"):
        rounded = values.astype(layout.dtype.numpy())
    if not np.isfinite(rounded.astype(np.float32)).all():
        largest = float(np.abs(values).max())
        raise refuse("LF503", layout.name, f"{largest:g}", f"numbers that {layout.dtype.name} holds")
    return rounded


def write_pairs(descriptor: int, pairs: Sequence[Pair]) -> None:
    """Write an `.onnx_adapter` file of all pairs, one tensor in memory at a time."""
    tensors = [(name, pair.layout.dtype, shape, make) for pair in pairs for name, shape, make in pair.tensors()]
    write_onnx_adapter(descriptor, tensors, {})
