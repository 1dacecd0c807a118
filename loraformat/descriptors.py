"""Descriptors of input files: of thousands of files that are read now and then, only so many are open at once."""

import os
import stat
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from loraformat.errors import LoraformatError, refuse
from loraformat.files import advise_missing
from loraformat.limits import MAX_IDLE_DESCRIPTORS
from loraformat.system import READING


class FileState(NamedTuple):
    """What tells a file from another, and from itself after a change."""

    size_bytes: int
    changed_ns: int
    inode: int
    device: int


class Descriptor:
    """The descriptor of a regular file, for reading; closed while nobody reads and many others are open.

    It is safe to share between threads. Opened again, the file must be the very one that it was.

    Args:
        path: the file, absolute.

    Raises:
        InputError: LF100 no such file.
        RefusedError: LF905 not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._readers = 0
        self._opened = [_open_regular(path)]  # A list: taken from in one step, whichever thread the collector is in.
        self.state = read_state(self._opened[0])
        with _POOL.lock:
            _POOL.rest(self)

    def take(self) -> int:
        """Return the descriptor, open until it is put back; LF906 when the file is no longer the same."""
        with _POOL.lock:
            if not self._opened:
                self._opened.append(self._reopen())
            self._readers += 1
            _POOL.idle.pop(self, None)
            return self._opened[0]

    def put_back(self) -> None:
        """Say that what was taken is not read from any more."""
        with _POOL.lock:
            self._readers -= 1
            if not self._readers:
                _POOL.rest(self)

    @property
    def is_open(self) -> bool:
        """Whether it takes up a descriptor of the process."""
        return bool(self._opened)

    def shut(self) -> None:
        """Close it, if it is open; whoever reads from it afterwards opens it again."""
        with suppress(IndexError):
            os.close(self._opened.pop())

    def _reopen(self) -> int:
        descriptor = _open_regular(self._path)
        if read_state(descriptor) != self.state:
            os.close(descriptor)
            raise refuse_changed(self._path)
        return descriptor


class _Pool:
    """The descriptors that are open and that nobody reads from, the one that has rested longest first."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # A handler of a signal may read in a thread that holds it.
        self.idle: OrderedDict[Descriptor, None] = OrderedDict()

    def rest(self, descriptor: Descriptor) -> None:
        """Add a descriptor, and close the one that has rested longest if there are too many; the caller holds the lock.

        Those that were shut meanwhile, by whom the collector told to, leave only here: it may come at any moment.
        """
        self.idle[descriptor] = None
        if len(self.idle) > MAX_IDLE_DESCRIPTORS:
            for shut in [each for each in self.idle if not each.is_open]:
                del self.idle[shut]
        if len(self.idle) > MAX_IDLE_DESCRIPTORS:
            self.idle.popitem(last=False)[0].shut()

    def renew(self) -> None:
        """Give a process that was forked a lock that no thread of its parent holds."""
        self.lock = threading.RLock()


_POOL: Final = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.renew)


def refuse_changed(path: Path) -> LoraformatError:
    """Return the error for a file that is not what it was when it was opened (LF906)."""
    return refuse("LF906", path, "another size or time of change than at the start", "an unchanged file")


def read_state(descriptor: int) -> FileState:
    """Return the state of an open file."""
    state = os.fstat(descriptor)
    return FileState(state.st_size, state.st_mtime_ns, state.st_ino, state.st_dev)


def _open_regular(path: Path) -> int:
    """Open for reading without ever blocking on a pipe or a device."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise refuse("LF905", path, f"a {_name_of(mode)}", "a regular file")
        return os.open(path, READING)
    except FileNotFoundError as error:
        raise refuse("LF100", path, "nothing at this path", mend=advise_missing(path)) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise refuse("LF100", path, f"cannot be opened: {reason}", "a readable file") from error


_KINDS_OF_FILE = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def _name_of(mode: int) -> str:
    return next((name for test, name in _KINDS_OF_FILE if test(mode)), "special file")
