"""Files in the making: opened so that nothing planted in their place is written to, and locked as long as they are.

A process id says whether a run is alive on this machine only, and a folder may be shared with other machines, or with
containers that count processes of their own. A lock (`flock`) is known to all of them and ends with its process.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from loraformat.errors import refuse
from loraformat.system import IS_POSIX, MAKING, READING_ITSELF, hold, may_hold, open_folder, refuse_link

_HERE: Final = -100
_EXCHANGE: Final = 2
"""`AT_FDCWD` and `RENAME_EXCHANGE` of Linux."""


def open_part(path: Path, *, taken_up: bool, mode: int = 0o666, final: Path | None = None) -> int:
    """Create a part and return its descriptor, for reading and writing, locked.

    Args:
        path: the part.
        taken_up: whether it may be there already, left by a killed run.
        mode: its mode where it is new, less the user's umask.
        final: where it is to stand; a run killed while it placed the part has left the file under both names.

    Raises:
        RefusedError: LF603 something else than a file of that name alone, LF606 another run is writing it.
        OSError: what the system says, and of a link that it is one.
    """
    fresh = 0 if taken_up else os.O_EXCL
    refuse_link(path)
    descriptor = os.open(path, MAKING | fresh, mode)
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1 + _stands_at(state, final):
        os.close(descriptor)
        raise refuse("LF603", path, "what no run of ours has left", "nothing, or a file of one name")
    _hold(descriptor, path)
    return descriptor


def _stands_at(state: os.stat_result, final: Path | None) -> bool:
    with suppress(OSError):
        return final is not None and os.path.samestat(state, final.lstat())
    return False


def open_part_folder(path: Path) -> int | None:
    """Return a descriptor of a folder in the making, locked; None where folders have none. Raises as `open_part`."""
    descriptor = open_folder(path)
    if descriptor is not None:
        _hold(descriptor, path)
    return descriptor


def _hold(descriptor: int, path: Path) -> None:
    if not hold(descriptor):
        os.close(descriptor)
        raise refuse("LF606", path, "a run that is writing it", "one run at a time")


def is_held(path: Path) -> bool:
    """Say whether a running process, here or elsewhere, has a part open; False where nothing tells."""
    with suppress(OSError):
        descriptor = os.open(path, READING_ITSELF)
        try:
            return not may_hold(descriptor)
        finally:
            os.close(descriptor)
    return False


def check_alone(final: Path, own: frozenset[Path]) -> None:
    """Refuse (LF606) an output that another run is writing at this moment.

    Args:
        final: where the output will stand.
        own: the caller's own parts.
    """
    for entry in final.parent.iterdir():
        is_part = entry.name.startswith(f".{final.name}.loraformat-") and entry.name.endswith(".part")
        if is_part and entry not in own and is_held(entry):
            raise refuse("LF606", final, f"a run that is writing {entry.name}", "one run at a time")


def swap_names(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where system or file system cannot (Linux can, `renameat2`)."""
    import ctypes

    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if IS_POSIX else None
    if exchange is None:
        return False
    return bool(exchange(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)
