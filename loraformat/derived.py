"""Tensors that are made of others when they are read.

A conversion never edits tensors in place. It builds `DerivedFactor`s, each an operation over other factors, which read
and compute when their own numbers are asked for: nothing is held for all targets at once. The tree is at the same time
the record of what is done, for `convert --dry-run`.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from loraformat.adapter import Factor
from loraformat.dtypes import BY_NAME, Dtype

Shape = tuple[int, ...]
_HELD: Final = 2
_AXES: Final = {0: "rows", 1: "columns"}


def name_axis(axis: int) -> str:
    """Return what an axis is called in a record."""
    return _AXES.get(axis, f"axis {axis}")


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


class Moves:
    """An operation that moves numbers and leaves their form alone."""

    __slots__ = ()

    def dtype(self, dtypes: Sequence[Dtype]) -> Dtype:
        """Return the one number form of the sources."""
        if len(set(dtypes)) != 1:
            raise ValueError(f"sources of the number forms {', '.join(sorted({each.name for each in dtypes}))}")
        return dtypes[0]


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

    def __repr__(self) -> str:
        """Say what it is in one line."""
        return f"<tensor {self.name!r}: {self.dtype.name} {list(self.shape)}, computed: {self.operation}>"

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

    def __repr__(self) -> str:
        """Say what it is in one line."""
        return f"<tensor {self.name!r}: {self.array.dtype.name} {list(self.shape)}>"

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


class LastRead(threading.local):
    """The tensors that a thread read last, so that all slices of one are cut from one reading."""

    def __init__(self) -> None:
        self._held: list[tuple[Factor, NDArray[Any]]] = []

    def __reduce__(self) -> tuple[type["LastRead"], tuple[()]]:
        """Pickle, and copy, without what is held."""
        return LastRead, ()

    def read(self, source: Factor) -> NDArray[Any]:
        """Return the tensor's numbers; not to be written to."""
        found = next((values for held, values in self._held if held is source), None)
        if found is None:
            found = source.read()
            self._held = [*self._held[1 - _HELD :], (source, found)]
        return found


@dataclass(frozen=True, slots=True)
class KeptFactor:
    """A tensor that several others are made of: its numbers are kept until the next ones are read.

    Attributes:
        source: the tensor.
        last: where readings of it are kept.
    """

    source: Factor
    last: LastRead = field(compare=False)

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    @property
    def dtype(self) -> Dtype:
        """Its number form."""
        return self.source.dtype

    @property
    def shape(self) -> Shape:
        """Its dimensions."""
        return self.source.shape

    @property
    def elements(self) -> int:
        """The number of elements."""
        return self.source.elements

    def read(self) -> NDArray[Any]:
        """Return its numbers; not to be written to."""
        return self.last.read(self.source)


def derive(operation: Operation, *sources: Factor) -> Factor:
    """Return the tensor that `operation` makes of `sources`; raises ValueError where they do not fit."""
    dtype = operation.dtype([source.dtype for source in sources])
    shape = operation.shape([source.shape for source in sources])
    return DerivedFactor(sources[0].name, operation, sources, dtype, shape)


def find_origins(factor: Factor) -> Iterator[Factor]:
    """Yield the stored tensors that a factor is made of, from left to right."""
    sources = _list_sources(factor)
    if not sources:
        yield factor
    for source in sources:
        yield from find_origins(source)


def list_steps(factor: Factor) -> list[str]:
    """Return what is done to make a factor, innermost first, each step once."""
    inner = [step for source in _list_sources(factor) for step in list_steps(source)]
    own = [str(factor.operation)] if isinstance(factor, DerivedFactor) else []
    return list(dict.fromkeys([*inner, *own]))


def _list_sources(factor: Factor) -> Sequence[Factor]:
    """Return what a factor is made of: whoever makes factors of others says it by `sources`, or by `source`."""
    single = getattr(factor, "source", None)
    found: Sequence[Factor] = getattr(factor, "sources", () if single is None else (single,))
    return found
