"""Mappings that nobody changes, for records that nobody changes; unlike those of `types`, they can be pickled."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class FrozenMapping(Mapping[Key, Value]):
    """A mapping as it was when this was made of it; none is the empty one."""

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[Key, Value] | None = None) -> None:
        self._entries = dict(entries or {})

    def __getitem__(self, key: Key) -> Value:
        return self._entries[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return repr(self._entries)
