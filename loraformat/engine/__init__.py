"""Carry out plans: every touched tile is computed, every other byte copied, each into the sink of its output file.

Spans are independent, so worker threads take them in any order; the bytes that come out are the same for any number of
workers, because tile boundaries are part of the plan and every tile is computed alone. What a sink does with bytes
(write them, compare them) is its own affair.
"""

import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, Protocol

from loraformat.engine.float_work import PANEL_BYTES
from loraformat.engine.jobs import Assignment, Job, JobList, JobLog, deal_jobs, index_targets
from loraformat.engine.tile_sums import TileSums
from loraformat.engine.tiles import TileBuffers
from loraformat.engine.weight_work import count_held
from loraformat.errors import refuse

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


def carry_out(assignments: Sequence[Assignment], effort: Effort) -> list[list[TileSums]]:
    """Do all jobs and return, for each assignment, the sums of each weight in the plan's order.

    Jobs are taken in the order of their input, so that several assignments on one base read it once; see `deal_jobs`.

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
    jobs = [
        (job, assignment.log, number)
        for number, assignment in enumerate(assignments)
        for job in JobList(assignment, buffers)
    ]
    tracker.start(sum(job.output_bytes for job, *_ in jobs))
    order = deal_jobs([job for job, *_ in jobs], workers)
    with threadpool_limits(limits=1), ThreadPoolExecutor(workers, thread_name_prefix="loraformat") as pool:
        try:
            futures = {number: pool.submit(_do, *jobs[number][:2], tracker) for number in order}
            _await(list(futures.values()))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    sums = [[TileSums()] * len(each.plan.weights) for each in assignments]
    for place, (job, _, number) in enumerate(jobs):  # Not as they were dealt: sums must not hang on the workers.
        if job.weight >= 0:
            sums[number][job.weight] += futures[place].result()
    return sums


def _do(job: Job, log: JobLog | None, tracker: "_Tracker") -> TileSums:
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
