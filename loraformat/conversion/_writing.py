"""From a written bundle to files: the container writes the tensors, the configuration stands beside them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from loraformat.containers import CONTAINERS, WritableContainer
from loraformat.errors import refuse
from loraformat.files import write_at
from loraformat.outputs import PendingOutput, check_output, output_errors
from loraformat.problems import Problem
from loraformat.rules import watch_numbers
from loraformat.schemes import Bundle, WrittenBundle


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a bundle goes.

    Attributes:
        tensors: the file with the tensors.
        config: the file with the configuration; None without one.
        folder: the folder that both stand in, where it is the output; None for an output that is a file.
        container: in what the tensors are written.
        annotates: whether annotations go along.
    """

    tensors: Path
    config: Path | None
    folder: Path | None
    container: str
    annotates: bool

    def list_paths(self) -> list[Path]:
        """Return the files, the one with the tensors last."""
        return [self.tensors] if self.config is None else [self.config, self.tensors]


def name_outputs(written: WrittenBundle, output: Path) -> Outputs:
    """Return where a bundle goes: a folder, or one file with its configuration beside it.

    Of a scheme of folders, an output that is called as its readers call the file with the tensors is that file.
    """
    if not written.file_name:
        return Outputs(output, None, None, written.container, True)
    other = next((name for name in written.other_files if fnmatchcase(output.name, name)), None)
    is_file = not output.is_dir() and (other is not None or output.name == written.file_name)
    folder = None if is_file else output
    tensors = output if is_file else output / written.file_name
    config = tensors.with_name(written.config_name) if written.config is not None else None
    container = written.other_files[other] if is_file and other is not None else written.container
    return Outputs(tensors, config, folder, container, container == written.container)


def check_outputs(written: WrittenBundle, output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse outputs that would destroy something; raises as `check_output` does."""
    outputs = name_outputs(written, output)
    if outputs.folder is not None and not output.exists():
        check_output(output, inputs, force=force)
        return
    if outputs.folder is not None and not output.is_dir():
        raise refuse("LF603", output, "something that is not a folder", "a new name or a folder")
    for path in outputs.list_paths():
        check_output(path, inputs, force=force)


@contextmanager
def pending_files(
    written: WrittenBundle, output: Path, found: list[Problem], *, force: bool
) -> Iterator[PendingOutput]:
    """Write a bundle aside, and yield it; `commit` moves it into place.

    Args:
        written: the bundle.
        output: where it goes.
        found: tensors with NaN or infinities are added to it.
        force: replace existing files.
    """
    outputs = name_outputs(written, output)
    made = outputs.folder is not None and not output.exists()
    if made:
        output.mkdir()
    try:
        with PendingOutput(outputs.list_paths(), force=force) as pending:
            container = _find_container(outputs)
            tensors = [
                (name, each.dtype, each.shape, watch_numbers(name, each, found))
                for name, each in written.tensors.items()
            ]
            container.write(pending.descriptors[-1], tensors, written.metadata if outputs.annotates else {})
            if outputs.config is not None:
                text = json.dumps(written.config, indent=2, sort_keys=False, ensure_ascii=False, allow_nan=False)
                write_at(pending.descriptors[0], f"{text}\n".encode(), 0)
            yield pending
    finally:
        if made:
            with suppress(OSError):  # What has files in it stays.
                output.rmdir()


@contextmanager
def read_back(pending: PendingOutput, written: WrittenBundle, output: Path) -> Iterator[Bundle]:
    """Yield what a reader finds in files that are written aside; they are closed again before they are moved."""
    opened = _find_container(name_outputs(written, output)).open(pending.parts[-1])
    try:
        yield Bundle(output, opened.tensors, opened.metadata, written.config)
    finally:
        opened.file.close()


def place_files(pending: PendingOutput, written: WrittenBundle, output: Path, *, force: bool) -> None:
    """Move what was written into place.

    Old tensors go first where a configuration stands beside them: killed between the two moves, this must not leave an
    adapter of the old factors at the new scale.
    """
    outputs = name_outputs(written, output)
    if force and outputs.config is not None:
        with output_errors(outputs.tensors):
            outputs.tensors.unlink(missing_ok=True)
    pending.commit()


def _find_container(outputs: Outputs) -> WritableContainer:
    container = CONTAINERS.find(outputs.container)
    assert isinstance(container, WritableContainer), f"no writer of {outputs.container}"
    return container
