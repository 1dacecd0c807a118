"""Where an output goes: checked before anything is made, opened aside; what it makes needless is removed at the end."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from loraformat.apply.disk_space import check_space, count_held_bytes
from loraformat.apply.output_folders import PendingFolder, check_output_folder
from loraformat.apply.side_receipt import name_side_receipt
from loraformat.apply.undo import name_undo
from loraformat.bases import BaseModel, DataFileBase
from loraformat.errors import refuse
from loraformat.frozen_mapping import FrozenMapping
from loraformat.images import FileImage
from loraformat.outputs import PendingOutput, check_output, name_part, output_errors, remove


@dataclass(frozen=True, slots=True)
class Place:
    """An output's place.

    Attributes:
        output: the file or folder.
        mark: for a folder, the file by which one of ours is known; else empty.
        base: the opened base that it is made from.
        images: its files, the one with the receipt last.
        force: replace what stands there.
        durable: wait for the disk before it is moved into place.
        resume: token of a run that may be taken up.
        links: names in a folder that become hard links, and to which files.
    """

    output: Path
    mark: str
    base: BaseModel
    images: Sequence[FileImage]
    force: bool
    durable: bool
    resume: str | None = None
    links: Mapping[Path, Path] = field(default_factory=FrozenMapping)

    def check(self) -> None:
        """Refuse an output that would destroy something; makes nothing."""
        if self.mark:
            check_output_folder(self.output, self.base.path, self.mark, force=self.force)
        else:
            check_output(self.output, [file.path for file in self.base.files], force=self.force)

    def list_needs(self) -> Iterator[tuple[Path, int]]:
        """Yield where each file will stand and the bytes that it needs; links and what a killed run has made do not."""
        for image in self.images:
            part = self._name_part(image)
            if part is not None:
                held = count_held_bytes(part) if self.resume else 0
                yield image.path, max(0, image.size_bytes - held)

    def has_all_parts(self) -> bool:
        """Say whether a killed run has left every file of the output."""
        parts = [self._name_part(image) for image in self.images]
        return all(part.is_file() for part in parts if part is not None)

    def _name_part(self, image: FileImage) -> Path | None:
        """Return where a file is written first; None for a link."""
        if not self.mark:
            return name_part(image.path.absolute(), self.resume)
        name = _name_inside(self.output, image)
        return None if name in self.links else name_part(self.output.absolute(), self.resume) / name


def _name_inside(folder: Path, image: FileImage) -> Path:
    """Return what a file of an output folder is called in it; either may be named from the working directory."""
    return image.path.absolute().relative_to(folder.absolute())


def check_places(places: Sequence[Place]) -> None:
    """Refuse outputs that would destroy something or that there is no room for; makes nothing."""
    for place in places:
        place.check()
    check_space(need for place in places for need in place.list_needs())


@contextmanager
def open_place(place: Place) -> Iterator[PendingOutput | PendingFolder]:
    """Open the files of an output; leaving without `commit` removes what was made."""
    if place.mark:
        names = [_name_inside(place.output, image) for image in place.images]
        with PendingFolder(
            place.output, names, force=place.force, durable=place.durable, resume=place.resume, links=place.links
        ) as folder:
            yield folder
        return
    inputs = [file.path for file in place.base.files]
    with make_folders([image.path for image in place.images[:-1]]):
        for image in place.images[:-1]:
            check_output(image.path, inputs, force=place.force)
        stale = _list_stale(place) if place.force else []
        paths = [image.path for image in place.images]
        _remove_orphans(place)
        with PendingOutput(paths, force=place.force, durable=place.durable, resume=place.resume) as files:
            yield files
    for path in stale:
        with suppress(OSError):
            path.unlink()


def _remove_orphans(place: Place) -> None:
    """Remove parts of a killed run whose data files had other names: it had moved one into place already."""
    if place.resume is None:
        return
    own = {name_part(image.path.absolute(), place.resume) for image in place.images}
    end = name_part(Path("/x"), place.resume).name.removeprefix(".x")
    for image in place.images:
        for entry in list(image.path.absolute().parent.iterdir()):
            if entry.name.startswith(f".{place.output.stem}") and entry.name.endswith(end) and entry not in own:
                remove(entry)


@contextmanager
def make_folders(paths: Sequence[Path]) -> Iterator[None]:
    """Make the folders that files are to stand in; when what follows fails they go again."""
    made: list[Path] = []
    try:
        for path in paths:
            missing = [folder for folder in path.parents if not folder.exists()]
            for folder in reversed(missing):
                with output_errors(path):
                    folder.mkdir()
                made.append(folder)
        yield
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        raise


def _list_stale(place: Place) -> list[Path]:
    """Return what only the model that is replaced needs, never a file of the base: two models may share their data.

    What was kept to undo its merge, and a receipt beside it, would be taken for those of the new one.
    """
    own = {file.identity for file in place.base.files}
    beside = [path for path in (name_undo(place.output), name_side_receipt(place.output)) if path.is_file()]
    states = [(path, path.stat()) for path in (*place.base.list_stale(place.output), *beside)]
    written = {image.path.absolute() for image in place.images}
    return [
        path for path, state in states if (state.st_dev, state.st_ino) not in own and path.absolute() not in written
    ]


def list_links(base: BaseModel, output: Path, images: Sequence[FileImage], touched: set[str]) -> dict[Path, Path]:
    """Return the files of an output folder that are files of the base as they are, and which.

    Data files of ONNX graphs are copied all the same: onnx reads none that has several names.

    Args:
        base: the opened base.
        output: the folder.
        images: its files.
        touched: names of the base's files that something of is rewritten.

    Raises:
        RefusedError: LF624 a base that is no folder.
    """
    if not base.folder_mark:
        raise refuse("LF624", base.path, f"a base of the format {base.format!r}", "a folder")
    copied = base.list_data_files() if isinstance(base, DataFileBase) else frozenset()
    whole = ((image, image.whole_copy()) for image in images)
    return {
        _name_inside(output, image): file.path
        for image, file in whole
        if file is not None and file.path.name not in touched and file.path not in copied
    }
