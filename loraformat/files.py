"""Paths from outside, copying at disk speed, and output that appears whole or not at all.

An output is written beside its final name, as `.<name>.loraformat-<pid>-<random>.part`, and moved into place last. A
run that fails or is killed leaves what was there before, and at most a part that the next run into that folder removes.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Final, Self

from loraformat.errors import LoraformatError, refuse

_PART: Final = re.compile(r"^\..+\.loraformat-(?P<pid>\d+)-[0-9a-f]{8}\.part$")
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_CANNOT_CLONE: Final = frozenset(
    getattr(errno, name)
    for name in ("EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP", "ENOTSUP", "EBADF", "EPERM", "ETXTBSY")
    if hasattr(errno, name)
)


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


def check_output(path: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse an output that would destroy something, before any work is done.

    Raises:
        RefusedError: LF601 exists, LF602 is an input, LF603 not a regular file, LF608 unusable name.
        OutputError: LF605 the folder is missing or closed.
    """
    folder = path.absolute().parent
    try:
        if len(os.fsencode(path.name)) > 200 or "\0" in str(path):
            raise refuse("LF608", path, "a name too long or with a NUL", "at most 200 bytes")
        if not folder.is_dir():
            raise refuse("LF605", path, f"no folder {folder}", "an existing folder")
        if not os.access(folder, os.W_OK):
            raise refuse("LF605", path, f"the folder {folder} is closed to writing", "a writable folder")
        if not os.path.lexists(path):
            return
        _check_existing(path, inputs, force=force)
    except OSError as error:
        raise refuse("LF605", path, str(error.strerror or error), "a path that can be written") from error


def _check_existing(path: Path, inputs: Iterable[Path], *, force: bool) -> None:
    if not path.exists():
        raise refuse("LF603", path, "a symlink that leads nowhere", "a new name or a regular file")
    if not path.is_file():
        raise refuse("LF603", path, "a folder, device or pipe", "a new name or a regular file")
    for source in inputs:
        if source.exists() and os.path.samefile(path, source):
            raise refuse("LF602", path, f"the same file as the input {source}", "another file")
    if not force:
        raise refuse("LF601", path, "a file of this name", "no file, or --force")


class PendingOutput:
    """Output files that are written aside and moved into place together, the last one last.

    Use as a context manager: leaving it by an exception, or without `commit`, removes everything written.

    Args:
        paths: where the files will stand.
        force: replace what stands there.
        durable: wait until the disk has the bytes before they are moved, so that a power cut too leaves old or new.
    """

    def __init__(self, paths: Sequence[Path], *, force: bool, durable: bool = False) -> None:
        self._force = force
        self._durable = durable
        self._finals = [path.absolute() for path in paths]
        self._parts: list[Path] = []
        self.descriptors: list[int] = []

    def __enter__(self) -> Self:
        try:
            for final in self._finals:
                _remove_stale_parts(final.parent)
                self._open_part(final)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _open_part(self, final: Path) -> None:
        part = final.with_name(f".{final.name}.loraformat-{os.getpid()}-{secrets.token_hex(4)}.part")
        with output_errors(final):
            # Mode 0666 lets the user's umask decide, as any other new file.
            self.descriptors.append(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
            self._parts.append(part)
            if final.exists():
                os.chmod(part, stat.S_IMODE(final.stat().st_mode))

    def commit(self) -> None:
        """Move the parts into place, in order; on failure nothing new remains."""
        placed: list[Path] = []
        try:
            for descriptor, part, final in zip(self.descriptors, self._parts, self._finals, strict=True):
                with output_errors(final):
                    if self._durable:
                        os.fsync(descriptor)
                    existed = os.path.lexists(final)
                    _place(part, final, force=self._force)
                    if not existed:
                        placed.append(final)
            if self._durable:
                for folder in {final.parent for final in self._finals}:
                    _sync_folder(folder)
        except BaseException:
            for final in placed:
                with contextlib.suppress(OSError):
                    final.unlink()
            raise

    def _discard(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())
        for part in self._parts:
            with contextlib.suppress(OSError):
                part.unlink()


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn operating-system errors about an output into LF604 (space) or LF605 (the rest)."""
    try:
        yield
    except LoraformatError:
        raise
    except OSError as error:
        code = "LF604" if error.errno in _NO_SPACE else "LF605"
        raise refuse(code, path, error.strerror or str(error)) from error


def _place(part: Path, final: Path, *, force: bool) -> None:
    """Move `part` to `final`; without `force` a file that appeared meanwhile is not replaced."""
    if not force:
        try:
            os.link(part, final)
        except FileExistsError as error:
            raise _appeared(final) from error
        except OSError:  # A file system without hard links: the name is claimed by an empty file of our own.
            _claim(final)
        else:
            part.unlink()
            return
    os.replace(part, final)


def _claim(final: Path) -> None:
    try:
        os.close(os.open(final, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError as error:
        raise _appeared(final) from error


def _appeared(final: Path) -> LoraformatError:
    return refuse("LF601", final, "a file of this name, made during the run", "no file, or --force")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # Some network file systems refuse; the rename itself has happened.
        pass
    finally:
        os.close(descriptor)


def _remove_stale_parts(folder: Path) -> None:
    """Remove parts that runs of ours left here when they were killed."""
    for entry in folder.iterdir():
        match = _PART.match(entry.name)
        if match and not _is_alive(int(match["pid"])):
            with contextlib.suppress(OSError):
                entry.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


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
        done += os.pwrite(descriptor, view[done:], offset + done)
