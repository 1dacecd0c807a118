"""A PyTorch state dict in one safetensors file: a site is a named tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loraformat.bases import BaseModel, Rewriter, Site
from loraformat.bases._finishing import Checksums
from loraformat.bases._float_state import FloatingState
from loraformat.bases._receipts import read_receipt_text
from loraformat.bases._repeated_layers import LayeredState
from loraformat.bases._state_dict import digest_structure, list_sites, read_model_config
from loraformat.containers import TensorFile
from loraformat.containers._safetensors_images import describe_images, escape_for_header
from loraformat.containers.safetensors import CONTAINER
from loraformat.images import FileImage, NewOutput
from loraformat.problems import Problem
from loraformat.receipt import RECEIPT_KEY
from loraformat.spans import InputFile, StoredTensor


class Checkpoint(Checksums, FloatingState, LayeredState):
    """An opened state dict; the attributes are those of `BaseModel`."""

    format = "safetensors"
    suffix = ".safetensors"
    folder_mark = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: TensorFile = CONTAINER.open(path)
        self.files: Sequence[InputFile] = [self._opened.file]
        self._config = read_model_config(path.parent)
        self.sites: Sequence[Site] = list_sites(self.list_tensors(), self._config)
        self._metadata = {key: text for key, text in self._opened.metadata.items() if key != RECEIPT_KEY}
        self.structure_sha256 = digest_structure(self._opened.tensors.values(), self._metadata)
        self.parent_receipt: Mapping[str, Any] | None
        self.problems: Sequence[Problem]
        receipt = self._opened.metadata.get(RECEIPT_KEY)
        self.parent_receipt, self.problems = read_receipt_text(receipt, f"{self._opened.file.path}: {RECEIPT_KEY}")

    @property
    def rewriter(self) -> Rewriter:
        """What describes it as a file with other tensors."""
        from loraformat.bases._file_rewriter import FileRewriter  # here: most outputs are copies

        return FileRewriter(self.path, self.list_tensors(), self._metadata, self._config, gone=self._gone)

    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor."""
        return list(self._opened.tensors.values())

    def describe_images(self, output: NewOutput) -> list[FileImage]:
        """Return the one output file: another header, the same data area."""
        return describe_images(self._opened, output.path, RECEIPT_KEY, output.blank_bytes)

    def encode_receipt(self, text: str) -> bytes:
        """Return `text` as it stands inside a JSON string of the header."""
        return escape_for_header(text)

    def _rename_tensors(self, names: Mapping[str, str]) -> None:
        stored = self._opened.tensors
        renamed = {new: replace(stored[name], name=new) for new, name in names.items()}
        self._opened = replace(self._opened, tensors=renamed)

    def list_stale(self, output: Path) -> list[Path]:
        """Return nothing: a state dict is one file."""
        return []


class CheckpointFormat:
    """The base format `safetensors`."""

    name = "safetensors"
    suffixes = (".safetensors",)

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Recognise safetensors by its header."""
        return CONTAINER.sniff(head, size_bytes)

    def open(self, path: Path) -> BaseModel:
        """Index the state dict."""
        return Checkpoint(path)


BASE: Final = CheckpointFormat()
