"""A pipeline of diffusers: a folder with `model_index.json` and a sub-folder for each component, some with weights.

Each component's weights are a state dict of their own (`_pipeline_members.py`), in which targets are looked for; a
component that the folder has in several forms changes in all of them. The output is a folder: the weights with spans
rewritten, every other file as it is, and the receipt in `merge_receipt.json`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Final

from loraformat.bases import BaseModel, RunnableBase, Site, View
from loraformat.bases._checksums import compute_checksums
from loraformat.bases._joined_folder import PIPELINE, JoinedFolder
from loraformat.bases._pipeline_members import ComponentWeights, has_weights, open_components
from loraformat.bases.checkpoint_folder import BASE as SAFETENSORS_FOLDER
from loraformat.bases.torch_folder import BASE as TORCH_FOLDER
from loraformat.errors import LoraformatError, refuse
from loraformat.images import Copy, FileImage, NewOutput
from loraformat.limits import MAX_GRAPHS
from loraformat.schemes._naming import DENOISERS
from loraformat.spans import Span, read_small
from loraformat.strict_json import JsonValue, parse_json_object

_FORMS: Final = (SAFETENSORS_FOLDER, TORCH_FOLDER)
"""As diffusers chooses between them."""


class PipelineFolder(JoinedFolder):
    """An opened pipeline; the attributes are those of `BaseModel`."""

    format = "pipeline folder"
    _members: Sequence[ComponentWeights]

    def __init__(self, path: Path) -> None:
        entry = path.absolute() / PIPELINE
        self._members = list(open_components(entry, _list_components(path), _FORMS))
        if len(self._members) > MAX_GRAPHS:
            raise refuse("LF110", path, f"{len(self._members)} models in one folder", f"at most {MAX_GRAPHS}")
        self.sites: Sequence[Site] = [site for member in self._members for site in member.sites]
        super().__init__(path.absolute(), entry, self._members)
        self._all_views = [View(member.name, member.component, "", member.sites) for member in self._members]

    def list_runnable(self) -> Mapping[str, RunnableBase]:
        """Raise LF446: there is no graph to run."""
        raise refuse("LF446", self.path, f"a base of the format {self.format!r}", "an ONNX model")

    def tell_config(self) -> Mapping[str, JsonValue]:
        """Return the configuration of the UNet or transformer, which adapters count heads of; empty without one."""
        return next((member.config for member in self._members if member.component in DENOISERS), {})

    def describe_images(self, output: NewOutput) -> list[FileImage]:
        """Return the weights and their indexes, the other files, and last the receipt."""
        own = [item for member in self._members for item in member.name_files().items()]
        images = [FileImage(output.path / name, [Copy(file, 0, file.size_bytes)]) for name, file in own]
        return [*images, *self.describe_beside(output)]

    def compute_checksums(
        self, image: FileImage, descriptor: int, touched: Sequence[Span], jobs: int = 1
    ) -> Mapping[int, bytes]:
        """Return the checksums that the containers of the weights have."""
        paths = {span.path for span in touched}
        found: dict[int, bytes] = {}
        for member in self._members:
            for shard in member.shards.files.values():
                if shard.file.path in paths:
                    found |= compute_checksums(member.form.list_crc_fields(shard), image, descriptor, touched, jobs)
        return found


def has_components(folder: Path) -> bool:
    """Say whether a folder is a pipeline with weights of diffusers in it."""
    return bool(_list_components(folder))


def _list_components(folder: Path) -> list[str]:
    """Return the sub-folders with weights that a pipeline's `model_index.json` lists; nothing for another folder."""
    path = folder / PIPELINE
    try:
        listed = parse_json_object(read_small(path), path) if path.is_file() else {}
    except LoraformatError:  # Then it is no pipeline, and whoever opens it as one is told so.
        return []
    names = sorted(name for name, stated in listed.items() if isinstance(stated, list) and PurePath(name).name == name)
    folders = ((name, folder / name) for name in names)
    return [name for name, part in folders if not part.is_symlink() and has_weights(part, _FORMS)]


class PipelineFolderFormat:
    """The base format `pipeline folder`."""

    name = "pipeline folder"
    suffixes = ()

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Recognise a pipeline with weights in the sub-folders that it lists, and none at its top."""
        at_top = any(form.find_entry(path) is not None for form in _FORMS)
        return path.is_dir() and not at_top and has_components(path)

    def open(self, path: Path) -> BaseModel:
        """Index the components."""
        return PipelineFolder(path)


BASE: Final = PipelineFolderFormat()
