"""A Hugging Face model folder: safetensors shards with their index, and everything that travels along.

The output is a folder: the shards with the adapted weights rewritten, every other file as it is, and the receipt in
`merge_receipt.json`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loraformat.bases import BaseModel, Site
from loraformat.bases._state_dict import digest_structure, list_sites, read_model_config
from loraformat.containers import TensorFile
from loraformat.containers.safetensors import CONTAINER
from loraformat.errors import LoraformatError, refuse
from loraformat.files import resolve_inside
from loraformat.images import Blank, Copy, FileImage, Literal
from loraformat.problems import Problem
from loraformat.spans import InputFile, StoredTensor, read_small
from loraformat.strict_json import parse_json_object

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
RECEIPT_NAME: Final = "merge_receipt.json"
_WEIGHT_SUFFIXES: Final = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".onnx_data", ".gguf", ".h5", ".msgpack", ".npz"}
)


class CheckpointFolder:
    """An opened model folder; the attributes are those of `BaseModel`."""

    format = "safetensors folder"
    suffix = ""
    folder_mark = RECEIPT_NAME

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        names, stated = _list_shards(self.path)
        self._shards: Mapping[str, TensorFile] = {name: _open_shard(self.path, name) for name in names}
        self._tensors = _join(self._shards, stated, self.path)
        self.problems: list[Problem] = []
        self._travelling = self._find_travelling()
        self.files: Sequence[InputFile] = [
            *(shard.file for shard in self._shards.values()),
            *self._travelling.values(),
        ]
        self.sites: Sequence[Site] = list_sites(self._tensors.values(), read_model_config(self.path))
        self.structure_sha256 = digest_structure(self._tensors.values(), {})
        self.parent_receipt: Mapping[str, Any] | None = self._read_receipt()

    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor, shard after shard."""
        return list(self._tensors.values())

    def describe_images(self, output: Path, blank_bytes: int, fresh: str) -> list[FileImage]:
        """Return the shards, the other files, and last the receipt."""
        copied = {name: shard.file for name, shard in self._shards.items()} | dict(self._travelling)
        images = [FileImage(output / name, [Copy(file, 0, file.size_bytes)]) for name, file in copied.items()]
        return [*images, FileImage(output / RECEIPT_NAME, [Blank(blank_bytes), Literal(b"\n")])]

    def encode_receipt(self, text: str) -> bytes:
        """Return the text as the receipt's file holds it."""
        return text.encode("utf-8")

    def list_stale(self, output: Path) -> list[Path]:
        """Return nothing: the whole folder is replaced."""
        return []

    def _find_travelling(self) -> Mapping[str, InputFile]:
        """Return the other files of the folder: configuration, tokenizer, index, notes; no weights of other formats.

        Those would be the base's, beside merged ones.
        """
        travelling: dict[str, InputFile] = {}
        for entry in sorted(self.path.iterdir()):
            if entry.name in self._shards or entry.name == RECEIPT_NAME:
                continue
            if entry.is_dir() or entry.suffix in _WEIGHT_SUFFIXES:
                what = "a folder" if entry.is_dir() else "weights in another file"
                self.problems.append(Problem("LF609", entry.name, f"{what}, left out of the output", severity="note"))
            else:
                travelling[entry.name] = InputFile(entry)
        return travelling

    def _read_receipt(self) -> Mapping[str, Any] | None:
        path = self.path / RECEIPT_NAME
        if not path.is_file():
            return None
        try:
            return parse_json_object(read_small(path), path)
        except LoraformatError as error:
            found = f"a receipt that cannot be read: {error.problems[0].found}"
            self.problems.append(Problem("LF104", str(path), found, severity="note"))
            return None


def _list_shards(folder: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """Return the shards' names, and the index's word on which tensor is in which, None without an index."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return [SINGLE_NAME], None
    stated = parse_json_object(read_small(index), index).get("weight_map")
    if not isinstance(stated, Mapping) or not stated:
        raise refuse("LF115", index, "no weight_map", "an object: tensor name to shard name")
    shards: dict[str, str] = {}
    for name, shard in stated.items():
        if not isinstance(shard, str):
            raise refuse("LF115", f"{index}: {name}", f"{shard!r:.80}", "the name of a shard")
        shards[name] = shard
    return sorted(set(shards.values())), shards


def _open_shard(folder: Path, name: str) -> TensorFile:
    path = resolve_inside(folder / INDEX_NAME, name)
    if path.parent != folder:
        raise refuse("LF903", folder / INDEX_NAME, f"the shard {name!r}", "a file in the model's own folder")
    return CONTAINER.open(path)


def _join(
    shards: Mapping[str, TensorFile], stated: Mapping[str, str] | None, folder: Path
) -> Mapping[str, StoredTensor]:
    """Return all tensors by name; each must be where the index says, and nowhere else."""
    tensors: dict[str, StoredTensor] = {}
    places: dict[str, str] = {}
    for shard, opened in shards.items():
        for name, tensor in opened.tensors.items():
            if name in tensors:
                raise refuse("LF115", f"{folder}: {name}", f"it is in {places[name]} and in {shard}", "one shard")
            tensors[name], places[name] = tensor, shard
    for name, shard in (stated or {}).items():
        if places.get(name) != shard:
            found = f"it is in {places[name]}" if name in places else "it is in no shard"
            raise refuse("LF115", f"{folder / INDEX_NAME}: {name}", found, f"the tensor in {shard}")
    for name in tensors:
        if stated is not None and name not in stated:
            raise refuse("LF115", f"{folder / places[name]}: {name}", "a tensor that the index lacks", "every tensor")
    return tensors


class CheckpointFolderFormat:
    """The base format of model folders."""

    name = "safetensors folder"
    suffixes: tuple[str, ...] = ()

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Recognise a folder with an index or with the one file that transformers writes for small models."""
        return path.is_dir() and any((path / name).is_file() for name in (INDEX_NAME, SINGLE_NAME))

    def open(self, path: Path) -> BaseModel:
        """Index the folder."""
        return CheckpointFolder(path)


BASE: Final = CheckpointFolderFormat()
