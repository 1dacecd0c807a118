"""Paths from outside, and copying at disk speed."""

import errno
import os
import re
from pathlib import Path, PurePosixPath
from typing import Final

from loraformat.errors import refuse

_CANNOT_CLONE: Final = frozenset(
    getattr(errno, name)
    for name in ("EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP", "ENOTSUP", "EBADF", "EPERM", "ETXTBSY")
    if hasattr(errno, name)
)

_WRITE_BYTES: Final = 256 << 10
"""Written at once: of more, Linux wants memory in larger pieces, which took three times as long at 2 MB."""


def resolve_inside(model: Path, location: str) -> Path:
    """Return the path that a model's own `location` names, which must stay under the model's folder.

    In a hub cache the model is a symlink into a store of blobs: then a file under the folder of the real model file is
    as good (onnxruntime's rule).

    Raises:
        RefusedError: LF903 absolute, `..`, drive letters, backslashes, NUL, or a symlink that leaves the folder.
    """
    parts = PurePosixPath(location).parts
    forbidden = not location or location.startswith("/") or ".." in parts or re.search(r"[\\\x00]|^[A-Za-z]:", location)
    if forbidden:
        raise refuse("LF903", model, f"the location {location!r}", "a relative path below the model's folder")
    model = model.absolute()
    candidate = model.parent.joinpath(*parts)
    real = Path(os.path.realpath(candidate))
    allowed = {Path(os.path.realpath(model.parent)), Path(os.path.realpath(model)).parent}
    if not any(real.is_relative_to(folder) for folder in allowed):
        found = f"the location {location!r}, which leads to {real}"
        raise refuse("LF903", model, found, "a file below the model's folder")
    return candidate


def reserve_bytes(descriptor: int, length: int) -> None:
    """Give the file its full length at once: a full disk fails now, and writing later is faster."""
    if length == 0:
        return
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, length)
            return
        except OSError as error:
            if error.errno not in _CANNOT_CLONE:
                raise
    os.ftruncate(descriptor, length)


def copy_range(source: int, source_offset: int, sink: int, sink_offset: int, length: int) -> None:
    """Copy bytes between descriptors inside the kernel where it can (shared extents, or at least no copy to us)."""
    if hasattr(os, "copy_file_range"):
        done = _copy_in_kernel(source, source_offset, sink, sink_offset, length)
        source_offset, sink_offset, length = source_offset + done, sink_offset + done, length - done
    while length:
        data = os.pread(source, min(length, 1 << 20), source_offset)
        if not data:
            raise refuse("LF906", f"descriptor {source}", f"the input ends at byte {source_offset}", "the size it had")
        write_at(sink, data, sink_offset)
        source_offset, sink_offset, length = source_offset + len(data), sink_offset + len(data), length - len(data)


def _copy_in_kernel(source: int, source_offset: int, sink: int, sink_offset: int, length: int) -> int:
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(source, sink, length - done, source_offset + done, sink_offset + done)
        except OSError as error:
            if error.errno in _CANNOT_CLONE:
                return done
            raise
        if count == 0:
            return done
        done += count
    return done


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + _WRITE_BYTES], offset + done)
