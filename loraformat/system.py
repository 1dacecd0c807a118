"""What systems differ in: how files are opened, read and written at a place, locked, and moved.

Where the system has a call it is used. Windows lacks positional calls, descriptors of folders and `fcntl`, has locks of
its own (`msvcrt`), and neither moves nor removes a file that is open; older macOS lacks some calls too.
"""

import errno
import gc
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any, Final


def _gather(*names: str) -> int:
    """Return the flags that the system has, together."""
    flags = 0
    for name in names:
        flags |= getattr(os, name, 0)
    return flags


def _find_module(name: str) -> Any:
    with suppress(ImportError):
        return import_module(name)
    return None


READING: Final = _gather("O_RDONLY", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT")
"""Reads bytes, and never waits for what stands behind a pipe."""
READING_ITSELF: Final = READING | _gather("O_NOFOLLOW")
"""The same, of no link."""
CHANGING: Final = _gather("O_RDWR", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT")
"""Reads and writes bytes of a file that there is."""
MAKING: Final = CHANGING | _gather("O_CREAT", "O_NOFOLLOW", "O_NONBLOCK")
"""The same, of a file that may be new, and of no link."""

IS_POSIX: Final = hasattr(os, "O_DIRECTORY")
"""Whether folders have descriptors, open files are moved and removed, and signal 0 only asks after a process."""

_FLOCK: Final = _find_module("fcntl")
_LOCKING: Final = _find_module("msvcrt")
_HELD: Final = BlockingIOError if _FLOCK is not None else PermissionError
_LOCKED_AT: Final = 1 << 43
"""Locks of Windows keep others from the bytes themselves: one is locked that no file is long enough for."""
_STEP_BYTES: Final = 8 << 20
_TURNS: Final = tuple(Lock() for _ in range(64))
"""Where reading at a place is several calls, those who share a descriptor take turns."""


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill a view from a place in a file as far as one call does, and return how many bytes; 0 at the end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    data = read_at(descriptor, min(len(view), _STEP_BYTES), offset)
    view[: len(data)] = data
    return len(data)


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Return bytes from a place in a file, as many as one call gives; none at the end."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, offset)
    with _placed(descriptor, offset):
        return os.read(descriptor, length)


def write_some(descriptor: int, data: memoryview, offset: int) -> int:
    """Write at a place in a file as far as one call does, and return how many bytes."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with _placed(descriptor, offset):
        return os.write(descriptor, data)


@contextmanager
def _placed(descriptor: int, offset: int) -> Iterator[None]:
    """Have a descriptor's own place elsewhere for a while, as if it had not moved; nobody else moves it meanwhile."""
    with _TURNS[descriptor % len(_TURNS)]:
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, offset, os.SEEK_SET)
        try:
            yield
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)


def refuse_link(path: Path) -> None:
    """Raise the OSError of a link, where opening one follows it; between this and the opening one may be planted."""
    if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def hold(descriptor: int) -> bool:
    """Lock a file or folder for as long as it is open; False where another process or descriptor has it locked.

    A file system, or a system, without locks grants everything.
    """
    return _lock(descriptor, "LOCK_EX")


def may_hold(descriptor: int) -> bool:
    """Say whether nobody has a file locked; what is locked by asking goes with the descriptor."""
    return _lock(descriptor, "LOCK_SH")


def _lock(descriptor: int, how: str) -> bool:
    try:
        if _FLOCK is not None:
            _FLOCK.flock(descriptor, getattr(_FLOCK, how) | _FLOCK.LOCK_NB)
        elif _LOCKING is not None:
            with _placed(descriptor, _LOCKED_AT):
                _LOCKING.locking(descriptor, _LOCKING.LK_NBLCK, 1)
    except _HELD:
        return False
    except OSError:
        return True
    return True


def open_folder(path: Path) -> int | None:
    """Return a descriptor of a folder, which is no link; None where folders have none."""
    if not IS_POSIX:
        return None
    return os.open(path, READING_ITSELF | os.O_DIRECTORY)


def close_unreachable() -> None:
    """Close files that nobody can reach any more, where a file that is open is neither moved nor removed."""
    if not IS_POSIX:
        gc.collect()


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder, where a system lets one wait."""
    if not IS_POSIX:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # Some network file systems refuse; the rename itself has happened.
        pass
    finally:
        os.close(descriptor)


def is_running(pid: int) -> bool | None:
    """Say whether there is a process of this number; None where the system cannot be asked without harm."""
    if not IS_POSIX:  # Signal 0 is there the one that a keyboard sends to interrupt.
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def set_mode(descriptor: int, mode: int) -> None:
    """Give an open file its mode, where files have one."""
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, mode)


def map_memory(length: int) -> mmap.mmap:
    """Return memory of its own, zeros, which the system has back when it is let go."""
    if not IS_POSIX:
        return mmap.mmap(-1, length)
    return mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def count_disk_bytes(state: os.stat_result) -> int:
    """Return the bytes of the disk that a file takes; its length where the system does not say."""
    blocks: int | None = getattr(state, "st_blocks", None)
    return state.st_size if blocks is None else blocks * 512
