"""A state dict in one zip archive: a torch checkpoint or a numpy archive.

The output is the same archive with spans and checksums rewritten, and the receipt in a file beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraformat.bases import BaseModel, Rewriter, Site
from loraformat.bases._checksums import compute_checksums
from loraformat.bases._finishing import Checksums
from loraformat.bases._float_state import FloatingState
from loraformat.bases._receipts import describe_receipt_file, name_receipt, read_receipt_file
from loraformat.bases._rewriting import note_values
from loraformat.bases._state_dict import digest_structure, list_sites, read_model_config
from loraformat.containers import Container, TensorFile
from loraformat.images import Copy, FileImage, NewOutput
from loraformat.problems import Problem
from loraformat.spans import InputFile, Span, StoredTensor


class ZipStateDict(Checksums, FloatingState):
    """An opened archive; the attributes are those of `BaseModel`."""

    folder_mark = ""

    def __init__(self, path: Path, form: "ZipFormat") -> None:
        self.path = path
        self.format = form.name
        self.suffix = path.suffix
        self._form = form
        self._opened: TensorFile = form.container.open(path)
        self.files: Sequence[InputFile] = [self._opened.file]
        self._config = read_model_config(path.parent)
        self.sites: Sequence[Site] = list_sites(self.list_tensors(), self._config)
        self.structure_sha256 = digest_structure(self._opened.tensors.values(), self._opened.metadata)
        self.parent_receipt: Mapping[str, Any] | None
        self.problems: Sequence[Problem]
        self.parent_receipt, self.problems = read_receipt_file(name_receipt(path))

    @property
    def rewriter(self) -> Rewriter:
        """What describes it as a safetensors file."""
        from loraformat.bases._file_rewriter import FileRewriter  # here: most outputs are copies

        notes = note_values(self.path, self._opened.metadata)
        metadata = self._form.rewritten_metadata
        return FileRewriter(self.path, self.list_tensors(), metadata, self._config, notes, self._gone)

    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor."""
        return list(self._opened.tensors.values())

    def describe_images(self, output: NewOutput) -> list[FileImage]:
        """Return a copy of the archive, and last the receipt beside it."""
        file = self._opened.file
        copy = FileImage(output.path, [Copy(file, 0, file.size_bytes)])
        return [copy, describe_receipt_file(name_receipt(output.path), output.blank_bytes)]

    def compute_checksums(
        self, image: FileImage, descriptor: int, touched: Sequence[Span], jobs: int = 1
    ) -> Mapping[int, bytes]:
        """Return the CRC-32 of the members that hold touched spans."""
        fields = self._form.list_crc_fields(self._opened) if touched else {}
        return compute_checksums(fields, image, descriptor, touched, jobs)

    def encode_receipt(self, text: str) -> bytes:
        """Return the text as the receipt's file holds it."""
        return text.encode("utf-8")

    def list_stale(self, output: Path) -> list[Path]:
        """Return nothing: the receipt has the same name again."""
        return []


@dataclass(frozen=True, slots=True)
class ZipFormat:
    """A base format that is one zip archive.

    Attributes:
        name: for messages.
        suffixes: usual file name endings.
        container: reads the archive.
        list_crc_fields: gives the content of each member, and where its CRC-32 stands.
        rewritten_metadata: annotations of the safetensors file that it becomes; readers of transformers ask for
            `format`.
    """

    name: str
    suffixes: tuple[str, ...]
    container: Container
    list_crc_fields: Callable[[TensorFile], Mapping[Span, tuple[int, ...]]]
    rewritten_metadata: Mapping[str, str]

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Recognise the archive by its first member."""
        return self.container.sniff(head, size_bytes)

    def open(self, path: Path) -> BaseModel:
        """Index the archive."""
        return ZipStateDict(path, self)
