"""ONNX models: weights inside the model's file or in data files beside it, found without reading them.

The model's file is never serialised again: the graph is read from a skeleton without weights, and an output is the same
bytes with a few of them replaced.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraformat.containers import TensorFile
from loraformat.containers._onnx.copies import GraphStep, InputEdit, TensorCopy
from loraformat.containers._onnx.floats import GraphChange, NodeEdit, TensorFloats
from loraformat.containers._onnx.opened import OnnxFile, list_data, open_onnx
from loraformat.containers._protobuf import Leaf, decode_varint
from loraformat.errors import LoraformatError, refuse
from loraformat.problems import Problem
from loraformat.signatures import HEAD_BYTES, describe_head
from loraformat.spans import InputFile, StoredTensor, open_input

__all__ = [
    "CONTAINER",
    "GraphChange",
    "GraphStep",
    "InputEdit",
    "Leaf",
    "NodeEdit",
    "Onnx",
    "OnnxFile",
    "TensorCopy",
    "TensorFloats",
    "list_data",
    "open_onnx",
]

_LENGTH: Final = 2
_TOP_LEVEL: Final = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
"""Fields of ModelProto and their wire types."""


@dataclass(frozen=True, slots=True)
class Onnx:
    """The ONNX container."""

    name: str = "onnx"
    suffixes: tuple[str, ...] = (".onnx",)
    has_magic: bool = False

    def sniff(self, head: bytes, size_bytes: int) -> bool:
        """Say whether `head` begins with fields that a model has; protobuf has no magic number."""
        index = fields = 0
        try:
            while index < len(head):
                tag, index = decode_varint(head, index)
                if _TOP_LEVEL.get(tag >> 3) != tag & 7:
                    return False
                value, index = decode_varint(head, index)
                index += value if tag & 7 == _LENGTH else 0
                fields += 1
        except IndexError:
            return fields > 0
        except ValueError:
            return False
        return index <= size_bytes and fields > 0

    def open(self, path: Path | InputFile) -> TensorFile:
        """Return the main graph's initializers that are a run of bytes.

        Raises:
            InputError: LF111 another file of this name; as `OnnxFile`, LF116 included.
        """
        file = open_input(path)
        try:
            _refuse_impostor(file)
        except LoraformatError:
            file.close()
            raise
        opened = open_onnx(file)
        try:
            tensors = _list_initializers(opened)
        except LoraformatError:
            opened.close()
            raise
        metadata = {entry.key: entry.value for entry in opened.model.metadata_props}
        return TensorFile(opened.file, tensors, metadata)


def _refuse_impostor(file: InputFile) -> None:
    """Refuse a page or pointer under a model's name (LF111); what the walk says of it would help nobody."""
    head = file.read(0, min(HEAD_BYTES, file.size_bytes))
    described = None if CONTAINER.sniff(head, file.size_bytes) else describe_head(head)
    if described is not None:
        raise refuse("LF111", file.path, described.what, "an ONNX model", described.mend)


def _list_initializers(opened: OnnxFile) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor | Problem] = {}
    for proto in opened.model.graph.initializer:
        if proto.name in stored:
            raise refuse("LF118", opened.path, f"two initializers named {proto.name!r}", "each name once")
        stored[proto.name] = opened.stored_tensor(proto)
    return {name: tensor for name, tensor in stored.items() if isinstance(tensor, StoredTensor)}


CONTAINER: Final = Onnx()
