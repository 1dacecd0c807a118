"""An adapter in several files, as trainers write one whose saved modules are large: `adapter_model-00001-of-00002`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Final

from loraformat.adapter import Factor
from loraformat.bases._shards import INDEX_SUFFIX, open_shards
from loraformat.containers import TensorFile
from loraformat.errors import refuse
from loraformat.loading.readers import choose_container, open_tensors
from loraformat.spans import InputFile, StoredTensor

_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_LISTED: Final = 4


@dataclass(frozen=True, slots=True)
class Opened:
    """The tensors of an adapter, in one file or in several.

    Attributes:
        tensors: name to unread tensor.
        metadata: text annotations of the files.
        files: the open files, in the order of their names.
    """

    tensors: Mapping[str, Factor]
    metadata: Mapping[str, str]
    files: tuple[InputFile, ...]


def name_whole(entry: Path) -> Path:
    """Return the path that the file would have if it were one: of a shard or an index, that of what was split."""
    if entry.name.endswith(INDEX_SUFFIX):
        return entry.with_name(entry.name.removesuffix(INDEX_SUFFIX))
    found = _SHARD.fullmatch(entry.name)
    return entry.with_name(found["stem"] + found["suffix"]) if found else entry


def find_split(whole: Path) -> Path | None:
    """Return the index of a file that was split, or its first shard where there is no index; None where it was not."""
    index = whole.with_name(whole.name + INDEX_SUFFIX)
    if index.is_file():
        return index
    return next(iter(_list_shards(whole)), None)


def open_factors(entry: Path, is_known: Callable[[str], bool]) -> Opened:
    """Open a file, or all shards of what it is an index or a shard of.

    Args:
        entry: a file of tensors, or an index.
        is_known: says whether adapters' files are called so; a shard of any other name is read by itself.

    Raises:
        LoraformatError: LF115 shards that are missing, or disagree with their index; what a container raises.
    """
    whole = name_whole(entry)
    if whole == entry or not (entry.name.endswith(INDEX_SUFFIX) or is_known(whole.name)):
        opened = open_tensors(entry)
        return Opened(opened.tensors, opened.metadata, (opened.file,))
    index = whole.with_name(whole.name + INDEX_SUFFIX)
    if not index.is_file():
        return _open_without_index(whole)
    shards = open_shards(index, choose_container(next(iter(_list_shards(whole)), whole)))
    return _join(shards.tensors, [*shards.files.values()])


def _open_without_index(whole: Path) -> Opened:
    paths = _list_shards(whole)
    counts = {_parts(path)[1] for path in paths}
    numbers = [_parts(path)[0] for path in paths]
    if len(counts) != 1 or numbers != [*range(1, max(counts) + 1)]:
        listed = ", ".join(path.name for path in paths[:_LISTED])
        raise refuse("LF115", whole.parent, f"{len(paths)} shards: {listed}", f"{max(counts)}, from 1 to {max(counts)}")
    tensors: dict[str, StoredTensor] = {}
    files = [open_tensors(path) for path in paths]
    for path, file in zip(paths, files, strict=True):
        twice = sorted(set(file.tensors) & set(tensors))
        if twice:
            raise refuse("LF115", f"{path}: {twice[0]}", "a tensor that another shard has as well", "one")
        tensors |= file.tensors
    return _join(tensors, files)


def _join(tensors: Mapping[str, Factor], shards: Sequence[TensorFile]) -> Opened:
    annotations = {name: text for shard in reversed(shards) for name, text in shard.metadata.items()}
    return Opened(tensors, annotations, tuple(shard.file for shard in shards))


def _list_shards(whole: Path) -> list[Path]:
    """Return the shards of a file, by their numbers."""
    entries = whole.parent.glob(f"{escape(whole.stem)}-*-of-*{escape(whole.suffix)}")
    return sorted(entry for entry in entries if _SHARD.fullmatch(entry.name) and name_whole(entry) == whole)


def _parts(path: Path) -> tuple[int, int]:
    found = _SHARD.fullmatch(path.name)
    assert found is not None, "listed by it"
    return int(found["number"]), int(found["count"])
