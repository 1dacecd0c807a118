"""Output that appears whole or not at all.

An output is written beside its final name, as `.<name>.loraformat-<pid>-<random>.part`, and moved into place last. A
run that fails or is killed leaves what was there before, and at most a part that the next run into that folder removes.
A run that may be resumed calls its parts `.<name>.loraformat-resume-<token>.part`, and the next run of that token finds
them; a run to the same name and of another token removes them.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from loraformat.errors import LoraformatError, OutputError, refuse
from loraformat.parts import check_alone, is_held, open_part
from loraformat.system import IS_POSIX, close_unreachable, is_running, set_mode, sync_folder

FOLDER_UNDO: Final = "merge.undo"
"""What a merge into a folder overwrites, kept to be undone, is in this file of it."""

JOURNAL: Final = ".loraformat-journal"
"""As long as a merge in place is not complete, what it overwrites is in a file of this name, or that ends so."""

_PART: Final = re.compile(r"^\..+\.loraformat-(?P<pid>\d+)-[0-9a-f]{8}\.part$")
_LEFT: Final = re.compile(r"^\..+\.loraformat-[^/]+\.(?:part|log)$")
_FORMATS: Final = {f".{name}": name for name in ("onnx", "onnx_adapter", "safetensors", "gguf", "npz")} | dict.fromkeys(
    (".bin", ".pt", ".pth", ".ckpt"), "torch"
)
"""What the endings of names say."""
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


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
            mend = "" if "~" in folder.parts else f"Make it first: mkdir -p {folder}"
            raise refuse("LF605", path, f"no folder {folder}", "an existing folder", mend)
        if not os.access(folder, os.W_OK):
            raise refuse("LF605", path, f"the folder {folder} is closed to writing", "a writable folder")
        if not os.path.lexists(path):
            return
        _check_existing(path, inputs, force=force)
    except OSError as error:
        raise refuse("LF605", path, str(error.strerror or error), "a path that can be written") from error


def check_ending(path: Path, suffix: str, source: str) -> None:
    """Refuse an output whose name says another format than it will have (LF837).

    Args:
        path: the output.
        suffix: how names of its format end; empty for a folder.
        source: what gives it this format, for the message.
    """
    said, meant = path.suffix.lower(), suffix.lower()
    if said in _FORMATS and _FORMATS[said] != _FORMATS.get(meant, meant):
        expected = f"a name that ends in {suffix}" if suffix else "the name of a folder"
        raise refuse("LF837", path, f"the ending {said}, and {source}", expected)


def _check_existing(path: Path, inputs: Iterable[Path], *, force: bool) -> None:
    if not path.exists():
        raise refuse("LF603", path, "a symlink that leads nowhere", "a new name or a regular file")
    if not path.is_file():
        raise refuse("LF603", path, "a folder, device or pipe", "a new name or a regular file")
    check_apart(path, inputs)
    if not force:
        raise refuse("LF601", path, "a file of this name", "no file, or --force")


def check_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output, file or folder, that is one of the inputs or a folder around one (LF602)."""
    if not os.path.exists(output):  # a name that cannot be is none: `check_output` says so
        return
    for source in inputs:
        if source.exists() and any(os.path.samefile(output, place) for place in (source, *source.absolute().parents)):
            raise refuse("LF602", output, f"the same as the input {source}, or around it", "another place")


class PendingOutput:
    """Output files that are written aside and moved into place together, the last one last.

    Use as a context manager: leaving it by an exception, or without `commit`, removes everything written.

    Args:
        paths: where the files will stand.
        force: replace what stands there.
        durable: wait until the disk has the bytes before they are moved, so that a power cut too leaves old or new.
        resume: token of a run that may be resumed: parts of an earlier one are taken up, and left when this one is
            interrupted.
    """

    def __init__(self, paths: Sequence[Path], *, force: bool, durable: bool = False, resume: str | None = None) -> None:
        self._force = force
        self._durable = durable
        self._resume = resume
        self._finals = [path.absolute() for path in paths]
        self._parts: list[Path] = []
        self.descriptors: list[int] = []

    def __enter__(self) -> Self:
        try:
            for final in self._finals:
                remove_stale_parts(final, self._resume)
                self._open_part(final)
            for final in self._finals:
                check_alone(final, frozenset(self._parts))
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard(keep=self._resume is not None and may_resume(error))
        for final in self._finals[:1]:
            refuse_no_space(final, error)

    def _open_part(self, final: Path) -> None:
        part = name_part(final, self._resume)
        with output_errors(final):
            existing = stat.S_IMODE(final.stat().st_mode) if final.exists() else None
            # Mode 0666 lets the user's umask decide, as any other new file; what replaces a closed one is never open.
            mode = 0o666 if existing is None else 0o600
            self.descriptors.append(open_part(part, taken_up=self._resume is not None, mode=mode, final=final))
            self._parts.append(part)
            if existing is not None:
                set_mode(self.descriptors[-1], existing)

    @property
    def parts(self) -> Sequence[Path]:
        """Where the files stand until they are moved, for whoever checks what was written."""
        return tuple(self._parts)

    def commit(self) -> None:
        """Move the parts into place, in order; on failure nothing new remains."""
        placed: list[Path] = []
        try:
            for descriptor, final in zip(self.descriptors if self._durable else (), self._finals, strict=False):
                with output_errors(final):
                    os.fsync(descriptor)
            if not IS_POSIX:
                self._close()
                close_unreachable()
            for part, final in zip(self._parts, self._finals, strict=True):
                with output_errors(final):
                    existed = os.path.lexists(final)
                    _place(part, final, force=self._force)
                    if not existed:
                        placed.append(final)
            if self._durable:
                for folder in {final.parent for final in self._finals}:
                    sync_folder(folder)
        except BaseException:
            for final in placed:
                with contextlib.suppress(OSError):
                    final.unlink()
            raise

    def _close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())

    def _discard(self, *, keep: bool = False) -> None:
        self._close()
        for part in () if keep else self._parts:
            with contextlib.suppress(OSError):
                part.unlink()


def name_part(final: Path, resume: str | None = None) -> Path:
    """Return where an output is written before it is moved to `final`."""
    mark = f"resume-{resume}" if resume else f"{os.getpid()}-{secrets.token_hex(4)}"
    return final.with_name(f".{final.name}.loraformat-{mark}.part")


def name_log(final: Path, resume: str) -> Path:
    """Return where a run that may be resumed notes what it has done."""
    return final.with_name(f".{final.name}.loraformat-resume-{resume}.log")


def is_unfinished(name: str) -> bool:
    """Say whether a file or folder of this name is what a run of ours is making, or has left when it was killed."""
    return _LEFT.match(name) is not None or name.endswith(JOURNAL)


def may_resume(error: BaseException | None) -> bool:
    """Say whether a run that ended so may be taken up again: it was interrupted, or the disk failed it."""
    return error is not None and (not isinstance(error, LoraformatError) or isinstance(error, OutputError))


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


def refuse_no_space(path: Path, error: BaseException | None) -> None:
    """Raise LF604 for an error that only a write to a full disk gives; containers write through plain files."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        raise refuse("LF604", path, error.strerror or str(error)) from error


def _place(part: Path, final: Path, *, force: bool) -> None:
    """Move `part` to `final`; without `force` a file that appeared meanwhile is not replaced."""
    if not force:
        try:
            os.link(part, final)
        except FileExistsError as error:
            raise refuse_appeared(final) from error
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
        raise refuse_appeared(final) from error


def refuse_appeared(final: Path) -> LoraformatError:
    """Return the error for an output that somebody else made meanwhile."""
    return refuse("LF601", final, "a file of this name, made during the run", "no file, or --force")


def remove_stale_parts(final: Path, resume: str | None = None) -> None:
    """Remove parts that runs of ours left beside `final` when they were killed, but for those of the token `resume`.

    What a run holds stays: its process may be another machine's, or another container's.
    """
    resumable = f".{final.name}.loraformat-resume-"
    for entry in final.parent.iterdir():
        match = _PART.match(entry.name)
        running = is_running(int(match["pid"])) if match is not None else True
        dead = not running and (running is not None or entry.is_file())  # A file that is held is told below.
        foreign = entry.name.startswith(resumable) and not entry.name.startswith(f"{resumable}{resume}.")
        if (dead or foreign) and not is_held(entry):
            remove(entry)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as it lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
