"""Which tensors of a file lie over the same bytes: torch writes tied and sliced tensors as views of one storage."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraformat.spans import Span, StoredTensor

_LISTED: Final = 8


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are one and the same: equal bytes, number form and shape.

    Attributes:
        tensors: them, in the order of the file.
        overlapping: words for other tensors that share bytes with them, not all of many.
    """

    tensors: tuple[StoredTensor, ...]
    overlapping: tuple[str, ...]

    @property
    def first(self) -> StoredTensor:
        """The one that gives the weight its key."""
        return self.tensors[0]


def group_aliases(tensors: Iterable[StoredTensor]) -> list[Group]:
    """Return all tensors that have bytes, each in one group, in the order of their first ones.

    Every group that shares bytes with another has some words for it, found in a time that does not grow with how many
    there are: a hostile file can lay a million views over one storage.
    """
    same: dict[tuple[Span, str, tuple[int, ...], str], list[StoredTensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.elements:
            own = "" if tensor.is_contiguous else tensor.name
            same[tensor.extent, tensor.dtype.name, tensor.shape, own].append(tensor)
    groups = [tuple(group) for group in same.values()]
    words = _find_overlaps([group[0] for group in groups])
    return [Group(group, tuple(words[index])) for index, group in enumerate(groups)]


def _find_overlaps(tensors: Sequence[StoredTensor]) -> Mapping[int, list[str]]:
    """Return words for what overlaps each tensor: the widest one that begins before it, and some that begin inside."""
    by_file: dict[Path, list[tuple[int, int, int]]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        extent = tensor.extent
        by_file[extent.path].append((extent.offset, -extent.end, index))
    found: dict[int, list[str]] = defaultdict(list)
    for entries in by_file.values():
        entries.sort()
        widest_end, widest = 0, -1
        for place, (start, minus_end, index) in enumerate(entries):
            if widest_end > start:
                found[index].append(_say(tensors[widest]))
            for after, _, other in entries[place + 1 : place + _LISTED]:
                if after >= -minus_end:
                    break
                found[index].append(_say(tensors[other]))
            if -minus_end > widest_end:
                widest_end, widest = -minus_end, index
    return found


def _say(tensor: StoredTensor) -> str:
    return f"the tensor {tensor.name!r}, whose bytes overlap its own"
