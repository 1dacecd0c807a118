"""From plans to merged models: open the outputs, have all carried out, and move them into place when they are whole."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from loraformat.apply.accounting import draft_receipt, finish_receipt
from loraformat.apply.job_log import FileJobLog, describe_work, read_log
from loraformat.apply.output_folders import PendingFolder
from loraformat.apply.placing import Place, check_places, list_links, open_place
from loraformat.apply.undo import describe_undo, name_undo
from loraformat.bases import BaseModel
from loraformat.engine import Effort, carry_out
from loraformat.engine.jobs import Assignment
from loraformat.engine.sinks import FileSink, put_image
from loraformat.errors import refuse
from loraformat.files import write_at
from loraformat.images import FileImage
from loraformat.output_forms import Order, choose_form, describe_output, list_inputs, list_touched
from loraformat.outputs import FOLDER_UNDO, PendingOutput, name_log, output_errors
from loraformat.plan import Plan
from loraformat.receipt import Receipt
from loraformat.spans import InputFile


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


def apply_order(base: BaseModel, order: Order, work: Work) -> Receipt:
    """Write one merged model and return its receipt; see `apply_plans`."""
    (receipt,) = apply_plans(base, [order], work)
    return receipt


def apply_plans(base: BaseModel, orders: Sequence[Order], work: Work) -> list[Receipt]:
    """Write merged models of one base and return their receipts.

    The base is read from its disk once for all of them: what the models take from one place of it they take one after
    another, so that the system still has the bytes.

    Args:
        base: the opened base, from which all plans were made.
        orders: what to write.
        work: how to do it.

    Raises:
        LoraformatError: nothing of any output remains then, but for what a resumed run can take up.
    """
    places = [_choose_place(base, order, work) for order in orders]
    check_places(places)
    with ExitStack() as stack:
        deliveries = [
            stack.enter_context(_open(base, order, place)) for order, place in zip(orders, places, strict=True)
        ]
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
    return receipts


def _choose_place(base: BaseModel, order: Order, work: Work) -> Place:
    """Return where the output of an order goes, and its files."""
    plan = order.plan
    images = describe_output(order, base, draft_receipt(plan, base).room_bytes)
    if work.keep_undo:
        images = [_describe_undo(plan, base, images), *images]
    mark = choose_form(plan, base).folder_mark
    touched = {weight.file for weight in plan.weights}
    links = list_links(base, plan.output, images, touched) if work.link else {}
    token = plan.sha256[:16] if work.resume else None
    return Place(plan.output, mark, base, images, work.force, work.durable, token, links)


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
def _open(base: BaseModel, order: Order, place: Place) -> Iterator[_Delivery]:
    """Open the outputs of an order."""
    plan, images = order.plan, place.images
    with ExitStack() as stack:
        log = None
        if place.resume is not None:  # Before any part is made: what an earlier log says is of parts that are there.
            path = name_log(plan.output.absolute(), place.resume)
            inputs = [*list_inputs(base, [order]), *(file for image in images for file in image.sources())]
            earlier = read_log(path, plan, inputs) if place.has_all_parts() else {}
            log = stack.enter_context(FileJobLog(path, describe_work(plan, inputs), earlier))
        pending = stack.enter_context(open_place(place))
        sinks = [
            FileSink(descriptor, image.path) if descriptor >= 0 else None
            for descriptor, image in zip(pending.descriptors, images, strict=True)
        ]
        _, room_bytes = images[-1].find_blank()
        assignment = Assignment(plan, base, order.adapters, images, sinks, log, order.checkpoint)
        yield _Delivery(order, assignment, pending, log, room_bytes)


def _describe_undo(plan: Plan, base: BaseModel, images: Sequence[FileImage]) -> FileImage:
    if plan.rewritten or plan.changes_graph:
        found = "an output that is written anew" if plan.rewritten else "an output with more than the base has"
        raise refuse("LF622", plan.output, found, "a copy of the base for --keep-undo")
    output = plan.output.absolute()
    is_folder = bool(choose_form(plan, base).folder_mark)
    path = output / FOLDER_UNDO if is_folder else name_undo(output)
    return describe_undo(path, output if is_folder else output.parent, images, plan, base)


def write_copies(place: Place, receipt: bytes, inputs: Sequence[InputFile]) -> None:
    """Write images that are copies through and through, a receipt in the last one's blank.

    Args:
        place: where they go.
        receipt: what goes into the blank; empty where there is none.
        inputs: the files that they copy from.
    """
    check_places([place])
    with open_place(place) as pending:
        for image, descriptor in zip(place.images, pending.descriptors, strict=True):
            put_image(FileSink(descriptor, image.path), image)
        if receipt:
            _fill_blank(place.images[-1], pending.descriptors[-1], receipt)
        for file in inputs:
            file.check_unchanged()
        pending.commit()


def _fill_blank(image: FileImage, descriptor: int, data: bytes) -> None:
    """Write the receipt into its blank."""
    offset, padded = image.fill_blank(data)
    with output_errors(image.path):
        write_at(descriptor, padded, offset)
