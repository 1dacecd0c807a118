"""One state dict of a pipeline's folder: a component, or one of the forms that the folder has of it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from loraformat.bases import Site, Weight
from loraformat.bases._folder import FolderFormat
from loraformat.bases._shards import Shards, open_shards
from loraformat.bases._state_dict import digest_structure, list_sites, read_model_config
from loraformat.files import resolve_inside
from loraformat.problems import Problem
from loraformat.spans import InputFile, StoredTensor
from loraformat.strict_json import JsonValue

_VARIANT: Final = r"(?:\.(?P<{}>[^.\-]+))?"
"""A word for the form of weights, such as `fp16`; shards have a hyphen there."""
_INDEX: Final = rf"(?P<index>\.index{_VARIANT.format('outer')}\.json)?"


@dataclass(frozen=True)  # No slots: what is found is kept.
class ComponentWeights:
    """The weights of a component, in one form.

    Attributes:
        component: the sub-folder, `unet` or `text_encoder`.
        name: the weight file from the pipeline's folder, without what names shards and their index.
        form: the format of its sub-folder.
        shards: its weights.
        config: its `config.json`, empty where there is none.
    """

    component: str
    name: str
    form: FolderFormat
    shards: Shards
    config: Mapping[str, JsonValue]

    @property
    def problems(self) -> Sequence[Problem]:
        """Nothing: what is odd about a state dict is said at its sites."""
        return ()

    @cached_property
    def structure_sha256(self) -> str:
        """Digest of names, forms, shapes and order."""
        return digest_structure(self.shards.tensors.values(), {})

    @cached_property
    def sites(self) -> Sequence[Site]:
        """Its sites, by ids that no other component has."""
        return [
            replace(
                site,
                id=self._mark(site.id),
                weight=self._widen(site.weight) if site.weight is not None else None,
                graph=self.name,
            )
            for site in list_sites(self.shards.tensors.values(), self.config)
        ]

    def name_files(self) -> Mapping[str, InputFile]:
        """Return the weight files and their index by their paths from the pipeline's folder."""
        index = self.shards.index
        named = {name: shard.file for name, shard in self.shards.files.items()}
        named |= {index.path.name: index} if index is not None else {}
        return {f"{self.component}/{name}": file for name, file in named.items()}

    def list_tensors(self) -> list[StoredTensor]:
        """Return its tensors, shard after shard."""
        return [replace(tensor, name=self._mark(tensor.name)) for tensor in self.shards.tensors.values()]

    def _mark(self, text: str) -> str:
        return f"{self.name}:{text}"

    def _widen(self, weight: Weight) -> Weight:
        consumers = frozenset(map(self._mark, weight.consumers))
        return replace(weight, key=self._mark(weight.key), name=self._mark(weight.name), consumers=consumers)


def open_components(entry: Path, names: Sequence[str], forms: Sequence[FolderFormat]) -> Iterator[ComponentWeights]:
    """Open the weights of a pipeline's components, in every form that the folder has of them.

    Args:
        entry: the pipeline's own file, which tells where the others may be.
        names: sub-folders of components that have weights.
        forms: formats of sub-folders, of which the first is taken that has weights.

    Raises:
        LoraformatError: as `open_shards`; LF903 a file outside the folder.
    """
    for component in names:
        folder = entry.parent / component
        found = ((form, _list_entries(folder, form)) for form in forms)
        form, entries = next(each for each in found if each[1])
        config = read_model_config(folder)
        for name in entries:
            shards = open_shards(resolve_inside(entry, f"{component}/{name}"), form.container)
            yield ComponentWeights(component, f"{component}/{_name_weights(name)}", form, shards, config)


def has_weights(folder: Path, forms: Sequence[FolderFormat]) -> bool:
    """Say whether a sub-folder has weights in one of the formats."""
    return any(_list_entries(folder, form) for form in forms)


def _list_entries(folder: Path, form: FolderFormat) -> list[str]:
    """Return the index, or the only weight file, of each form that a sub-folder has of its model.

    Readers choose between the forms by a word in the names: `model.fp16.safetensors` beside `model.safetensors`.
    """
    names = sorted(item.name for item in folder.iterdir() if item.is_file()) if folder.is_dir() else []
    for stem in form.stems:
        pattern = re.compile(re.escape(stem) + _VARIANT.format("inner") + re.escape(form.suffix) + _INDEX)
        found = [match for match in map(pattern.fullmatch, names) if match is not None]
        found.sort(key=lambda match: match["index"] is not None)  # So that an index is taken, where there is one.
        entries = {match["inner"] or match["outer"] or "": match[0] for match in found}
        if entries:
            return [entries[variant] for variant in sorted(entries)]
    return []


def _name_weights(entry: str) -> str:
    """Return what weights are called whose index or only file this is: as if they were in one file."""
    weights, index, end = entry.partition(".index")
    if not index:
        return entry
    stem, _, suffix = weights.rpartition(".")
    return f"{stem}{end.removesuffix('.json')}.{suffix}"
