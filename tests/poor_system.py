"""A system without what Windows lacks, for a process that this is imported in before loraformat.

Calls and flags are gone, folders cannot be opened, files that are open can be neither moved nor removed, and in the
place of `fcntl` there is a `msvcrt` whose locks are known in this process alone.
"""

import builtins
import errno
import os
import shutil
import signal
import subprocess  # noqa: F401  # It asks for msvcrt itself, and has to find none.
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

MISSING = (
    *("preadv", "pread", "pwrite", "pwritev", "copy_file_range", "posix_fallocate", "posix_fadvise"),
    *("fchmod", "register_at_fork", "fork", "sched_getaffinity", "getuid", "geteuid", "fdatasync"),
    *("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY"),
)
MISSING_MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
_open = os.open


class Msvcrt(ModuleType):
    """Locks as Windows has them: of bytes, for one descriptor, until it is closed."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self._held: dict[tuple[int, int], int] = {}

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        """Lock bytes from the descriptor's place on, which must be behind the end; EACCES where another one has."""
        state = os.fstat(descriptor)
        assert (mode, count) == (self.LK_NBLCK, 1)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > state.st_size
        key = state.st_dev, state.st_ino
        if self._held.get(key, descriptor) != descriptor and _is_open(self._held[key], key):
            raise PermissionError(errno.EACCES, "locked")
        self._held[key] = descriptor


def _is_open(descriptor: int, key: tuple[int, int]) -> bool:
    try:
        state = os.fstat(descriptor)
    except OSError:
        return False
    return (state.st_dev, state.st_ino) == key


def _refuse_open(path: Any) -> None:
    """Raise what Windows says of a file that some descriptor of this process leads to, or of a folder around one."""
    place = os.path.realpath(os.path.dirname(os.path.abspath(os.fspath(path)))) + os.sep + os.path.basename(path)
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # That of the listing.
            continue
        if target == place or target.startswith(place + os.sep):
            raise PermissionError(errno.EACCES, "open in this process", str(path))


def _guarded(call: Callable[..., Any], *places: int) -> Callable[..., Any]:
    def guarded(*arguments: Any, **named: Any) -> Any:
        if named.get("dir_fd") is None:
            for place in places:
                _refuse_open(arguments[place])
        return call(*arguments, **named)

    return guarded


def _open_file(path: Any, flags: int, *rest: Any, **named: Any) -> int:
    if named.get("dir_fd") is None and os.path.isdir(path):
        raise PermissionError(errno.EACCES, "a folder", str(path))
    return _open(path, flags, *rest, **named)


def impoverish() -> None:
    """Take away what is to be missing."""
    shutil._use_fd_functions = False  # As where they are missing.
    for name in MISSING:
        if hasattr(os, name):
            delattr(os, name)
    for name in MISSING_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    sys.modules["msvcrt"] = Msvcrt()
    delattr(signal, "SIGHUP")
    os.open = _open_file
    os.replace, os.rename = _guarded(os.replace, 0, 1), _guarded(os.rename, 0, 1)
    os.unlink, os.remove = _guarded(os.unlink, 0), _guarded(os.remove, 0)
    os.kill = lambda pid, number: builtins.exit("os.kill interrupts programs on Windows")
    assert Path("/proc/self/fd").is_dir(), "what is open is asked of Linux"


impoverish()
