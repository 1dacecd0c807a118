"""Undoing a merge exactly, from the bytes that it has overwritten."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loraformat.apply import Work, write_copies
from loraformat.apply.in_place import find_root, name_files, roll_back
from loraformat.apply.placing import Place
from loraformat.apply.side_receipt import find_receipt
from loraformat.apply.undo import Undo, check_undo, name_journal, name_undo, open_undo, restore_pieces
from loraformat.bases import BaseModel
from loraformat.errors import LoraformatError, refuse
from loraformat.files import name_from
from loraformat.images import NewOutput
from loraformat.loading import open_base
from loraformat.problems import Problem
from loraformat.signatures import ZIP_MAGIC
from loraformat.spans import InputFile, Span
from loraformat.strict_json import write_canonical

_WIDEST: Final = 4
"""How many times its text a receipt's room may be: room for the digits of its numbers is less."""


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


def take_back(model: Path, output: Path | None) -> Undone | None:
    """Roll back a merge in place that was not completed; None where there is no journal of one.

    Raises:
        LoraformatError: LF621 an output is asked for, LF803 a journal that is none of this model.
    """
    journal = name_journal(model)
    if not journal.is_file():
        return None
    if output is not None:
        raise refuse("LF621", model, f"the journal {journal.name}", "no -o: the model itself is rolled back")
    return Undone(model, exact=True, restored_bytes=roll_back(model, _name_half_done(model)))


def _name_half_done(model: Path) -> dict[str, InputFile]:
    """Return the files that the journal of a model that is half done may name.

    An archive has its checksums at several places, and is refused where a kill came between them. Then the journal may
    name the archives that the model consists of.
    """
    try:
        return name_files(open_base(model))
    except LoraformatError as error:
        if "LF902" not in error.codes:
            raise
    beside = [InputFile(path) for path in sorted(model.iterdir()) if path.is_file()] if model.is_dir() else []
    files = beside or [InputFile(model)]
    archives = [file for file in files if file.read(0, min(len(ZIP_MAGIC), file.size_bytes)) == ZIP_MAGIC]
    return {name_from(file.path, find_root(model)): file for file in archives}


def undo_merge(model: BaseModel, output: Path | None, work: Work) -> Undone | None:
    """Undo a merge from an undo file; None where there is none.

    Args:
        model: the opened model.
        output: where the restored model goes; None restores in place a model that was merged in place.
        work: how to do it.

    Raises:
        LoraformatError: LF601 no output for a model that was not merged in place, LF803 the undo file belongs to
            another model or merge.
    """
    path = name_undo(model.path)
    if not path.is_file():
        return None
    undo = open_undo(path)
    files = name_files(model)
    check_undo(undo, files)
    receipt = find_receipt(model) or {}
    if receipt.get("plan_sha256") != undo.plan_sha256:
        raise refuse("LF803", path, f"bytes of the merge {undo.plan_sha256:.12}...", "those of the model's last merge")
    if output is not None:
        _write_restored(model, output, undo, _restore_receipt(model, receipt), work)
        return Undone(output, exact=True, restored_bytes=undo.kept_bytes)
    if not undo.is_in_place:
        raise refuse("LF601", model.path, "a model that was not merged in place", "-o with another name")
    undo.file.close()
    # A model that is half restored must not be taken for a whole one either.
    os.replace(path, name_journal(model.path))
    return Undone(model.path, exact=True, restored_bytes=roll_back(model.path, files))


def _restore_receipt(model: BaseModel, receipt: Mapping[str, Any]) -> bytes:
    """Return the receipt that the base of a merge had, with the room that it had; empty for none."""
    parent = receipt.get("parent")
    if not isinstance(parent, Mapping):
        return b""
    text = model.encode_receipt(write_canonical(parent).decode())
    room = parent.get("room_bytes")
    return text.ljust(room) if isinstance(room, int) and room < _WIDEST * len(text) else text


def _write_restored(model: BaseModel, output: Path, undo: Undo, receipt: bytes, work: Work) -> None:
    """Write a copy of the merged model with the kept bytes, and the receipt that stood there."""
    images = model.describe_images(NewOutput(output, len(receipt), undo.plan_sha256[:8]))
    files = name_files(model)
    names = {file.path: name for name, file in files.items()}
    for kept in undo.spans:
        span = Span(files[kept.file].path, kept.offset, kept.length)
        if all(image.locate(span) is None for image in images):
            raise refuse("LF803", undo.file.path, f"bytes of {kept.file!r} at {kept.offset}", "bytes of its tensors")
    restored = [restore_pieces(image, names, undo) for image in images]
    place = Place(output, model.folder_mark, model, restored, work.force, work.durable)
    write_copies(place, receipt, [*model.files, undo.file])
