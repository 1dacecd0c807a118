"""A Hugging Face model folder, whatever the container of its shards: shards, their index, and what travels along.

The output is a folder: the shards with the adapted weights rewritten, every other file as it is, and the receipt in
`merge_receipt.json`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraformat.bases import BaseModel, Rewriter, Site
from loraformat.bases._checksums import compute_checksums
from loraformat.bases._finishing import Checksums
from loraformat.bases._float_state import FILES_OF_CODES, FloatingState
from loraformat.bases._receipts import RECEIPT_NAME, describe_receipt_file, read_receipt_file
from loraformat.bases._repeated_layers import LayeredState
from loraformat.bases._shards import INDEX_SUFFIX, open_shards
from loraformat.bases._state_dict import digest_structure, list_sites, read_model_config
from loraformat.bases._travelling import find_travelling
from loraformat.containers import Container, TensorFile
from loraformat.images import Copy, FileImage, NewOutput
from loraformat.outputs import FOLDER_UNDO
from loraformat.problems import Problem
from loraformat.spans import InputFile, Span, StoredTensor


class StateDictFolder(Checksums, FloatingState, LayeredState):
    """An opened model folder; the attributes are those of `BaseModel`."""

    suffix = ""
    folder_mark = RECEIPT_NAME

    def __init__(self, path: Path, form: "FolderFormat", entry: Path) -> None:
        self.path = path.absolute()
        self.format = form.name
        self._form = form
        self._shards = open_shards(entry, form.container)
        own = {*self._shards.files, *([entry.name] if self._shards.index else []), RECEIPT_NAME, FOLDER_UNDO}
        self._travelling, left_out = find_travelling(entry, own)
        self._config = read_model_config(self.path)
        self.sites: Sequence[Site] = list_sites(self.list_tensors(), self._config)
        self.structure_sha256 = digest_structure(self._shards.tensors.values(), {})
        self.parent_receipt: Mapping[str, Any] | None
        self.parent_receipt, unread = read_receipt_file(self.path / RECEIPT_NAME)
        self.problems: Sequence[Problem] = [*left_out, *unread]

    @property
    def files(self) -> Sequence[InputFile]:
        """The shards, the index, and all that travels."""
        return list(self._copied().values())

    @property
    def rewriter(self) -> Rewriter:
        """What describes it as a folder of safetensors shards."""
        from loraformat.bases._folder_rewriter import FolderParts, FolderRewriter  # here: most outputs are copies

        travelling = {n: file for n, file in self._travelling.items() if not self._gone or n not in FILES_OF_CODES}
        parts = FolderParts(self.path, self._shards, travelling, self._config, self._gone)
        return FolderRewriter(parts, self._form.suffix)

    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor, shard after shard."""
        return list(self._shards.tensors.values())

    def describe_images(self, output: NewOutput) -> list[FileImage]:
        """Return the shards, the other files, and last the receipt."""
        folder = output.path
        images = [FileImage(folder / name, [Copy(file, 0, file.size_bytes)]) for name, file in self._copied().items()]
        return [*images, *describe_receipt_file(folder / RECEIPT_NAME, output.blank_bytes)]

    def compute_checksums(
        self, image: FileImage, descriptor: int, touched: Sequence[Span], jobs: int = 1
    ) -> Mapping[int, bytes]:
        """Return the checksums that the shards' container has."""
        paths = {span.path for span in touched}
        shards = (shard for shard in self._shards.files.values() if shard.file.path in paths)
        fields = (self._form.list_crc_fields(shard) for shard in shards)
        found = (compute_checksums(held, image, descriptor, touched, jobs) for held in fields)
        return {offset: checksum for each in found for offset, checksum in each.items()}

    def encode_receipt(self, text: str) -> bytes:
        """Return the text as the receipt's file holds it."""
        return text.encode("utf-8")

    def list_stale(self, output: Path) -> list[Path]:
        """Return nothing: the whole folder is replaced."""
        return []

    def _rename_tensors(self, names: Mapping[str, str]) -> None:
        tensors, places = self._shards.tensors, self._shards.places
        renamed = {new: replace(tensors[name], name=new) for new, name in names.items()}
        self._shards = replace(self._shards, tensors=renamed, places={new: places[name] for new, name in names.items()})

    def _copied(self) -> dict[str, InputFile]:
        """Return every file of the output but the receipt, by its name in the folder."""
        index = self._shards.index
        shards = {name: shard.file for name, shard in self._shards.files.items()}
        return shards | ({index.path.name: index} if index else {}) | dict(self._travelling)


def _list_nothing(shard: TensorFile) -> Mapping[Span, tuple[int, ...]]:
    return {}


@dataclass(frozen=True, slots=True)
class FolderFormat:
    """A base format of model folders.

    Attributes:
        name: for messages.
        stems: what a model's only weight file is called without its ending, the one to prefer first.
        suffix: the ending of weight files.
        container: reads a weight file.
        list_crc_fields: gives the content of each member of a weight file, and where its CRC-32 stands.
    """

    name: str
    stems: tuple[str, ...]
    suffix: str
    container: Container
    list_crc_fields: Callable[[TensorFile], Mapping[Span, tuple[int, ...]]] = _list_nothing
    suffixes: tuple[str, ...] = field(default=(), init=False)

    def find_entry(self, folder: Path) -> Path | None:
        """Return the index of the shards or, without one, the only weight file; None where there is neither."""
        singles = [f"{stem}{self.suffix}" for stem in self.stems]
        names = (name for single in singles for name in (single + INDEX_SUFFIX, single))
        return next((folder / name for name in names if (folder / name).is_file()), None)

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Recognise a folder with an index or with the one file that transformers writes for small models."""
        return path.is_dir() and self.find_entry(path) is not None

    def open(self, path: Path) -> BaseModel:
        """Index the folder."""
        entry = self.find_entry(path.absolute())
        assert entry is not None, "accepted before"
        return StateDictFolder(path, self, entry)
