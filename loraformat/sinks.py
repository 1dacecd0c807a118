"""Where merged bytes go: into a file, or beside a file that should have them already."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loraformat.files import copy_range, reserve_bytes, write_at
from loraformat.images import Copy
from loraformat.outputs import output_errors


class Sink(Protocol):
    """One output file of a merge; its methods are called from any thread, each byte range once."""

    def reserve(self, length: int) -> None:
        """Be told how long the file is, before anything is written."""
        ...

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Take bytes at `offset`."""
        ...

    def copy(self, piece: Copy, offset: int) -> None:
        """Take bytes of an input file at `offset`."""
        ...


@dataclass(frozen=True, slots=True)
class FileSink:
    """A new file, written by descriptor.

    Attributes:
        descriptor: open for writing.
        path: where the file will stand, for messages.
    """

    descriptor: int
    path: Path

    def reserve(self, length: int) -> None:
        """Give the file its full length at once; LF604 when there is no room."""
        with output_errors(self.path):
            reserve_bytes(self.descriptor, length)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes at `offset`."""
        with output_errors(self.path):
            write_at(self.descriptor, data, offset)

    def copy(self, piece: Copy, offset: int) -> None:
        """Copy inside the kernel where it can."""
        with output_errors(self.path):
            copy_range(piece.file.descriptor, piece.offset, self.descriptor, offset, piece.length)
