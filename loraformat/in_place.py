"""Merging into the base's own files, and taking it back.

Before anything is overwritten, the bytes that will be are written to a journal beside the model; the disk has it when
the first of them changes. The journal goes when the merge is complete, or becomes the undo file. Where one is found, a
merge was killed, and the model is neither base nor merged until it has been rolled back.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loraformat.accounting import finish_receipt
from loraformat.apply import Work
from loraformat.bases import BaseModel
from loraformat.engine import Assignment, carry_out
from loraformat.errors import refuse
from loraformat.files import copy_range
from loraformat.images import Copy, FileImage
from loraformat.output_forms import Order, list_touched
from loraformat.outputs import PendingOutput, output_errors, sync_folder
from loraformat.receipt import Receipt
from loraformat.side_receipt import name_side_receipt
from loraformat.sinks import FileSink, PatchSink
from loraformat.spans import InputFile
from loraformat.undo import Undo, describe_undo, name_journal, name_undo, open_undo


def check_no_journal(model: Path) -> None:
    """Refuse a model that a killed merge in place has left half done (LF621)."""
    journal = name_journal(model)
    if journal.is_file():
        raise refuse("LF621", model, f"the journal {journal.name} of a merge that was not completed")


def merge_in_place(base: BaseModel, order: Order, work: Work, *, keep_undo: bool) -> Receipt:
    """Merge into the base's own files.

    Args:
        base: the opened base.
        order: the plan, whose output is the base's path, and the adapters.
        work: how to do it.
        keep_undo: whether to keep the overwritten bytes beside the model.

    Raises:
        LoraformatError: LF620 sizes or forms would change, LF904 a file with several names; whatever the numbers say
            against the merge. The model is what it was before then.
    """
    plan = order.plan
    if plan.rewritten:
        raise refuse("LF620", base.path, "changes of sizes or number forms", "a merge that only changes numbers")
    images = [FileImage(file.path, [Copy(file, 0, file.size_bytes)]) for file in base.files]
    touched = {span.path for span in list_touched(plan, base)}
    _check_names(path for path in touched)
    undo = _write_journal(base, order, images)
    try:
        with _open_for_patches(images, touched) as sinks:
            assignment = Assignment(plan, base, order.adapters, images, sinks)
            (sums,) = carry_out([assignment], work.effort)
            receipt = finish_receipt(plan, base, sums, work.min_retained, work.warn_retained)
            _finish(base, order, images, sinks)
        _write_receipt(base.path, receipt)
    except BaseException:
        restore_in_place(base, undo)
        name_journal(base.path).unlink()
        raise
    if keep_undo:
        os.replace(name_journal(base.path), name_undo(base.path))
    else:
        name_journal(base.path).unlink()
    return receipt


def restore_in_place(base: BaseModel, undo: Undo) -> None:
    """Write the kept bytes back to where they stood; doing it twice is doing it once."""
    root = base.path if base.path.is_dir() else base.path.parent
    files = {os.path.relpath(file.path, root): file for file in base.files}
    for kept in undo.spans:
        if kept.file not in files or kept.offset + kept.kept.span.length > files[kept.file].size_bytes:
            raise refuse("LF803", undo.file.path, f"bytes of {kept.file!r} at {kept.offset}", "a file of the model")
    images = [FileImage(file.path, [Copy(file, 0, file.size_bytes)]) for file in files.values()]
    touched = {files[kept.file].path for kept in undo.spans}
    spans = {name: [kept for kept in undo.spans if kept.file == name] for name in files}
    with _open_for_patches(images, touched) as sinks:
        for name, image, sink in zip(files, images, sinks, strict=True):
            if sink is None:
                continue
            for kept in spans[name]:
                with output_errors(image.path):
                    span = kept.kept.span
                    copy_range(undo.file.descriptor, span.offset, sink.descriptor, kept.offset, span.length)
            _mend(base, image, sink.descriptor)
    name_side_receipt(base.path).unlink(missing_ok=True)


def roll_back(base: BaseModel) -> bool:
    """Restore a model from the journal of a killed merge in place; say whether there was one."""
    journal = name_journal(base.path)
    if not journal.is_file():
        return False
    restore_in_place(base, open_undo(journal))
    journal.unlink()
    return True


def _check_names(paths: Iterator[Path]) -> None:
    """Refuse files with several names: the others would change with them."""
    for path in paths:
        count = os.stat(path).st_nlink
        if count > 1:
            raise refuse("LF904", path, f"{count} names of one file", "one", "Merge into a copy: leave out --in-place.")


def _write_journal(base: BaseModel, order: Order, images: Sequence[FileImage]) -> Undo:
    """Write down what will be overwritten, and return it once the disk has it."""
    check_no_journal(base.path)
    journal = name_journal(base.path)
    root = base.path if base.path.is_dir() else base.path.parent
    image = describe_undo(journal, root, images, order.plan, base)
    with PendingOutput([journal], force=False, durable=True) as pending:
        sink = FileSink(pending.descriptors[0], journal)
        sink.reserve(image.size_bytes)
        for offset, piece in image.placed():
            if isinstance(piece, Copy):
                sink.copy(piece, offset)
            else:
                sink.write(getattr(piece, "data", b""), offset)
        pending.commit()
    return open_undo(journal)


@contextmanager
def _open_for_patches(images: Sequence[FileImage], touched: set[Path]) -> Iterator[list[PatchSink | None]]:
    """Open the files that change for writing; the disk has what was written when this ends."""
    sinks: list[PatchSink | None] = []
    try:
        for image in images:
            sink = None
            if image.path in touched:
                with output_errors(image.path):
                    sink = PatchSink(os.open(image.path, os.O_RDWR | os.O_CLOEXEC), image.path)
            sinks.append(sink)
        yield sinks
        for sink in sinks:
            if sink is not None:
                os.fsync(sink.descriptor)
    finally:
        for sink in sinks:
            if sink is not None:
                os.close(sink.descriptor)


def _finish(base: BaseModel, order: Order, images: Sequence[FileImage], sinks: Sequence[PatchSink | None]) -> None:
    for item in order.adapters:
        for factor in item.adapter.factors():
            if isinstance(file := getattr(factor, "file", None), InputFile):
                file.check_unchanged()
    for image, sink in zip(images, sinks, strict=True):
        if sink is not None:
            _mend(base, image, sink.descriptor)


def _mend(base: BaseModel, image: FileImage, descriptor: int) -> None:
    """Mend checksums of all tensors of a file; few bytes for the container, and the spans need not be known."""
    spans = [tensor.span for tensor in base.list_tensors() if tensor.is_contiguous and tensor.span.path == image.path]
    with output_errors(image.path):
        base.finish_output(image, descriptor, spans)


def _write_receipt(model: Path, receipt: Receipt) -> None:
    path = name_side_receipt(model)
    with PendingOutput([path], force=True, durable=True) as pending:
        FileSink(pending.descriptors[0], path).write(receipt.embedded_text().encode() + b"\n", 0)
        pending.commit()
    sync_folder(path.parent)
