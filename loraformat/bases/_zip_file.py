"""A state dict in one zip archive: a torch checkpoint or a numpy archive.

The output is the same archive with spans and checksums rewritten, and the receipt in a file beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraformat.bases import BaseModel, Rewriter, Site
from loraformat.bases._checksums import compute_checksums
from loraformat.bases._float_state import FloatingState
from loraformat.bases._rewriting import note_values
from loraformat.bases._single_file import SingleFile
from loraformat.bases._state_dict import list_sites, read_model_config
from loraformat.containers import Container, TensorFile
from loraformat.images import FileImage
from loraformat.spans import Span


class ZipStateDict(SingleFile, FloatingState):
    """An opened archive; the attributes are those of `BaseModel`."""

    def __init__(self, path: Path, form: "ZipFormat") -> None:
        super().__init__(path, form.container.open(path))
        self.format = form.name
        self.suffix = path.suffix
        self._form = form
        self._config = read_model_config(path.parent)
        self.sites: Sequence[Site] = list_sites(self.list_tensors(), self._config)

    @property
    def rewriter(self) -> Rewriter:
        """What describes it as a safetensors file."""
        from loraformat.bases._file_rewriter import FileRewriter  # here: most outputs are copies

        notes = note_values(self.path, self._opened.metadata)
        metadata = self._form.rewritten_metadata
        return FileRewriter(self.path, self.list_tensors(), metadata, self._config, notes, self._gone)

    def compute_checksums(
        self, image: FileImage, descriptor: int, touched: Sequence[Span], jobs: int = 1
    ) -> Mapping[int, bytes]:
        """Return the CRC-32 of the members that hold touched spans."""
        fields = self._form.list_crc_fields(self._opened) if touched else {}
        return compute_checksums(fields, image, descriptor, touched, jobs)


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
