"""Models in sketch files: a site is a tensor `<module>.weight`, in floats, or in bytes with a `<module>.step`."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from loraformat.adapter import SlotKind
from loraformat.bases import TENSOR_NAME, BaseModel, Checksums, Site, Weight
from loraformat.encodings import Coding
from loraformat.images import Blank, Copy, FileImage, Literal, NewOutput
from loraformat.problems import Problem
from loraformat.spans import InputFile, StoredTensor
from loraformat.strict_json import JsonValue, write_canonical
from sketch_format.container import CONTAINER, MAGIC, read_index


class SketchModel(Checksums):
    """An opened model; the attributes are those of `BaseModel`."""

    format = "sketch"
    suffix = ".sketch"
    folder_mark = ""
    rewriter = None
    problems: Sequence[Problem] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = CONTAINER.open(path)
        self.files: Sequence[InputFile] = [self._opened.file]
        self._index, self._start = read_index(self._opened.file)
        self.parent_receipt = cast("Mapping[str, Any] | None", self._index.get("receipt"))
        own = {name: value for name, value in self._index.items() if name != "receipt"}
        self._own_index: Mapping[str, JsonValue] = own
        self.structure_sha256 = hashlib.sha256(write_canonical(own)).hexdigest()
        names = [name for name in self._opened.tensors if name.endswith(".weight")]
        self.sites: Sequence[Site] = [self._make_site(name) for name in names]

    def _make_site(self, name: str) -> Site:
        tensor, module = self._opened.tensors[name], name.removesuffix(".weight")
        step = self._opened.tensors.get(f"{module}.step")
        rows, columns = tensor.shape
        coding = Coding("step8", (rows, columns), (rows, columns), {"scales": step}) if step else None
        weight = Weight(name, name, tensor, frozenset({name}), coding)
        return Site(name, module, TENSOR_NAME, {SlotKind.LINEAR: False}, weight)

    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor."""
        return list(self._opened.tensors.values())

    def describe_images(self, output: NewOutput) -> list[FileImage]:
        """Return the one output file: the same tensors, the receipt as the last member of the index."""
        index = write_canonical(self._own_index)[:-1] + b',"receipt":'
        length = len(index) + output.blank_bytes + 1
        head = Literal(MAGIC + length.to_bytes(4, "little") + index)
        numbers = Copy(self._opened.file, self._start, self._opened.file.size_bytes - self._start)
        return [FileImage(output.path, [head, Blank(output.blank_bytes), Literal(b"}"), numbers])]

    def encode_receipt(self, text: str) -> bytes:
        """Return the text: the blank is filled with spaces, which JSON has room for."""
        return text.encode("utf-8")

    def list_stale(self, output: Path) -> list[Path]:
        """Return nothing: a model is one file."""
        return []


class SketchBase:
    """The base format `sketch`."""

    name = "sketch"
    suffixes = (".sketch",)

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Recognise the container."""
        return CONTAINER.sniff(head, size_bytes)

    def open(self, path: Path) -> BaseModel:
        """Index the model."""
        return SketchModel(path)


BASE = SketchBase()
