"""File formats: one file each, from bytes to named tensors that are read only when asked for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, runtime_checkable

from loraformat.errors import LoraformatError
from loraformat.registry import Registry
from loraformat.spans import InputFile, StoredTensor, open_input
from loraformat.strict_json import JsonValue

if TYPE_CHECKING:
    from loraformat.containers._new_tensors import NewTensor


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The index of one opened file.

    Attributes:
        file: the open file.
        tensors: name to unread tensor, in the order of the file.
        metadata: the file's own text annotations.
    """

    file: InputFile
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


class Container(Protocol):
    """What a file in this folder provides as `CONTAINER`.

    Attributes:
        name: for messages.
        suffixes: file name endings that are usual for it, lower case with the dot.
        has_magic: whether its files begin in a way that no other format's do.
    """

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Usual file name endings."""
        ...

    @property
    def has_magic(self) -> bool:
        """Whether its files begin in a way that no other format's do."""
        ...

    def sniff(self, head: bytes, size_bytes: int) -> bool:
        """Say whether a file that starts with `head` (up to 64 bytes) is of this format."""
        ...

    def open(self, path: Path | InputFile) -> TensorFile:
        """Check the whole index of the file and return it; raises LoraformatError.

        Args:
            path: the file; or one that is open, such as bytes in memory (`arrays.HeldFile`).
        """
        ...


@runtime_checkable
class WritableContainer(Container, Protocol):
    """A container in which new files can be written."""

    def write(self, sink: int | BinaryIO, tensors: "Sequence[NewTensor]", metadata: Mapping[str, JsonValue]) -> None:
        """Write a new file at the sink's position, one tensor at a time; the same tensors give the same bytes.

        Args:
            sink: a descriptor or binary file, open for writing.
            tensors: name, number form, shape, and the numbers or a function that returns them (`_new_tensors`).
            metadata: what the container has a place for; LF130 for anything else.
        """
        ...


def open_indexed(path: Path | InputFile, index: Callable[[InputFile], TensorFile]) -> TensorFile:
    """Open a file and index it; it is closed again when `index` refuses it."""
    file = open_input(path)
    try:
        return index(file)
    except LoraformatError:
        file.close()
        raise


CONTAINERS: Registry[Container] = Registry("loraformat.containers", "CONTAINER")
