"""The weight files of a model folder, and the index that says which tensor is in which."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraformat.containers import Container, TensorFile
from loraformat.errors import refuse
from loraformat.files import resolve_inside
from loraformat.limits import MAX_SAFETENSORS_HEADER_BYTES
from loraformat.spans import InputFile, StoredTensor, read_small
from loraformat.strict_json import JsonValue, parse_json_object

INDEX_SUFFIX: Final = ".index.json"
_INDEX: Final = re.compile(r"\.index(?:\.[^.]+)?\.json$")
"""The ending of an index, also of one of several that a folder has: `.index.fp16.json`."""


@dataclass(frozen=True, slots=True)
class Shards:
    """The weight files of a folder.

    Attributes:
        files: name to opened file.
        tensors: every tensor by name, file after file.
        places: name of a tensor to that of its file.
        index: the open index; None for a model of one file without one.
        metadata: what the index says beside the map.
    """

    files: Mapping[str, TensorFile]
    tensors: Mapping[str, StoredTensor]
    places: Mapping[str, str]
    index: InputFile | None
    metadata: Mapping[str, JsonValue]


def open_shards(entry: Path, container: Container) -> Shards:
    """Open all weight files; each tensor must be where the index says, and nowhere else.

    Args:
        entry: the index, or the only weight file.
        container: reads a weight file.

    Raises:
        InputError: LF115 files and index disagree; what `container` raises.
        RefusedError: LF903 a file outside the folder.
    """
    if _INDEX.search(entry.name) is None:
        files = {entry.name: container.open(entry)}
        tensors = files[entry.name].tensors
        return Shards(files, tensors, dict.fromkeys(tensors, entry.name), None, {})
    index = parse_json_object(read_small(entry, MAX_SAFETENSORS_HEADER_BYTES), entry)
    stated = _read_map(index, entry)
    files = {name: _open_shard(entry, name, container) for name in sorted(set(stated.values()))}
    metadata = index.get("metadata")
    tensors, places = _join(files, stated, entry)
    return Shards(files, tensors, places, InputFile(entry), metadata if isinstance(metadata, Mapping) else {})


def _read_map(index: Mapping[str, JsonValue], where: Path) -> Mapping[str, str]:
    stated = index.get("weight_map")
    if not isinstance(stated, Mapping) or not stated:
        raise refuse("LF115", where, "no weight_map", "an object: tensor name to shard name")
    shards: dict[str, str] = {}
    for name, shard in stated.items():
        if not isinstance(shard, str):
            raise refuse("LF115", f"{where}: {name}", f"{shard!r:.80}", "the name of a shard")
        shards[name] = shard
    return shards


def _open_shard(entry: Path, name: str, container: Container) -> TensorFile:
    path = resolve_inside(entry, name)
    if path.parent != entry.parent:
        raise refuse("LF903", entry, f"the shard {name!r}", "a file in the model's own folder")
    return container.open(path)


def _join(
    files: Mapping[str, TensorFile], stated: Mapping[str, str], index: Path
) -> tuple[Mapping[str, StoredTensor], Mapping[str, str]]:
    """Return all tensors, and the file of each, by name."""
    tensors: dict[str, StoredTensor] = {}
    places: dict[str, str] = {}
    for shard, opened in files.items():
        for name, tensor in opened.tensors.items():
            if name in tensors:
                where = f"{index.parent}: {name}"
                raise refuse("LF115", where, f"it is in {places[name]} and in {shard}", "one shard")
            tensors[name], places[name] = tensor, shard
    for name, shard in stated.items():
        if places.get(name) != shard:
            found = f"it is in {places[name]}" if name in places else "it is in no shard"
            raise refuse("LF115", f"{index}: {name}", found, f"the tensor in {shard}")
    for name in tensors:
        if name not in stated:
            where = f"{index.parent / places[name]}: {name}"
            raise refuse("LF115", where, "a tensor that the index lacks", "every tensor")
    return tensors, places
