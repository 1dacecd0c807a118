"""From plans to merged models: open the outputs, have all carried out, and move them into place when they are whole."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loraformat.accounting import draft_receipt, finish_receipt
from loraformat.bases import BaseModel
from loraformat.engine import Assignment, Effort, carry_out
from loraformat.errors import refuse
from loraformat.files import write_at
from loraformat.images import Blank, Copy, FileImage, Literal
from loraformat.job_log import FileJobLog
from loraformat.output_folders import PendingFolder, check_output_folder
from loraformat.output_forms import Order, choose_form, describe_output, list_inputs, list_touched
from loraformat.outputs import PendingOutput, check_output, name_log, output_errors
from loraformat.plan import Plan, WeightedAdapter
from loraformat.receipt import Receipt
from loraformat.sinks import FileSink
from loraformat.spans import InputFile
from loraformat.undo import FOLDER_UNDO, describe_undo, name_undo


@dataclass(frozen=True, slots=True)
class Work:
    """How to carry out a plan.

    Attributes:
        effort: how much of the machine to take.
        min_retained: refuse when less of a weight's delta survives rounding.
        warn_retained: warn when less of it does.
        force: replace an existing output.
        durable: wait for the disk before the output is moved into place.
        resume: take up what a killed run of the same plan has left, and leave something to take up.
        link: make hard links of files that nothing of is rewritten.
        keep_undo: write a file beside the output with what the merge overwrites.
    """

    effort: Effort
    min_retained: float
    warn_retained: float
    force: bool = False
    durable: bool = False
    resume: bool = False
    link: bool = False
    keep_undo: bool = False


@dataclass(frozen=True, slots=True)
class _Delivery:
    """An order with its outputs open."""

    order: Order
    assignment: Assignment
    pending: PendingOutput | PendingFolder
    log: FileJobLog | None
    room_bytes: int


def apply_plan(plan: Plan, base: BaseModel, adapters: Sequence[WeightedAdapter], work: Work) -> Receipt:
    """Write one merged model and return its receipt; see `apply_plans`."""
    (receipt,) = apply_plans(base, [Order(plan, adapters)], work)
    return receipt


def apply_plans(base: BaseModel, orders: Sequence[Order], work: Work) -> list[Receipt]:
    """Write merged models of one base and return their receipts; the base is read once for all of them.

    Args:
        base: the opened base, from which all plans were made.
        orders: what to write.
        work: how to do it.

    Raises:
        LoraformatError: nothing of any output remains then, but for what a resumed run can take up.
    """
    with ExitStack() as stack:
        deliveries = [stack.enter_context(_open(base, order, work)) for order in orders]
        sums = carry_out([each.assignment for each in deliveries], work.effort)
        receipts = [
            finish_receipt(each.order.plan, base, found, work.min_retained, work.warn_retained, each.room_bytes)
            for each, found in zip(deliveries, sums, strict=True)
        ]
        for each, receipt in zip(deliveries, receipts, strict=True):
            _finish(base, each, receipt, work.effort.jobs)
        for file in list_inputs(base, orders):
            file.check_unchanged()
        for each in deliveries:
            each.pending.commit()
            if each.log is not None:
                each.log.discard()
    return receipts


def _finish(base: BaseModel, delivery: _Delivery, receipt: Receipt, jobs: int) -> None:
    """Put the receipt into its blank, and mend what depends on the numbers."""
    images, descriptors = delivery.assignment.images, delivery.pending.descriptors
    plan = delivery.order.plan
    if not plan.rewritten:
        touched = list_touched(plan, base)
        for image, descriptor in zip(images, descriptors, strict=True):
            if descriptor >= 0:
                with output_errors(image.path):
                    base.finish_output(image, descriptor, touched, jobs)
    _fill_blank(images[-1], descriptors[-1], choose_form(plan, base).encode_receipt(receipt.embedded_text()))


@contextmanager
def _open(base: BaseModel, order: Order, work: Work) -> Iterator[_Delivery]:
    """Open the outputs of an order, once it is known that nothing is destroyed by them."""
    plan = order.plan
    draft = draft_receipt(plan, base)
    images = describe_output(order, base, draft.room_bytes)
    if work.keep_undo:
        images = [_describe_undo(plan, base, images), *images]
    with ExitStack() as stack:
        mark = choose_form(plan, base).folder_mark
        links = _list_links(plan, base, images) if work.link and mark else {}
        token = plan.sha256[:16] if work.resume else None
        pending = stack.enter_context(_open_outputs(plan.output, mark, base, images, links, token, work))
        log = None
        if token is not None:
            path = name_log(plan.output.absolute(), token)
            log = stack.enter_context(FileJobLog(path, plan, list_inputs(base, [order])))
        sinks = [
            FileSink(descriptor, image.path) if descriptor >= 0 else None
            for descriptor, image in zip(pending.descriptors, images, strict=True)
        ]
        yield _Delivery(
            order, Assignment(plan, base, order.adapters, images, sinks, log), pending, log, draft.room_bytes
        )


@contextmanager
def _open_outputs(
    output: Path,
    mark: str,
    base: BaseModel,
    images: Sequence[FileImage],
    links: Mapping[Path, Path],
    resume: str | None,
    work: Work,
) -> Iterator[PendingOutput | PendingFolder]:
    """Open the files of an output, in a folder of their own where that has a `mark`."""
    if mark:
        check_output_folder(output, base.path, mark, force=work.force)
        names = [image.path.relative_to(output) for image in images]
        with PendingFolder(output, names, force=work.force, durable=work.durable, resume=resume, links=links) as folder:
            yield folder
        return
    inputs = [file.path for file in base.files]
    check_output(output, inputs, force=work.force)
    with _data_folders(images):
        for image in images[:-1]:
            check_output(image.path, inputs, force=work.force)
        stale = _list_stale(base, output) if work.force else []
        paths = [image.path for image in images]
        with PendingOutput(paths, force=work.force, durable=work.durable, resume=resume) as files:
            yield files
    for path in set(stale) - {image.path for image in images}:
        with suppress(OSError):
            path.unlink()


def _describe_undo(plan: Plan, base: BaseModel, images: Sequence[FileImage]) -> FileImage:
    if plan.rewritten:
        raise refuse("LF622", plan.output, "an output that is written anew", "a copy of the base for --keep-undo")
    output = plan.output.absolute()
    is_folder = bool(choose_form(plan, base).folder_mark)
    path = output / FOLDER_UNDO if is_folder else name_undo(output)
    return describe_undo(path, output if is_folder else output.parent, images, plan, base)


def write_copies(
    base: BaseModel,
    output: Path,
    images: Sequence[FileImage],
    receipt: bytes,
    work: Work,
    inputs: Sequence[InputFile],
) -> None:
    """Write images that are copies through and through, a receipt in the last one's blank.

    Args:
        base: the opened base that they are copies of.
        output: the file or folder.
        images: the files.
        receipt: what goes into the blank.
        work: how to do it.
        inputs: the other files that they copy from.
    """
    with _open_outputs(output, base.folder_mark, base, images, {}, None, work) as pending:
        for image, descriptor in zip(images, pending.descriptors, strict=True):
            sink = FileSink(descriptor, image.path)
            sink.reserve(image.size_bytes)
            for offset, piece in image.placed():
                if isinstance(piece, Copy):
                    sink.copy(piece, offset)
                elif isinstance(piece, Literal):
                    sink.write(piece.data, offset)
            with output_errors(image.path):
                base.finish_output(image, descriptor, [tensor.extent for tensor in base.list_tensors()])
        _fill_blank(images[-1], pending.descriptors[-1], receipt)
        for file in (*base.files, *inputs):
            file.check_unchanged()
        pending.commit()


def _list_links(plan: Plan, base: BaseModel, images: Sequence[FileImage]) -> dict[Path, Path]:
    """Return the output files that are files of the base as they are, and which."""
    touched = {weight.file for weight in plan.weights}
    whole = ((image, image.whole_copy()) for image in images)
    return {
        image.path.relative_to(plan.output): file.path
        for image, file in whole
        if file is not None and file.path.name not in touched
    }


@contextmanager
def _data_folders(images: Sequence[FileImage]) -> Iterator[None]:
    """Make the sub-folders that data files stand in; when the merge fails they go again."""
    made: list[Path] = []
    try:
        for image in images[:-1]:
            missing = [folder for folder in image.path.parents if not folder.exists()]
            for folder in reversed(missing):
                with output_errors(image.path):
                    folder.mkdir()
                made.append(folder)
        yield
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        raise


def _list_stale(base: BaseModel, output: Path) -> list[Path]:
    """Return what only the model at `output` needs, never a file of the base: two models may share their data."""
    own = {file.identity for file in base.files}
    states = [(path, path.stat()) for path in base.list_stale(output)]
    return [path for path, state in states if (state.st_dev, state.st_ino) not in own]


def _fill_blank(image: FileImage, descriptor: int, data: bytes) -> None:
    """Write the receipt into its blank and pad the rest with spaces."""
    offset, blank = next((offset, piece) for offset, piece in image.placed() if isinstance(piece, Blank))
    if len(data) > blank.length:
        raise ValueError("the receipt outgrew its draft")
    with output_errors(image.path):
        write_at(descriptor, data.ljust(blank.length), offset)
