"""Undoing a merge exactly, from the bytes that it has overwritten."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraformat.apply import Work, write_copies
from loraformat.bases import BaseModel
from loraformat.errors import refuse
from loraformat.images import FileImage
from loraformat.in_place import restore_in_place, roll_back
from loraformat.problems import Problem
from loraformat.side_receipt import name_side_receipt
from loraformat.strict_json import write_canonical
from loraformat.undo import Undo, name_undo, open_undo, restore_pieces


@dataclass(frozen=True, slots=True)
class Undone:
    """A merge that was undone.

    Attributes:
        output: the restored model.
        exact: whether its weights are the base's to the last bit.
        restored_bytes: bytes that were written back.
    """

    output: Path
    exact: bool
    restored_bytes: int

    @property
    def problem(self) -> Problem | None:
        """The warning that it is not exact, where it is not."""
        if self.exact:
            return None
        found = "the adapters subtracted from what they were added to"
        return Problem("LF623", str(self.output), found, severity="warning")

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {"output": str(self.output), "exact": self.exact, "restored_bytes": self.restored_bytes}


def undo_merge(model: BaseModel, output: Path | None, work: Work) -> Undone | None:
    """Undo a merge from a journal or an undo file; None where there is neither.

    Args:
        model: the opened model.
        output: where the restored model goes; None restores in place a model that was merged in place.
        work: how to do it.

    Raises:
        LoraformatError: LF803 the undo file belongs to another model.
    """
    if roll_back(model):
        return Undone(model.path, exact=True, restored_bytes=0)
    path = name_undo(model.path)
    if not path.is_file():
        return None
    undo = open_undo(path)
    restored = sum(kept.kept.span.length for kept in undo.spans)
    if output is None:
        if not name_side_receipt(model.path).is_file():
            raise refuse("LF601", model.path, "a model that was not merged in place", "-o with another name")
        restore_in_place(model, undo)
        path.unlink()
        return Undone(model.path, exact=True, restored_bytes=restored)
    _write_restored(model, output, undo, work)
    return Undone(output, exact=True, restored_bytes=restored)


def _write_restored(model: BaseModel, output: Path, undo: Undo, work: Work) -> None:
    """Write a copy of the merged model with the kept bytes; its receipt says so."""
    root = model.path if model.path.is_dir() else model.path.parent
    names = {file.path: os.path.relpath(file.path, root) for file in model.files}
    known = dict(undo.record.get("files", {}))
    for file in model.files:
        size = known.get(names[file.path], file.size_bytes)
        if size != file.size_bytes:
            raise refuse("LF803", undo.file.path, f"{names[file.path]} of {size} bytes", f"{file.size_bytes} bytes")
    receipt = model.encode_receipt(write_canonical({"version": "1.0", "undone": dict(undo.record)}).decode())
    images = model.describe_images(output, len(receipt), str(undo.record["plan_sha256"])[:8])
    restored = [_restore(image, names, undo) for image in images]
    write_copies(model, output, restored, receipt, work, [undo.file])


def _restore(image: FileImage, names: dict[Path, str], undo: Undo) -> FileImage:
    for source in {file.path for file in image.sources()}:
        if source in names:
            image = restore_pieces(image, names[source], undo)
    return image
