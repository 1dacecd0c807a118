"""Output that appears whole or not at all.

An output is written beside its final name, as `.<name>.loraformat-<pid>-<random>.part`, and moved into place last. A
run that fails or is killed leaves what was there before, and at most a part that the next run into that folder removes.
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

from loraformat.errors import LoraformatError, refuse

_PART: Final = re.compile(r"^\..+\.loraformat-(?P<pid>\d+)-[0-9a-f]{8}\.part$")
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
    check_apart(path, inputs)
    if not force:
        raise refuse("LF601", path, "a file of this name", "no file, or --force")


def check_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output, file or folder, that is one of the inputs or a folder around one (LF602)."""
    if not output.exists():
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
        part = _name_part(final)
        with output_errors(final):
            # Mode 0666 lets the user's umask decide, as any other new file.
            self.descriptors.append(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
            self._parts.append(part)
            if final.exists():
                os.chmod(part, stat.S_IMODE(final.stat().st_mode))

    @property
    def parts(self) -> Sequence[Path]:
        """Where the files stand until they are moved, for whoever checks what was written."""
        return tuple(self._parts)

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


class PendingFolder:
    """An output folder that is filled aside and moved into place whole.

    Use as `PendingOutput`. With `force` an existing folder is replaced, all of it: `check_output_folder` allows that
    only for a folder that holds the mark of an earlier run.

    Args:
        folder: where the folder will stand.
        names: the files in it, relative.
        force: replace what stands there.
        durable: as in `PendingOutput`.
    """

    def __init__(self, folder: Path, names: Sequence[Path], *, force: bool, durable: bool = False) -> None:
        self._final = folder.absolute()
        self._names = tuple(names)
        self._force = force
        self._durable = durable
        self._part = _name_part(self._final)
        self.descriptors: list[int] = []

    def __enter__(self) -> Self:
        try:
            _remove_stale_parts(self._final.parent)
            with output_errors(self._final):
                self._part.mkdir()
            for name in self._names:
                path = self._part / name
                with output_errors(self._final / name):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self.descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def commit(self) -> None:
        """Move the folder into place; an earlier one is moved aside first and removed last."""
        with output_errors(self._final):
            if self._durable:
                for descriptor in self.descriptors:
                    os.fsync(descriptor)
                _sync_folder(self._part)
            if not os.path.lexists(self._final):
                os.rename(self._part, self._final)
            elif self._force:
                self._exchange()
            else:
                raise _appeared(self._final)
            if self._durable:
                _sync_folder(self._final.parent)

    def _exchange(self) -> None:
        aside = _name_part(self._final)
        os.rename(self._final, aside)
        try:
            os.rename(self._part, self._final)
        except OSError:
            os.rename(aside, self._final)
            raise
        _remove(aside)

    def _discard(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())
        _remove(self._part)


def check_output_folder(folder: Path, source: Path, mark: str, *, force: bool) -> None:
    """Refuse an output folder that would destroy something, before any work is done.

    Args:
        folder: where the output will stand.
        source: the folder that is read.
        mark: name of a file that only our own outputs have; a folder without it is never replaced.
        force: replace a folder that has it.

    Raises:
        RefusedError: LF601 exists, LF602 is the input or around it, LF603 not a folder, LF608 unusable name.
        OutputError: LF605 the folder around it is missing or closed.
    """
    final, real = folder.absolute(), Path(os.path.realpath(folder))
    taken = Path(os.path.realpath(source))
    if real == taken or real in taken.parents or taken in real.parents:
        raise refuse("LF602", folder, f"the input {source}, or a folder around it or inside it", "another folder")
    if not os.path.lexists(final):
        check_output(final, [], force=force)
        return
    if not final.is_dir() or final.is_symlink():
        raise refuse("LF603", folder, "something that is not a folder", "a new name or a folder")
    if not force:
        raise refuse("LF601", folder, "a folder of this name", "no folder, or --force")
    if not (final / mark).is_file():
        mend = "It is removed by nobody but you: choose another name with -o."
        raise refuse("LF601", folder, f"a folder that loraformat did not write (no {mark})", "a new name", mend)


def _name_part(final: Path) -> Path:
    return final.with_name(f".{final.name}.loraformat-{os.getpid()}-{secrets.token_hex(4)}.part")


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
            _remove(entry)


def _remove(path: Path) -> None:
    """Remove a file or a folder, as far as it lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
