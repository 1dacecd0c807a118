"""Merging into the base's own files, and taking it back.

Before anything is overwritten, the bytes that will be are written to a journal beside the model; the disk has it when
the first of them changes. The journal goes when the merge is complete, or becomes the undo file. Where one is found, a
merge was killed, and the model is neither base nor merged until it has been rolled back.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from loraformat.apply import Work
from loraformat.apply.accounting import draft_receipt, finish_receipt
from loraformat.apply.disk_space import check_space
from loraformat.apply.side_receipt import name_side_receipt
from loraformat.apply.undo import Undo, check_undo, describe_undo, name_journal, name_undo, open_undo, record_in_place
from loraformat.bases import BaseModel, SharedBase
from loraformat.engine import carry_out
from loraformat.engine.jobs import Assignment
from loraformat.engine.sinks import FileSink, PatchSink, put_image
from loraformat.errors import refuse
from loraformat.files import copy_range, name_from
from loraformat.images import Copy, FileImage
from loraformat.output_forms import Order, list_touched
from loraformat.outputs import PendingOutput, output_errors
from loraformat.plan import Plan
from loraformat.receipt import Receipt
from loraformat.spans import InputFile, read_small
from loraformat.system import CHANGING, sync_folder

_BESIDE: Final = (
    "A model that has more than its base is a new file. Leave out --in-place: -o writes a copy, and with "
    "--external-data share a small model beside the base, without a second copy of the weights that stay."
)
_LISTED: Final = 8
_Sinks = Sequence[PatchSink | None]


def check_no_journal(model: Path) -> None:
    """Refuse a model that a killed merge in place has left half done (LF621)."""
    journal = name_journal(model)
    if journal.is_file():
        raise refuse("LF621", model, f"the journal {journal.name} of a merge that was not completed")


def merge_in_place(base: BaseModel, order: Order, work: Work) -> Receipt:
    """Merge into the base's own files.

    Args:
        base: the opened base.
        order: the plan, whose output is the base's path, and the adapters.
        work: how to do it.

    Raises:
        LoraformatError: LF601 bytes are kept of an earlier merge, LF620 sizes or forms would change, LF625 a link,
            LF904 a file with several names; whatever the numbers say against the merge. The model is what it was
            before then.
    """
    plan = order.plan
    if plan.rewritten:
        raise refuse("LF620", base.path, "changes of sizes or number forms", "a merge that only changes numbers")
    if plan.floats or plan.ranges:
        found = "codes that become floats" if plan.floats else "ranges of activations in other forms"
        raise refuse("LF620", base.path, found, "a merge that only changes numbers", _BESIDE)
    if plan.biases:
        names = ", ".join(repr(each.name) for each in plan.biases)
        found = f"biases more: {names}, and what reads them"
        raise refuse("LF620", base.path, found, "a merge that only changes numbers", _BESIDE)
    if plan.copies:
        names = ", ".join(repr(each.name) for each in plan.copies)
        found = f"tensors more: {names}, copies of what others read too"
        raise refuse("LF620", base.path, found, "a merge that only changes numbers", _BESIDE)
    if work.keep_undo and name_undo(base.path).exists() and not work.force:
        mend = "Undo that merge first, move the file away, or give it up with --force."
        raise refuse("LF601", name_undo(base.path), "what an earlier merge has overwritten", "no such file", mend)
    images = [_describe_itself(file) for file in base.files]
    touched = {span.path for span in list_touched(plan, base)}
    _check_names(touched)
    _check_neighbours(order.plan)
    _check_sharers(base, touched)
    with _open_for_patches(images, touched) as sinks:
        _write_journal(base, order, images)
        try:
            for file in base.files:  # From here on no other merge in place begins, but one may have ended meanwhile.
                file.check_unchanged()
            receipt = _rewrite(base, order, images, sinks, work)
        except BaseException:
            roll_back(base.path, name_files(base))
            raise
    if work.keep_undo:
        os.replace(name_journal(base.path), name_undo(base.path))
    else:
        name_journal(base.path).unlink()
    return receipt


def _check_neighbours(plan: Plan) -> None:
    """Refuse a change that needs base values of a weight that may be overwritten by then (LF237)."""
    needy = [weight.name for weight in plan.weights if any(change.beside for change in weight.changes)]
    if needy:
        found = f"{needy[0]!r}, computed from the base's values of another weight as well"
        raise refuse("LF237", plan.output, found, "changes of each weight by itself")


def _check_sharers(base: BaseModel, touched: Set[Path]) -> None:
    """Refuse to overwrite what other models read (LF638)."""
    others = base.find_sharers(touched) if isinstance(base, SharedBase) else []
    if others:
        names = ", ".join(each.name for each in others[:_LISTED])
        raise refuse("LF638", base.path, f"data files that {names} has numbers in as well", "files of its own")


def _rewrite(base: BaseModel, order: Order, images: Sequence[FileImage], sinks: _Sinks, work: Work) -> Receipt:
    """Rewrite the weights, the checksums that follow from them, and the receipt; the disk has all when this ends."""
    plan = order.plan
    assignment = Assignment(plan, base, order.adapters, images, sinks, checkpoint=order.checkpoint)
    (sums,) = carry_out([assignment], work.effort)
    room_bytes = draft_receipt(plan, base).room_bytes
    receipt = finish_receipt(plan, base, sums, work.min_retained, work.warn_retained, room_bytes)
    for item in order.adapters:
        for factor in item.adapter.factors():
            if isinstance(file := getattr(factor, "file", None), InputFile):
                file.check_unchanged()
    touched = list_touched(plan, base)
    for image, sink in zip(images, sinks, strict=True):
        if sink is not None:
            with output_errors(image.path):
                base.finish_output(image, sink.descriptor, touched, work.effort.jobs)
    _sync(sinks)
    _write_beside(name_side_receipt(base.path), receipt.embedded_text().encode().ljust(receipt.room_bytes) + b"\n")
    return receipt


def restore_in_place(model: Path, files: Mapping[str, InputFile], undo: Undo) -> None:
    """Write the kept bytes back to where they stood; doing it twice is doing it once.

    Args:
        model: path of the model.
        files: those of its files that a merge writes to, as `name_files` gives them: the file with the kept bytes may
            be a stranger's, and names what it likes.
        undo: what was kept.
    """
    check_undo(undo, files)
    touched = {kept.file: files[kept.file] for kept in undo.spans}
    images = [_describe_itself(file) for file in touched.values()]
    with _open_for_patches(images, {file.path for file in touched.values()}) as sinks:
        for name, sink in zip(touched, sinks, strict=True):
            for kept in undo.spans:
                if sink is not None and kept.file == name:
                    with output_errors(sink.path):
                        span = kept.kept.span
                        copy_range(undo.file.descriptor, span.offset, sink.descriptor, kept.offset, span.length)
        _sync(sinks)
    beside = name_side_receipt(model)
    if undo.receipt is not None:
        _write_beside(beside, undo.receipt)
    else:
        beside.unlink(missing_ok=True)


def roll_back(model: Path, files: Mapping[str, InputFile]) -> int:
    """Restore a model from the journal of a merge in place that was not completed; return the bytes written back."""
    journal = name_journal(model)
    undo = open_undo(journal)
    restore_in_place(model, files, undo)
    undo.file.close()
    journal.unlink()
    return undo.kept_bytes


def name_files(model: BaseModel) -> dict[str, InputFile]:
    """Return those of a model's files that numbers lie in, by the names that undo files give them."""
    root, holding = find_root(model.path), {tensor.span.path for tensor in model.list_tensors()}
    return {name_from(file.path, root): file for file in model.files if file.path in holding}


def find_root(model: Path) -> Path:
    """Return the folder that an undo file names the model's files from."""
    return model if model.is_dir() else model.parent


def _describe_itself(file: InputFile) -> FileImage:
    return FileImage(file.path, [Copy(file, 0, file.size_bytes)])


def _check_names(paths: Iterable[Path]) -> None:
    """Refuse links and files with several names: what others read would change with them."""
    for path in paths:
        mend = "Merge into a copy: leave out --in-place."
        if path.is_symlink():
            raise refuse("LF625", path, f"a link to {os.path.realpath(path)}", "the file itself")
        count = os.stat(path).st_nlink
        if count > 1:
            raise refuse("LF904", path, f"{count} names of one file", "one", mend)


def _write_journal(base: BaseModel, order: Order, images: Sequence[FileImage]) -> None:
    """Write down what will be overwritten; the disk has it when this ends."""
    check_no_journal(base.path)
    journal, beside = name_journal(base.path), name_side_receipt(base.path)
    record = record_in_place(read_small(beside) if beside.is_file() else None)
    image = describe_undo(journal, find_root(base.path), images, order.plan, base, record)
    check_space([(journal, image.size_bytes)])
    with PendingOutput([journal], force=False, durable=True) as pending:
        put_image(FileSink(pending.descriptors[0], journal), image)
        pending.commit()


@contextmanager
def _open_for_patches(images: Sequence[FileImage], touched: set[Path]) -> Iterator[_Sinks]:
    """Open the files that change for writing."""
    sinks: list[PatchSink | None] = []
    try:
        for image in images:
            sink = None
            if image.path in touched:
                with output_errors(image.path):
                    sink = PatchSink(os.open(image.path, CHANGING), image.path)
            sinks.append(sink)
        yield sinks
    finally:
        for sink in sinks:
            if sink is not None:
                os.close(sink.descriptor)


def _sync(sinks: _Sinks) -> None:
    for sink in sinks:
        if sink is not None:
            with output_errors(sink.path):
                os.fsync(sink.descriptor)


def _write_beside(path: Path, data: bytes) -> None:
    with PendingOutput([path], force=True, durable=True) as pending:
        FileSink(pending.descriptors[0], path).write(data, 0)
        pending.commit()
    sync_folder(path.parent)
