"""A PyTorch state dict in one safetensors file: a site is a named tensor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loraformat.bases import BaseModel, Site
from loraformat.bases._state_dict import digest_structure, list_sites, read_model_config
from loraformat.containers import TensorFile
from loraformat.containers.safetensors import CONTAINER, describe_images, escape_for_header
from loraformat.errors import LoraformatError
from loraformat.images import FileImage
from loraformat.problems import Problem
from loraformat.receipt import RECEIPT_KEY
from loraformat.spans import InputFile, StoredTensor
from loraformat.strict_json import parse_json_object


class Checkpoint:
    """An opened state dict; the attributes are those of `BaseModel`."""

    format = "safetensors"
    suffix = ".safetensors"
    folder_mark = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: TensorFile = CONTAINER.open(path)
        self.files: Sequence[InputFile] = [self._opened.file]
        tensors = self._opened.tensors.values()
        self.sites: Sequence[Site] = list_sites(tensors, read_model_config(path.parent))
        metadata = {key: text for key, text in self._opened.metadata.items() if key != RECEIPT_KEY}
        self.structure_sha256 = digest_structure(tensors, metadata)
        self.parent_receipt: Mapping[str, Any] | None
        self.problems: Sequence[Problem]
        self.parent_receipt, self.problems = _read_receipt(self._opened)

    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor."""
        return list(self._opened.tensors.values())

    def describe_images(self, output: Path, blank_bytes: int, fresh: str) -> list[FileImage]:
        """Return the one output file: another header, the same data area."""
        return describe_images(self._opened, output, RECEIPT_KEY, blank_bytes)

    def encode_receipt(self, text: str) -> bytes:
        """Return `text` as it stands inside a JSON string of the header."""
        return escape_for_header(text)

    def list_stale(self, output: Path) -> list[Path]:
        """Return nothing: a state dict is one file."""
        return []


def _read_receipt(opened: TensorFile) -> tuple[Mapping[str, Any] | None, list[Problem]]:
    text = opened.metadata.get(RECEIPT_KEY)
    if text is None:
        return None, []
    try:
        return parse_json_object(text.encode("utf-8"), f"{opened.file.path}: {RECEIPT_KEY}"), []
    except LoraformatError as error:
        return None, [Problem(p.code, p.where, p.found, p.expected, severity="note") for p in error.problems]


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
