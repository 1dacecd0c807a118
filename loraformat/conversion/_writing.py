"""From a written bundle to files: the container writes the tensors, the configuration stands beside them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from loraformat.containers import CONTAINERS, WritableContainer
from loraformat.errors import refuse
from loraformat.files import write_at
from loraformat.outputs import PendingOutput, check_output
from loraformat.schemes import Bundle, WrittenBundle


def list_outputs(written: WrittenBundle, output: Path) -> list[Path]:
    """Return the files that a bundle becomes, the one with the tensors last."""
    if not written.file_name:
        return [output]
    beside = [output / written.config_name] if written.config is not None else []
    return [*beside, output / written.file_name]


def check_outputs(written: WrittenBundle, output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse outputs that would destroy something; raises as `check_output` does."""
    if not written.file_name:
        check_output(output, inputs, force=force)
        return
    if output.exists() and not output.is_dir():
        raise refuse("LF603", output, "something that is not a folder", "a new name or a folder")
    if not output.exists():
        check_output(output, inputs, force=force)
        return
    for path in list_outputs(written, output):
        check_output(path, inputs, force=force)


@contextmanager
def pending_files(written: WrittenBundle, output: Path, *, force: bool) -> Iterator[tuple[PendingOutput, Bundle]]:
    """Write a bundle aside, and yield it with what a reader finds in the new files; `commit` moves them into place."""
    made = bool(written.file_name) and not output.exists()
    if made:
        output.mkdir()
    try:
        with PendingOutput(list_outputs(written, output), force=force) as pending:
            container = CONTAINERS.find(written.container)
            assert isinstance(container, WritableContainer), f"no writer of {written.container}"
            tensors = [(name, each.dtype, each.shape, each.read) for name, each in written.tensors.items()]
            container.write(pending.descriptors[-1], tensors, written.metadata)
            if written.config is not None:
                text = json.dumps(written.config, indent=2, sort_keys=False, ensure_ascii=False, allow_nan=False)
                write_at(pending.descriptors[0], f"{text}\n".encode(), 0)
            opened = container.open(pending.parts[-1])
            yield pending, Bundle(output, opened.tensors, opened.metadata, written.config)
    finally:
        if made:
            with suppress(OSError):  # What has files in it stays.
                output.rmdir()
