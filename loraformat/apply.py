"""Carry out a plan: copy what stays, rewrite what changes, and move the result into place when it is whole.

Spans are independent, so worker threads take them in any order; the bytes that come out are the same for any number of
workers, because tile boundaries are part of the plan and every tile is computed alone.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from loraformat.accounting import draft_receipt, finish_receipt, slack_bytes
from loraformat.bases import BaseModel
from loraformat.errors import refuse
from loraformat.files import write_at
from loraformat.images import Blank, Copy, FileImage, Literal
from loraformat.limits import COPY_CHUNK_BYTES
from loraformat.loading import list_files
from loraformat.outputs import PendingFolder, PendingOutput, check_output, check_output_folder, output_errors
from loraformat.plan import Plan, PlannedWeight, WeightedAdapter
from loraformat.receipt import Receipt
from loraformat.sinks import FileSink, Sink
from loraformat.spans import StoredTensor
from loraformat.tiles import TileBuffers, TileSums, merge_tile
from loraformat.weight_work import WeightWork

_RUN_BYTES: Final = 8 << 20
_BUFFERS_PER_WORKER: Final = 4
_FACTOR_COPIES: Final = 3


class Progress(Protocol):
    """Told how far the work is, in bytes of output, from any thread."""

    def start(self, total_bytes: int) -> None:
        """Be told the total."""
        ...

    def advance(self, done_bytes: int) -> None:
        """Be told that so many more bytes are done."""
        ...


@dataclass(frozen=True, slots=True)
class Work:
    """How to carry out a plan.

    Attributes:
        jobs: worker threads.
        max_memory_bytes: cap on tiles and factors in flight.
        min_retained: refuse when less of a weight's delta survives rounding.
        force: replace an existing output.
        durable: wait for the disk before the output is moved into place.
        progress: told how far it is.
    """

    jobs: int
    max_memory_bytes: int
    min_retained: float
    force: bool = False
    durable: bool = False
    progress: Progress | None = None


def apply_plan(plan: Plan, base: BaseModel, adapters: Sequence[WeightedAdapter], work: Work) -> Receipt:
    """Write the merged model and return the receipt.

    Args:
        plan: what to do, made from the same `base` and `adapters`.
        base: the opened base.
        adapters: the adapters, in the plan's order.
        work: how to do it.

    Raises:
        LoraformatError: nothing of the output remains then.
    """
    draft = base.encode_receipt(draft_receipt(plan, base).embedded_text())
    images = base.describe_images(plan.output, len(draft) + slack_bytes(plan), plan.sha256[:8])
    with _open_outputs(plan.output, base, images, work) as pending:
        sinks = [FileSink(fd, image.path) for fd, image in zip(pending.descriptors, images, strict=True)]
        sums = _Run(plan, base, adapters, work, images, sinks).carry_out()
        receipt = finish_receipt(plan, base, sums, work.min_retained)
        _fill_blank(images[-1], pending.descriptors[-1], base.encode_receipt(receipt.embedded_text()))
        for file in (*base.files, *(file for item in adapters for file in list_files(item.adapter))):
            file.check_unchanged()
        pending.commit()
    return receipt


@contextmanager
def _open_outputs(
    output: Path, base: BaseModel, images: Sequence[FileImage], work: Work
) -> Iterator[PendingOutput | PendingFolder]:
    """Open what is to be written, once it is known that nothing is destroyed by it."""
    if base.folder_mark:
        check_output_folder(output, base.path, base.folder_mark, force=work.force)
        names = [image.path.relative_to(output) for image in images]
        with PendingFolder(output, names, force=work.force, durable=work.durable) as folder:
            yield folder
        return
    inputs = [file.path for file in base.files]
    check_output(output, inputs, force=work.force)
    with _data_folders(images):
        for image in images[:-1]:
            check_output(image.path, inputs, force=work.force)
        stale = _list_stale(base, output) if work.force else []
        with PendingOutput([image.path for image in images], force=work.force, durable=work.durable) as files:
            yield files
    for path in set(stale) - {image.path for image in images}:
        with suppress(OSError):
            path.unlink()


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


class _Run:
    """The jobs of one merge, and what they need to share."""

    def __init__(
        self,
        plan: Plan,
        base: BaseModel,
        adapters: Sequence[WeightedAdapter],
        work: Work,
        images: Sequence[FileImage],
        sinks: Sequence[Sink],
    ) -> None:
        self._plan = plan
        self._work = work
        self._images = images
        self._sinks = sinks
        self._tensors = _index_tensors(base)
        self._targets = [{target.name: target for target in item.adapter.targets} for item in adapters]
        self._buffers = TileBuffers()
        self._lock = threading.Lock()

    def carry_out(self) -> list[TileSums]:
        """Do all jobs and return the sums of each weight, in the plan's order."""
        from threadpoolctl import threadpool_limits

        for image, sink in zip(self._images, self._sinks, strict=True):
            sink.reserve(image.size_bytes)
        if self._work.progress:
            self._work.progress.start(sum(image.size_bytes for image in self._images))
        jobs = self._fit_memory()
        with threadpool_limits(limits=1), ThreadPoolExecutor(jobs, thread_name_prefix="loraformat") as pool:
            try:
                futures = [self._submit_weight(pool, weight) for weight in self._plan.weights]
                copies = [pool.submit(self._copy, *job) for job in self._list_copies()]
                _await([future for group in futures for future in group] + copies)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [sum((future.result() for future in group), TileSums()) for group in futures]

    def _fit_memory(self) -> int:
        """Return how many workers the memory budget allows, at most as many as asked for."""
        for jobs in range(self._work.jobs, 0, -1):
            need = jobs * max(map(self._need_bytes, self._plan.weights), default=0)
            if need <= self._work.max_memory_bytes:
                return jobs
        raise refuse(
            "LF607", "--max-memory", f"a budget of {self._work.max_memory_bytes} bytes", f"at least {need} bytes"
        )

    def _need_bytes(self, weight: PlannedWeight) -> int:
        """Return the bytes that one worker on `weight` holds: tiles, and factors with their working copies."""
        widest = 8 if "float64" in (weight.dtype, weight.written_dtype) else 4
        tile = widest * weight.tile_rows * weight.matrix[1]
        factors = sum(widest * self._targets[change.adapter][change.target].parameters for change in weight.changes)
        return _BUFFERS_PER_WORKER * tile + _FACTOR_COPIES * factors

    def _submit_weight(self, pool: ThreadPoolExecutor, weight: PlannedWeight) -> "list[Future[TileSums]]":
        targets = [self._targets[change.adapter][change.target] for change in weight.changes]
        work = WeightWork(weight, self._tensors.get(weight.key), targets)
        image, offset = _locate(self._images, self._tensors[weight.key])
        runs = list(_split_runs(weight, work.written_form.itemsize))
        work.runs_left = len(runs)
        return [pool.submit(self._merge_run, work, run, image, offset) for run in runs]

    def _merge_run(self, work: WeightWork, run: range, image: int, offset: int) -> TileSums:
        """Merge the tiles of stored rows `run`, in order."""
        sums = TileSums()
        step = work.weight.tile_rows
        row_bytes = work.weight.matrix[1] * work.written_form.itemsize
        for start in range(run.start, run.stop, step):
            rows = range(start, min(start + step, run.stop))
            sums += merge_tile(work, self._buffers, rows, self._sinks[image], offset)
            self._advance(len(rows) * row_bytes)
        work.finish_run()
        return sums

    def _list_copies(self) -> Iterator[tuple[int, Copy | Literal, int]]:
        """Yield what is to be copied: image, piece, and its offset there; touched spans are left out."""
        touched = sorted(
            (*_locate(self._images, self._tensors[weight.key]), weight.nbytes) for weight in self._plan.weights
        )
        for index, image in enumerate(self._images):
            holes = [(offset, offset + length) for where, offset, length in touched if where == index]
            for offset, piece in image.placed():
                if isinstance(piece, Literal):
                    yield index, piece, offset
                elif isinstance(piece, Copy):
                    yield from ((index, part, start) for start, part in _cut(offset, piece, holes))

    def _copy(self, image: int, piece: Copy | Literal, offset: int) -> None:
        if isinstance(piece, Literal):
            self._sinks[image].write(piece.data, offset)
        else:
            self._sinks[image].copy(piece, offset)
        self._advance(piece.length)

    def _advance(self, done_bytes: int) -> None:
        if self._work.progress:
            with self._lock:
                self._work.progress.advance(done_bytes)


def _await(futures: "Sequence[Future[Any]]") -> None:
    """Wait for all, or raise the first error in the order of submission."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        if future in done:
            future.result()


def _index_tensors(base: BaseModel) -> Mapping[str, StoredTensor]:
    return {site.weight.key: site.weight.tensor for site in base.sites if site.weight is not None}


def _locate(images: Sequence[FileImage], tensor: StoredTensor) -> tuple[int, int]:
    """Return which image holds the tensor, and where."""
    for index, image in enumerate(images):
        offset = image.locate(tensor.span)
        if offset is not None:
            return index, offset
    raise ValueError(f"{tensor.name} is in no output file")


def _split_runs(weight: PlannedWeight, itemsize: int) -> Iterator[range]:
    """Yield the rows of one job each: whole tiles, about `_RUN_BYTES`."""
    rows, columns = weight.matrix
    step = weight.tile_rows * max(1, _RUN_BYTES // (weight.tile_rows * columns * itemsize))
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))


def _cut(offset: int, piece: Copy, holes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Copy]]:
    """Yield the parts of `piece`, which lands at `offset`, outside `holes` and at most a chunk long."""
    position, end = offset, offset + piece.length
    for start, stop in [*(hole for hole in holes if offset <= hole[0] < end), (end, end)]:
        while position < start:
            length = min(COPY_CHUNK_BYTES, start - position)
            yield position, replace(piece, offset=piece.offset + position - offset, length=length)
            position += length
        position = max(position, stop)


def _fill_blank(image: FileImage, descriptor: int, data: bytes) -> None:
    """Write the receipt into its blank and pad the rest with spaces."""
    offset, blank = next((offset, piece) for offset, piece in image.placed() if isinstance(piece, Blank))
    if len(data) > blank.length:
        raise ValueError("the receipt outgrew its draft")
    with output_errors(image.path):
        write_at(descriptor, data.ljust(blank.length), offset)


def count_workers(jobs: int | None) -> int:
    """Return the number of worker threads: as asked, else one for each processor that this process may use."""
    if jobs is not None:
        return max(1, jobs)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
