"""Carry out plans: every touched tile is computed, every other byte copied, each into the sink of its output file.

Spans are independent, so worker threads take them in any order; the bytes that come out are the same for any number of
workers, because tile boundaries are part of the plan and every tile is computed alone. What a sink does with bytes
(write them, compare them) is its own affair.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, Protocol

from loraformat.adapter import Target
from loraformat.bases import BaseModel
from loraformat.coded_work import CodedWork, Place, requantise
from loraformat.errors import refuse
from loraformat.float_work import PANEL_BYTES, dequantise
from loraformat.images import Copy, FileImage, Literal
from loraformat.locating import index_tensors, list_copies, locate_coded, locate_weight
from loraformat.output_forms import index_weights
from loraformat.plan import Plan, PlannedWeight, WeightedAdapter
from loraformat.references import Floats
from loraformat.sinks import Sink, put_piece
from loraformat.tile_sums import TileSums
from loraformat.tiles import TileBuffers, merge_rows
from loraformat.weight_work import WeightWork, count_held

_RUN_BYTES: Final = 8 << 20
_BUFFERS_PER_WORKER: Final = 5
_CODED_BUFFERS: Final = 11
"""A quantised weight needs some for scales and zero points beside each number, for codes before they are bytes, and for
float numbers beside what codes stand for."""
_FACTOR_COPIES: Final = 3
_PANELS: Final = 2
"""Floats that stand turned in the output are held both ways."""


class Progress(Protocol):
    """Told how far the work is, in bytes of output, from any thread."""

    def start(self, total_bytes: int) -> None:
        """Be told the total."""
        ...

    def advance(self, done_bytes: int) -> None:
        """Be told that so many more bytes are done."""
        ...


class JobLog(Protocol):
    """Knows which jobs an earlier run did, and is told of those that this one has done; from any thread."""

    def recall(self, key: str) -> TileSums | None:
        """Return the sums of a job that is done, None for one that is not."""
        ...

    def note(self, key: str, sums: TileSums) -> None:
        """Be told that the bytes of a job are in their sink."""
        ...


@dataclass(frozen=True, slots=True)
class Effort:
    """How much of the machine to take.

    Attributes:
        jobs: worker threads.
        max_memory_bytes: cap on tiles and factors in flight.
        progress: told how far it is.
    """

    jobs: int
    max_memory_bytes: int
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    """One plan to carry out.

    Attributes:
        plan: what to do.
        base: the opened base.
        adapters: the adapters, in the plan's order.
        images: the output files.
        sinks: where their bytes go, None for a file that needs nothing.
        log: which jobs are done already.
        checkpoint: the torch checkpoint of the base, where the plan takes numbers from it.
    """

    plan: Plan
    base: BaseModel
    adapters: Sequence[WeightedAdapter]
    images: Sequence[FileImage]
    sinks: Sequence[Sink | None]
    log: JobLog | None = None
    checkpoint: BaseModel | None = None


class _Job(NamedTuple):
    """Something to do: where its input stands, for the order; what it is called; which weight its sums belong to."""

    order: tuple[str, int]
    key: str
    weight: int
    output_bytes: int
    carry_out: Callable[[], TileSums]


def carry_out(assignments: Sequence[Assignment], effort: Effort) -> list[list[TileSums]]:
    """Do all jobs and return, for each assignment, the sums of each weight in the plan's order.

    Jobs are taken in the order of their input, so that several assignments on one base read it once.

    Raises:
        LoraformatError: LF607 when the memory budget is too small; whatever a job raises.
    """
    from threadpoolctl import threadpool_limits

    for assignment in assignments:
        for image, sink in zip(assignment.images, assignment.sinks, strict=True):
            if sink is not None:
                sink.reserve(image.size_bytes)
    workers = _fit_memory(assignments, effort)
    buffers, tracker = TileBuffers(), _Tracker(effort.progress)
    works = [_Bench(assignment, buffers) for assignment in assignments]
    jobs = sorted(
        ((job, work.assignment.log, number) for number, work in enumerate(works) for job in work.list_jobs()),
        key=lambda entry: entry[0].order,
    )
    tracker.start(sum(job.output_bytes for job, *_ in jobs))
    with threadpool_limits(limits=1), ThreadPoolExecutor(workers, thread_name_prefix="loraformat") as pool:
        try:
            futures = [pool.submit(_do, job, log, tracker) for job, log, _ in jobs]
            _await(futures)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    sums = [[TileSums()] * len(each.plan.weights) for each in assignments]
    for (job, _, number), future in zip(jobs, futures, strict=True):
        if job.weight >= 0:
            sums[number][job.weight] += future.result()
    return sums


def _do(job: _Job, log: JobLog | None, tracker: "_Tracker") -> TileSums:
    sums = log.recall(job.key) if log is not None else None
    if sums is None:
        sums = job.carry_out()
        if log is not None:
            log.note(job.key, sums)
    tracker.advance(job.output_bytes)
    return sums


class _Tracker:
    """Tells the progress, one thread at a time."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()

    def start(self, total_bytes: int) -> None:
        if self._progress:
            self._progress.start(total_bytes)

    def advance(self, done_bytes: int) -> None:
        if self._progress:
            with self._lock:
                self._progress.advance(done_bytes)


class _Bench:
    """The jobs of one assignment, and what they share."""

    def __init__(self, assignment: Assignment, buffers: TileBuffers) -> None:
        self.assignment = assignment
        self._buffers = buffers
        self._tensors = index_tensors(assignment.base)
        self._weights = index_weights(assignment.base)
        self._targets = index_targets(assignment.adapters)
        self._floats = open_floats(assignment.plan, assignment.checkpoint)

    def list_jobs(self) -> Iterator[_Job]:
        for number, weight in enumerate(self.assignment.plan.weights):
            yield from self._list_runs(number, weight)
        sinks = self.assignment.sinks
        for image, piece, offset in list_copies(
            self.assignment.images, self.assignment.plan, self._tensors, self._weights
        ):
            sink = sinks[image]
            if sink is not None:
                yield self._list_copy(image, sink, piece, offset)

    def _list_runs(self, number: int, weight: PlannedWeight) -> Iterator[_Job]:
        targets = [self._targets[change.adapter][change.target] for change in weight.changes]
        if weight.is_coded:
            coded = CodedWork(weight, self._weights[weight.key], targets, self._floats)
            yield self._list_coded(number, weight, coded)
            return
        tensor = self._tensors.get(weight.key)
        work = WeightWork(weight, tensor, targets, self._tensors)
        image, offset = locate_weight(self.assignment.images, weight, tensor)
        sink = self.assignment.sinks[image]
        assert sink is not None, "a file with a touched weight is written"
        runs = list(_split_runs(weight, work.written_form.itemsize))
        work.runs_left = len(runs)
        row_bytes = weight.matrix[1] * work.written_form.itemsize
        source = (str(tensor.extent.path), tensor.extent.offset) if tensor is not None else ("", 0)
        for run in runs:
            order = (source[0], source[1] + run.start * row_bytes)
            carry = partial(_merge_run, work, self._buffers, run, sink, offset)
            yield _Job(order, f"{image}@{offset}:{run.start}", number, len(run) * row_bytes, carry)

    def _list_coded(self, number: int, weight: PlannedWeight, work: CodedWork) -> _Job:
        """Return the one job of a quantised weight, whose scales hang on all its numbers."""
        if weight.is_dequantised:
            return self._list_dequantised(number, weight, work)
        places: dict[str, Place] = {}
        found = locate_coded(self.assignment.images, weight, self._weights[weight.key])
        for role, (image, offset) in found.items():
            sink = self.assignment.sinks[image]
            assert sink is not None, "a file with a touched weight is written"
            places[role] = Place(sink, offset)
        work.runs_left = 1
        span = self._weights[weight.key].tensor.span
        carry = partial(_merge_coded, work, self._buffers, places)
        copied = f" {weight.name}" if weight.is_copy else ""
        key = f"coded {span.path.name}@{span.offset}{copied}"
        return _Job((str(span.path), span.offset), key, number, weight.nbytes, carry)

    def _list_dequantised(self, number: int, weight: PlannedWeight, work: CodedWork) -> _Job:
        assert weight.new is not None, "asked before"
        source = self._weights[weight.key].tensor
        image, offset = locate_weight(self.assignment.images, weight, source)
        sink = self.assignment.sinks[image]
        assert sink is not None, "a file with a new tensor is written"
        work.runs_left = 1
        carry = partial(_merge_floats, work, self._buffers, Place(sink, offset))
        length = weight.matrix[0] * (weight.matrix[1] - weight.new.padding) * work.float_form.itemsize
        order = (str(source.span.path), source.span.offset)
        return _Job(order, f"{image}@{offset}", number, length, carry)

    def _list_copy(self, image: int, sink: Sink, piece: Copy | Literal, offset: int) -> _Job:
        order = (str(piece.file.path), piece.offset) if isinstance(piece, Copy) else ("", 0)
        return _Job(order, f"{image}@{offset}", -1, piece.length, partial(_copy, sink, piece, offset))


def _merge_run(work: WeightWork, buffers: TileBuffers, run: range, sink: Sink, offset: int) -> TileSums:
    """Merge the stored rows `run`, and let go of what they needed if they were the last."""
    sums = merge_rows(work, buffers, run, sink, offset)
    work.finish_run()
    return sums


def _merge_coded(work: CodedWork, buffers: TileBuffers, places: Mapping[str, Place]) -> TileSums:
    sums = requantise(work, buffers, places)
    work.finish_run()
    return sums


def _merge_floats(work: CodedWork, buffers: TileBuffers, place: Place) -> TileSums:
    sums = dequantise(work, buffers, place)
    work.finish_run()
    return sums


def _copy(sink: Sink, piece: Copy | Literal, offset: int) -> TileSums:
    put_piece(sink, piece, offset)
    return TileSums()


def _fit_memory(assignments: Sequence[Assignment], effort: Effort) -> int:
    """Return how many workers the memory budget allows, at most as many as asked for."""
    each = max((_need_bytes(assignment) for assignment in assignments), default=0)
    for jobs in range(effort.jobs, 0, -1):
        need = jobs * each * len(assignments)
        if need <= effort.max_memory_bytes:
            return jobs
    raise refuse("LF607", "--max-memory", f"a budget of {effort.max_memory_bytes} bytes", f"at least {need} bytes")


def _need_bytes(assignment: Assignment) -> int:
    """Return the bytes that one worker holds at most: tiles, and factors with their working copies."""
    targets = index_targets(assignment.adapters)
    most = 0
    for weight in assignment.plan.weights:
        buffers = _CODED_BUFFERS if weight.is_coded else _BUFFERS_PER_WORKER
        widest = 8 if "float64" in (weight.dtype, weight.written_dtype) else 4
        tile = widest * weight.tile_rows * weight.matrix[1]
        changes = ((targets[change.adapter][change.target], change) for change in weight.changes)
        factors = sum(widest * count_held(target, change) for target, change in changes)
        panel = min(PANEL_BYTES, 4 * math.prod(weight.matrix)) if weight.is_dequantised else 0
        most = max(most, buffers * tile + _FACTOR_COPIES * factors + _PANELS * panel)
    return most


def index_targets(adapters: Sequence[WeightedAdapter]) -> list[Mapping[str, Target]]:
    """Return each adapter's targets by name."""
    return [{target.name: target for target in item.adapter.targets} for item in adapters]


def open_floats(plan: Plan, checkpoint: BaseModel | None) -> Floats:
    """Return where a plan's float numbers are, of weights that the base has in a few bits."""
    if checkpoint is None:
        return Floats()
    return Floats(index_weights(checkpoint), bool(plan.options.get("any_rounding")))


def _split_runs(weight: PlannedWeight, itemsize: int) -> Iterator[range]:
    """Yield the rows of one job each: whole tiles, about `_RUN_BYTES`."""
    rows, columns = weight.matrix
    step = weight.tile_rows * max(1, _RUN_BYTES // (weight.tile_rows * columns * itemsize))
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))


def _await(futures: "Sequence[Future[TileSums]]") -> None:
    """Wait for all, or raise the first error in the order of submission."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        if future in done:
            future.result()


def count_workers(jobs: int | None) -> int:
    """Return the number of worker threads: as asked, else one for each processor that this process may use."""
    if jobs is not None:
        return max(1, jobs)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
