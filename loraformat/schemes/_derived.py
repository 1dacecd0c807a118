"""Factors that are computed from a stored tensor when they are read: a slice of it, or its blocks put in place."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor
from loraformat.dtypes import BY_NAME, Dtype

_HELD: Final = 2


class LastRead(threading.local):
    """The tensors that a thread read last, so that all slices of one are cut from one reading."""

    def __init__(self) -> None:
        self._held: list[tuple[Factor, NDArray[Any]]] = []

    def read(self, source: Factor) -> NDArray[Any]:
        """Return the tensor's numbers; not to be written to."""
        found = next((values for held, values in self._held if held is source), None)
        if found is None:
            found = source.read()
            self._held = [*self._held[1 - _HELD :], (source, found)]
        return found


@dataclass(frozen=True, slots=True)
class DerivedFactor:
    """A factor made from a stored one.

    Attributes:
        name: what it is called in messages.
        shape: its dimensions.
        source: the stored tensor.
        derive: makes it.
        last: where readings of the source are kept.
    """

    name: str
    shape: tuple[int, ...]
    source: Factor
    derive: Callable[[NDArray[Any]], NDArray[Any]] = field(compare=False)
    last: LastRead = field(compare=False)

    @property
    def dtype(self) -> Dtype:
        """The source's number form."""
        return self.source.dtype

    @property
    def elements(self) -> int:
        """The number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def file(self) -> object:
        """The file that the source is read from, None for one in memory."""
        return getattr(self.source, "file", None)

    def read(self) -> NDArray[Any]:
        """Return its numbers, freshly made."""
        return self.derive(self.last.read(self.source))


@dataclass(frozen=True, slots=True)
class WholeNumbers:
    """Whole numbers that were stored as floats.

    Attributes:
        source: the stored tensor.
    """

    source: Factor

    @property
    def name(self) -> str:
        """Its name in the source."""
        return self.source.name

    @property
    def dtype(self) -> Dtype:
        """32-bit integers."""
        return BY_NAME["int32"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return self.source.shape

    @property
    def elements(self) -> int:
        """The number of elements."""
        return self.source.elements

    @property
    def file(self) -> object:
        """The file that the source is read from, None for one in memory."""
        return getattr(self.source, "file", None)

    def read(self) -> NDArray[Any]:
        """Return its numbers."""
        return self.source.read().astype(np.int32)
