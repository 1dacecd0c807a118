"""Sketch files: a magic, the length of an index, the index in JSON, then the numbers of the tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from loraformat.containers import TensorFile, open_indexed
from loraformat.dtypes import BY_NAME
from loraformat.errors import refuse
from loraformat.limits import MAX_SAFETENSORS_HEADER_BYTES
from loraformat.spans import InputFile, Span, StoredTensor
from loraformat.strict_json import JsonValue, parse_json_object

MAGIC = b"SKETCH1\n"
START = len(MAGIC) + 4


def read_index(file: InputFile) -> tuple[Mapping[str, JsonValue], int]:
    """Return the index of a file and the offset of its numbers."""
    length = int.from_bytes(file.read(len(MAGIC), 4), "little") if file.size_bytes >= START else 0
    if not 2 <= length <= min(file.size_bytes - START, MAX_SAFETENSORS_HEADER_BYTES):
        raise refuse("LF103", file.path, f"an index of {length} bytes", "one that the file has room for")
    return parse_json_object(file.read(START, length), file.path), START + length


def _index(file: InputFile) -> TensorFile:
    if file.read(0, min(len(MAGIC), file.size_bytes)) != MAGIC:
        raise refuse("LF121", file.path, "another beginning", repr(MAGIC))
    index, start = read_index(file)
    tensors = {}
    for name, entry in cast("Mapping[str, tuple[str, list[int], int]]", index["tensors"]).items():
        form, shape, offset = entry
        tensor = StoredTensor(name, BY_NAME[form], tuple(shape), Span(file.path, start + offset, 0), file)
        span = Span(file.path, start + offset, tensor.dtype.count_bytes(tensor.elements))
        if not start <= span.offset <= span.end <= file.size_bytes:
            raise refuse("LF107", f"{file.path}, tensor {name!r}", f"bytes up to {span.end}", "bytes of the file")
        tensors[name] = StoredTensor(name, tensor.dtype, tensor.shape, span, file)
    return TensorFile(file, tensors, cast("Mapping[str, str]", index.get("notes", {})))


class Sketch:
    """The container `sketch`."""

    name = "sketch"
    suffixes = (".sketch",)
    has_magic = True

    def sniff(self, head: bytes, size_bytes: int) -> bool:
        """Recognise the magic."""
        return head.startswith(MAGIC)

    def open(self, path: Path) -> TensorFile:
        """Check the index and return it."""
        return open_indexed(path, _index)


CONTAINER = Sketch()
