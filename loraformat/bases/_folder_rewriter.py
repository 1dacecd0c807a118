"""A model folder as new safetensors shards: each rewritten for itself, index and configuration along with it."""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraformat.bases import NewContents
from loraformat.bases._config_text import edit_config
from loraformat.bases._receipts import RECEIPT_NAME, describe_receipt_file
from loraformat.bases._rewriting import FORMAT, is_same, list_output, note_values, warn_of_config
from loraformat.bases._shards import INDEX_SUFFIX, Shards
from loraformat.bases._state_dict import CONFIG_NAME
from loraformat.containers._safetensors_images import describe_rewritten
from loraformat.images import Copy, FileImage, Literal, NewOutput, OutputTensor
from loraformat.limits import MAX_CONFIG_BYTES
from loraformat.problems import Problem
from loraformat.spans import InputFile, read_small
from loraformat.strict_json import JsonValue

_SUFFIX: Final = ".safetensors"
_TORCH_STEM: Final = "pytorch_model"
_STEM: Final = "model"


@dataclass(frozen=True, slots=True)
class FolderParts:
    """What a folder is made of.

    Attributes:
        path: the folder.
        shards: its weights.
        travelling: its other files, by their relative names.
        config: its `config.json`, empty where there is none.
        gone: names of tensors that the output lacks.
    """

    path: Path
    shards: Shards
    travelling: Mapping[str, InputFile]
    config: Mapping[str, JsonValue]
    gone: Collection[str] = ()


class FolderRewriter:
    """Describes a folder of safetensors shards; the attributes are those of `Rewriter`.

    Args:
        parts: the base's folder.
        suffix: the ending of its weight files.
    """

    format = f"{FORMAT} folder"
    suffix = ""
    folder_mark = RECEIPT_NAME

    def __init__(self, parts: FolderParts, suffix: str) -> None:
        self._parts = parts
        self._suffix = suffix
        self._tensors, notes = list_output(parts.shards.tensors.values(), parts.config, parts.gone)
        shards = parts.shards.files.items() if suffix != _SUFFIX else ()
        values = [note for name, shard in shards for note in note_values(name, shard.metadata)]
        self.problems: Sequence[Problem] = [*values, *notes]

    def output_tensors(self) -> list[OutputTensor]:
        """Return the tensors of the base as they stand, shard after shard."""
        return list(self._tensors)

    def describe_rewritten(self, output: NewOutput, contents: NewContents) -> list[FileImage]:
        """Return the shards, the index, the other files, and last the receipt.

        A tensor that is new goes into the shard of the tensor whose name is most like its own.
        """
        folder, placed = output.path, self._place(contents.tensors)
        images = [self._describe_shard(folder, shard, held) for shard, held in placed.items()]
        images += self._describe_index(folder, placed)
        images += self._describe_others(folder, contents.config_changes, contents.replaced_files)
        return [*images, *describe_receipt_file(folder / RECEIPT_NAME, output.blank_bytes)]

    def check_config(self, config_changes: Mapping[str, JsonValue]) -> list[Problem]:
        """Return a warning when the folder has no `config.json`."""
        has_config = CONFIG_NAME in self._parts.travelling
        return [] if has_config else warn_of_config(self._parts.path, config_changes)

    def encode_receipt(self, text: str) -> bytes:
        """Return the text as the receipt's file holds it."""
        return text.encode("utf-8")

    def _place(self, tensors: Sequence[OutputTensor]) -> Mapping[str, Sequence[OutputTensor]]:
        """Return the tensors of each shard, in the order of the shards; one that lost all of its tensors is gone."""
        places = self._parts.shards.places
        nearest = {"": next(iter(self._parts.shards.files)), **_index_prefixes(places)}
        held: dict[str, list[OutputTensor]] = defaultdict(list)
        for tensor in tensors:
            held[places.get(tensor.name) or _find_nearest(tensor.name, nearest)].append(tensor)
        return {shard: held[shard] for shard in self._parts.shards.files if shard in held}

    def _describe_shard(self, output: Path, shard: str, tensors: Sequence[OutputTensor]) -> FileImage:
        opened = self._parts.shards.files[shard]
        path = output / self._rename(shard)
        if self._suffix != _SUFFIX:
            return describe_rewritten(path, tensors, {"format": "pt"})
        if is_same(tensors, opened.tensors.values()):
            return FileImage(path, [Copy(opened.file, 0, opened.file.size_bytes)])
        return describe_rewritten(path, tensors, opened.metadata)

    def _describe_index(self, output: Path, placed: Mapping[str, Sequence[OutputTensor]]) -> list[FileImage]:
        shards = self._parts.shards
        if shards.index is None:
            return []
        tensors = [tensor for held in placed.values() for tensor in held]
        elements = sum(_count_elements(tensor) for tensor in tensors)
        counted = {"total_size": sum(tensor.nbytes for tensor in tensors), "total_parameters": elements}
        known = {key: count for key, count in counted.items() if key in shards.metadata or key == "total_size"}
        weight_map = {tensor.name: self._rename(shard) for shard, held in placed.items() for tensor in held}
        text = json.dumps(
            {"metadata": {**shards.metadata, **known}, "weight_map": weight_map}, indent=2, sort_keys=True
        )
        name = self._rename(shards.index.path.name.removesuffix(INDEX_SUFFIX)) + INDEX_SUFFIX
        return [FileImage(output / name, [Literal(f"{text}\n".encode())])]

    def _describe_others(
        self, output: Path, config_changes: Mapping[str, JsonValue], replaced_files: Mapping[str, InputFile]
    ) -> list[FileImage]:
        files = {**self._parts.travelling, **replaced_files}
        images = {name: FileImage(output / name, [Copy(file, 0, file.size_bytes)]) for name, file in files.items()}
        config = self._parts.path / CONFIG_NAME
        if config_changes and CONFIG_NAME in self._parts.travelling:
            text = edit_config(read_small(config, MAX_CONFIG_BYTES), config_changes, config)
            images[CONFIG_NAME] = FileImage(output / CONFIG_NAME, [Literal(text)])
        return list(images.values())

    def _rename(self, weights: str) -> str:
        """Return what a weight file is called as safetensors: `pytorch_model-1.bin` is `model-1.safetensors`."""
        if self._suffix == _SUFFIX:
            return weights
        stem = weights.removesuffix(self._suffix)
        return (_STEM + stem.removeprefix(_TORCH_STEM) if stem.startswith(_TORCH_STEM) else stem) + _SUFFIX


def _count_elements(tensor: OutputTensor) -> int:
    return tensor.nbytes * 8 // tensor.dtype.bits


def _index_prefixes(places: Mapping[str, str]) -> Mapping[str, str]:
    """Return the last shard that holds a tensor under each module path; under the empty one, the last of all."""
    last: dict[str, str] = {}
    for name, shard in places.items():
        last |= dict.fromkeys(_list_prefixes(name), shard)
    return last


def _find_nearest(name: str, shards: Mapping[str, str]) -> str:
    return next(shards[prefix] for prefix in _list_prefixes(name) if prefix in shards)


def _list_prefixes(name: str) -> Collection[str]:
    """Return the module paths that hold a tensor, longest first, the empty one last."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
