"""Zip archives of stored members: the same members give the same bytes, on any day."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import BinaryIO, Final
from zipfile import ZIP_STORED, ZipFile, ZipInfo

_FIRST_DAY: Final = (1980, 1, 1, 0, 0, 0)
_LOCAL_HEADER_BYTES: Final = 30
_PADDING: Final = struct.Struct("<2sH")
_PADDING_TAG: Final = b"FB"
"""torch's own tag for a field that only moves what follows."""


class NewArchive:
    """A zip archive that is being written at the position of `stream`."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._start = stream.tell()
        self._archive = ZipFile(stream, "w", ZIP_STORED)

    def add(self, name: str, *parts: bytes | memoryview, alignment: int = 1) -> None:
        """Write one member; its content begins at a multiple of `alignment`, counted from the archive's beginning."""
        info = ZipInfo(name, _FIRST_DAY)
        info.file_size = sum(len(part) for part in parts)
        if alignment > 1:
            info.extra = self._pad(name, alignment)
        with self._archive.open(info, "w") as member:
            for part in parts:
                member.write(part)

    def _pad(self, name: str, alignment: int) -> bytes:
        content = self._stream.tell() - self._start + _LOCAL_HEADER_BYTES + len(name.encode()) + _PADDING.size
        count = -content % alignment
        return _PADDING.pack(_PADDING_TAG, count) + b"Z" * count

    def close(self) -> None:
        """Write the directory."""
        self._archive.close()


@contextmanager
def new_archive(sink: int | BinaryIO) -> Iterator[NewArchive]:
    """Yield an archive that is complete when the block is left without an error.

    Args:
        sink: a descriptor or binary file, open for writing, seekable.
    """
    # `closefd` is legal only for a descriptor, so a file object is passed through as it is.
    with open(sink, "wb", closefd=False) if isinstance(sink, int) else nullcontext(sink) as stream:
        archive = NewArchive(stream)
        try:
            yield archive
        except BaseException:
            with suppress(OSError, ValueError):  # The file is given up; only its end must not be written later.
                archive.close()
            raise
        archive.close()
