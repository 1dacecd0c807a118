"""Paths from outside, and copying at disk speed."""

import errno
import os
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

from loraformat.errors import refuse
from loraformat.system import read_at, write_some

_CANNOT_CLONE: Final = frozenset(
    getattr(errno, name)
    for name in ("EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP", "ENOTSUP", "EBADF", "EPERM", "ETXTBSY")
    if hasattr(errno, name)
)

_UNFIT_IN_LOCATIONS: Final = re.compile(r"[\\\x00\ud800-\udfff]|^[A-Za-z]:")

_HUB_FOLDER: Final = "models--"
"""What a hub's cache puts before `owner--name`, the folder of a repository."""
_REVISION_BYTES: Final = 200

_WRITE_BYTES: Final = 256 << 10
"""Written at once: of more, Linux wants memory in larger pieces, which took three times as long at 2 MB."""

_NEAR: Final = 3
_NOT_FETCHED: Final = "Nothing is fetched from a hub here. If this is a repository, run"
_MISSPELT: Final = (
    (r"^\w+:/", "Nothing is fetched here: download it first, and give the file or the folder."),
    (r"^~", "The shell replaces ~ only where a word starts with it and no quotes are around: write -o ~/NAME."),
    (r"[*?]", "No file fits this pattern."),
)
"""What a path looks like that was meant otherwise, and what to say to it."""


def is_location(name: str) -> bool:
    """Say whether a model may call a file so: a relative path that means the same on every system, and is UTF-8."""
    forbidden = name.startswith("/") or ".." in PurePosixPath(name).parts or _UNFIT_IN_LOCATIONS.search(name)
    return bool(name) and not forbidden


def resolve_inside(model: Path, location: str) -> Path:
    """Return the path that a model's own `location` names, which must stay under the model's folder.

    In a hub cache the model is a symlink into a store of blobs: then a file under the folder of the real model file is
    as good (onnxruntime's rule).

    Raises:
        RefusedError: LF903 absolute, `..`, drive letters, backslashes, NUL, or a symlink that leaves the folder.
    """
    if not is_location(location):
        raise refuse("LF903", model, f"the location {location!r}", "a relative path below the model's folder")
    model = model.absolute()
    candidate = model.parent.joinpath(*PurePosixPath(location).parts)
    real = Path(os.path.realpath(candidate))
    allowed = {Path(os.path.realpath(model.parent)), Path(os.path.realpath(model)).parent}
    if not any(real.is_relative_to(folder) for folder in allowed):
        found = f"the location {location!r}, which leads to {real}"
        raise refuse("LF903", model, found, "a file below the model's folder")
    return candidate


def name_from(path: Path, folder: Path) -> str:
    """Return what a file is called from a folder, with slashes, whatever this system puts between names."""
    return Path(os.path.relpath(path, folder)).as_posix()


def find_snapshot(path: Path) -> Path:
    """Return where the files are of a repository in a hub's cache, for its folder; any other path as it is.

    The cache keeps a folder of links for each revision in `snapshots/`; the one that `refs/main` names is meant.

    Raises:
        InputError: LF121 several revisions, and none of them is the main one.
    """
    folder, references = path / "snapshots", path / "refs"
    if not (path.name.startswith(_HUB_FOLDER) and folder.is_dir()):
        return path
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    main = references / "main"
    with suppress(OSError, UnicodeError), main.open(encoding="ascii") as file:
        revision = file.read(_REVISION_BYTES).strip()
        names = [revision] if revision in names else names
    if len(names) == 1:
        return folder / names[0]
    mend = f"Name the one that you mean: {', '.join(str(folder / name) for name in names)}." if names else ""
    raise refuse("LF121", path, f"{len(names)} revisions in a hub's cache, none called main", "one", mend)


def name_in_hub(path: Path) -> str | None:
    """Return the name of the repository whose folder or revision in a hub's cache `path` is, else None."""
    repository = path.parent.parent if path.parent.name == "snapshots" else path
    return repository.name.rpartition("--")[2] if repository.name.startswith(_HUB_FOLDER) else None


def advise_missing(path: Path) -> str:
    """Say why there may be nothing at `path`, from what its words look like; empty where nothing tells."""
    text = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    for pattern, advice in _MISSPELT:
        if re.search(pattern, text):
            return advice
    repository = re.fullmatch(r"[\w.-]+/[\w.-]+", text)
    if repository and not path.parent.exists():
        return _advise_download(text)
    folder = path.parent
    if not folder.is_dir():
        return f"There is no folder {folder} either."
    from difflib import get_close_matches  # here: only a failing run needs it

    near = get_close_matches(path.name, sorted(os.listdir(folder)), _NEAR)
    return f"Near it: {', '.join(near)}." if near else ""


def _advise_download(name: str) -> str:
    """Say where the repository `name` of a hub is on this machine, or how it comes here."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))
    cached = cache / f"{_HUB_FOLDER}{name.replace('/', '--')}"
    if cached.is_dir():
        return f"A repository of this name is in the hub's cache: {cached}"
    folder = name.rpartition("/")[2]
    return f"{_NOT_FETCHED} `hf download {name} --local-dir {folder}` and give the folder {folder}."


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
        data = read_at(source, min(length, 1 << 20), source_offset)
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
        done += write_some(descriptor, view[done : done + _WRITE_BYTES], offset + done)
