"""From plans to merged models: open the outputs, have all carried out, and move them into place when they are whole."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loraformat.accounting import draft_receipt, finish_receipt
from loraformat.bases import BaseModel
from loraformat.engine import Assignment, Effort, carry_out
from loraformat.files import write_at
from loraformat.images import Blank, FileImage
from loraformat.job_log import FileJobLog
from loraformat.output_folders import PendingFolder, check_output_folder
from loraformat.output_forms import Order, choose_form, describe_output, list_inputs, list_touched
from loraformat.outputs import PendingOutput, check_output, name_log, output_errors
from loraformat.plan import Plan, WeightedAdapter
from loraformat.receipt import Receipt
from loraformat.sinks import FileSink


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
    """

    effort: Effort
    min_retained: float
    warn_retained: float
    force: bool = False
    durable: bool = False
    resume: bool = False
    link: bool = False


@dataclass(frozen=True, slots=True)
class _Delivery:
    """An order with its outputs open."""

    order: Order
    assignment: Assignment
    pending: PendingOutput | PendingFolder
    log: FileJobLog | None


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
            finish_receipt(each.order.plan, base, found, work.min_retained, work.warn_retained)
            for each, found in zip(deliveries, sums, strict=True)
        ]
        for each, receipt in zip(deliveries, receipts, strict=True):
            _finish(base, each, receipt)
        for file in list_inputs(base, orders):
            file.check_unchanged()
        for each in deliveries:
            each.pending.commit()
            if each.log is not None:
                each.log.discard()
    return receipts


def _finish(base: BaseModel, delivery: _Delivery, receipt: Receipt) -> None:
    """Put the receipt into its blank, and mend what depends on the numbers."""
    images, descriptors = delivery.assignment.images, delivery.pending.descriptors
    plan = delivery.order.plan
    if not plan.rewritten:
        touched = list_touched(plan, base)
        for image, descriptor in zip(images, descriptors, strict=True):
            if descriptor >= 0:
                with output_errors(image.path):
                    base.finish_output(image, descriptor, touched)
    _fill_blank(images[-1], descriptors[-1], choose_form(plan, base).encode_receipt(receipt.embedded_text()))


@contextmanager
def _open(base: BaseModel, order: Order, work: Work) -> Iterator[_Delivery]:
    """Open the outputs of an order, once it is known that nothing is destroyed by them."""
    plan = order.plan
    draft = draft_receipt(plan, base)
    images = describe_output(order, base, draft.room_bytes)
    with ExitStack() as stack:
        pending = stack.enter_context(_open_outputs(plan, base, images, work))
        log = None
        if work.resume:
            path = name_log(plan.output.absolute(), plan.sha256[:16])
            log = stack.enter_context(FileJobLog(path, plan, list_inputs(base, [order])))
        sinks = [
            FileSink(descriptor, image.path) if descriptor >= 0 else None
            for descriptor, image in zip(pending.descriptors, images, strict=True)
        ]
        yield _Delivery(order, Assignment(plan, base, order.adapters, images, sinks, log), pending, log)


@contextmanager
def _open_outputs(
    plan: Plan, base: BaseModel, images: Sequence[FileImage], work: Work
) -> Iterator[PendingOutput | PendingFolder]:
    output, resume = plan.output, plan.sha256[:16] if work.resume else None
    mark = choose_form(plan, base).folder_mark
    if mark:
        check_output_folder(output, base.path, mark, force=work.force)
        names = [image.path.relative_to(output) for image in images]
        links = _list_links(plan, base, images) if work.link else {}
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
