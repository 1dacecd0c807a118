"""Output folders that appear whole or not at all."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

from loraformat.errors import refuse
from loraformat.outputs import (
    check_output,
    may_resume,
    name_part,
    output_errors,
    refuse_appeared,
    remove,
    remove_stale_parts,
)
from loraformat.parts import check_alone, open_part, open_part_folder, swap_names
from loraformat.system import IS_POSIX, close_unreachable, sync_folder

_NO_LINKS: Final[Mapping[Path, Path]] = MappingProxyType({})


class PendingFolder:
    """An output folder that is filled aside and moved into place whole.

    Use as `PendingOutput`. With `force` an existing folder is replaced, all of it: `check_output_folder` allows that
    only for a folder that holds the mark of an earlier run.

    Args:
        folder: where the folder will stand.
        names: the files in it, relative.
        force: replace what stands there.
        durable: as in `PendingOutput`.
        resume: as in `PendingOutput`.
        links: names that become hard links, and to which files; they get the descriptor -1.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[Path],
        *,
        force: bool,
        durable: bool = False,
        resume: str | None = None,
        links: Mapping[Path, Path] = _NO_LINKS,
    ) -> None:
        self._final = folder.absolute()
        self._names = tuple(names)
        self._force = force
        self._durable = durable
        self._resume = resume
        self._links = links
        self._part = name_part(self._final, resume)
        self._is_ours = False
        self._held: int | None = None
        self.descriptors: list[int] = []

    def __enter__(self) -> Self:
        try:
            remove_stale_parts(self._final, self._resume)
            with output_errors(self._final):
                self._part.mkdir(exist_ok=self._resume is not None)
                self._held = open_part_folder(self._part)
                self._is_ours = True
            check_alone(self._final, frozenset({self._part}))
            self._remove_strays()
            for name in self._names:
                with output_errors(self._final / name):
                    self._open_part(self._part / name, self._links.get(name))
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard(keep=self._resume is not None and may_resume(error))

    def _remove_strays(self) -> None:
        """Remove what a killed run has left and this one does not write."""
        own = {self._part / name for name in self._names}
        for path in [path for path in self._part.rglob("*") if path not in own and not path.is_dir()]:
            remove(path)

    def _open_part(self, path: Path, source: Path | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if source is None:
            self.descriptors.append(open_part(path, taken_up=self._resume is not None))
            return
        if self._resume:
            remove(path)
        try:
            os.link(os.path.realpath(source), path)  # link(2) would take a symlink for the file
        except OSError as error:
            found = f"{source}: {error.strerror or error}"
            raise refuse("LF624", self._final / path.relative_to(self._part), found, "a link to it") from error
        self.descriptors.append(-1)

    def commit(self) -> None:
        """Move the folder into place; an earlier one is removed last."""
        with output_errors(self._final):
            if self._durable:
                for descriptor in self.descriptors:
                    if descriptor >= 0:
                        os.fsync(descriptor)
                sync_folder(self._part)
            if not IS_POSIX:
                self._close()
                close_unreachable()
            if not os.path.lexists(self._final):
                os.rename(self._part, self._final)
            elif self._force:
                self._exchange()
            else:
                raise refuse_appeared(self._final)
            if self._durable:
                sync_folder(self._final.parent)

    def _exchange(self) -> None:
        """Put the part in the place of the earlier folder, in one step where the system can: a kill leaves either."""
        resumed, self._part = self._part, name_part(self._final)
        os.rename(resumed, self._part)  # No later run may take up what is the earlier folder by then.
        aside = self._part
        if not swap_names(self._part, self._final):
            aside = name_part(self._final)
            os.rename(self._final, aside)
            try:
                os.rename(self._part, self._final)
            except OSError:
                os.rename(aside, self._final)
                raise
        remove(aside)

    def _close(self) -> None:
        while self.descriptors:
            descriptor = self.descriptors.pop()
            if descriptor >= 0:
                os.close(descriptor)

    def _discard(self, *, keep: bool = False) -> None:
        self._close()
        if self._is_ours and not keep:
            remove(self._part)
        if self._held is not None:
            os.close(self._held)
        self._is_ours, self._held = False, None


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
