"""A base that is one file without room for a receipt, which therefore stands in a file beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraformat.bases._finishing import Checksums
from loraformat.bases._receipts import describe_receipt_file, name_receipt, read_receipt_file
from loraformat.bases._state_dict import digest_structure
from loraformat.containers import TensorFile
from loraformat.images import Copy, FileImage, NewOutput
from loraformat.problems import Problem
from loraformat.spans import InputFile, StoredTensor


class SingleFile(Checksums):
    """An opened file; the output is a copy with spans and checksums rewritten, and the receipt beside it."""

    folder_mark = ""

    def __init__(self, path: Path, opened: TensorFile) -> None:
        self.path = path
        self._opened = opened
        self.files: Sequence[InputFile] = [opened.file]
        self.structure_sha256 = digest_structure(opened.tensors.values(), opened.metadata)
        self.parent_receipt: Mapping[str, Any] | None
        self.problems: Sequence[Problem]
        self.parent_receipt, self.problems = read_receipt_file(name_receipt(path))

    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor."""
        return list(self._opened.tensors.values())

    def describe_images(self, output: NewOutput) -> list[FileImage]:
        """Return a copy of the file, and last the receipt beside it."""
        file = self._opened.file
        copy = FileImage(output.path, [Copy(file, 0, file.size_bytes)])
        return [copy, *describe_receipt_file(name_receipt(output.path), output.blank_bytes)]

    def encode_receipt(self, text: str) -> bytes:
        """Return the text as the receipt's file holds it."""
        return text.encode("utf-8")

    def list_stale(self, output: Path) -> list[Path]:
        """Return nothing: the receipt has the same name again."""
        return []
