"""Whether there is room for files before the first of them is made."""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from loraformat.errors import refuse
from loraformat.system import count_disk_bytes


def check_space(needs: Iterable[tuple[Path, int]]) -> None:
    """Refuse files for which their file systems have no room (LF604).

    Args:
        needs: where each file will stand, and the bytes that it will take beyond what it has already.
    """
    wanted: dict[int, int] = defaultdict(int)
    folders: dict[int, Path] = {}
    for path, nbytes in needs:
        folder = next(folder for folder in path.absolute().parents if folder.is_dir())
        device = os.stat(folder).st_dev
        wanted[device] += nbytes
        folders.setdefault(device, folder)
    for device, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if free < wanted[device]:
            raise refuse("LF604", folder, f"{free} bytes free", f"{wanted[device]} bytes for the output")


def count_held_bytes(path: Path) -> int:
    """Return the bytes of the disk that a file holds already, 0 where there is none."""
    try:
        return count_disk_bytes(os.stat(path))
    except OSError:
        return 0
