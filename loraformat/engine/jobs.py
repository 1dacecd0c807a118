"""What a plan leaves to do: jobs, each some rows of a touched weight or a piece of an input file, and their order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, Protocol

from loraformat.adapter import Target
from loraformat.bases import BaseModel
from loraformat.engine.coded_work import CodedWork, Place, requantise
from loraformat.engine.float_work import dequantise
from loraformat.engine.locating import index_tensors, list_copies, locate_coded, locate_weight
from loraformat.engine.references import Floats
from loraformat.engine.sinks import Sink, put_piece
from loraformat.engine.tile_sums import TileSums
from loraformat.engine.tiles import TileBuffers, merge_rows
from loraformat.engine.weight_work import WeightWork
from loraformat.images import Copy, FileImage, Literal
from loraformat.output_forms import index_weights
from loraformat.plan import Plan, WeightedAdapter
from loraformat.plan.weights import PlannedWeight
from loraformat.problems import escape_surrogates

_RUN_BYTES: Final = 8 << 20


class JobLog(Protocol):
    """Knows which jobs an earlier run did, and is told of those that this one has done; from any thread."""

    def recall(self, key: str) -> TileSums | None:
        """Return the sums of a job that is done, None for one that is not."""
        ...

    def note(self, key: str, sums: TileSums) -> None:
        """Be told that the bytes of a job are in their sink."""
        ...


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


class Job(NamedTuple):
    """Something to do: where its input stands, for the order; what it is called; which weight its sums belong to."""

    order: tuple[str, int]
    key: str
    weight: int
    output_bytes: int
    carry_out: Callable[[], TileSums]


class JobList:
    """The jobs of one assignment, and what they share.

    Args:
        assignment: the plan to carry out.
        buffers: the workers' memory.
    """

    def __init__(self, assignment: Assignment, buffers: TileBuffers) -> None:
        self.assignment = assignment
        self._buffers = buffers
        self._tensors = index_tensors(assignment.base)
        self._weights = index_weights(assignment.base)
        self._targets = index_targets(assignment.adapters)
        self._floats = open_floats(assignment.plan, assignment.checkpoint)

    def __iter__(self) -> Iterator[Job]:
        for number, weight in enumerate(self.assignment.plan.weights):
            yield from self._list_runs(number, weight)
        sinks = self.assignment.sinks
        for image, piece, offset in list_copies(
            self.assignment.images, self.assignment.plan, self._tensors, self._weights
        ):
            sink = sinks[image]
            if sink is not None:
                yield self._list_copy(image, sink, piece, offset)

    def _list_runs(self, number: int, weight: PlannedWeight) -> Iterator[Job]:
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
            yield Job(order, f"{image}@{offset}:{run.start}", number, len(run) * row_bytes, carry)

    def _list_coded(self, number: int, weight: PlannedWeight, work: CodedWork) -> Job:
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
        key = f"coded {escape_surrogates(span.path.name)}@{span.offset}{copied}"
        return Job((str(span.path), span.offset), key, number, weight.nbytes, carry)

    def _list_dequantised(self, number: int, weight: PlannedWeight, work: CodedWork) -> Job:
        assert weight.new is not None, "asked before"
        source = self._weights[weight.key].tensor
        image, offset = locate_weight(self.assignment.images, weight, source)
        sink = self.assignment.sinks[image]
        assert sink is not None, "a file with a new tensor is written"
        work.runs_left = 1
        carry = partial(_merge_floats, work, self._buffers, Place(sink, offset))
        length = weight.matrix[0] * (weight.matrix[1] - weight.new.padding) * work.float_form.itemsize
        order = (str(source.span.path), source.span.offset)
        return Job(order, f"{image}@{offset}", number, length, carry)

    def _list_copy(self, image: int, sink: Sink, piece: Copy | Literal, offset: int) -> Job:
        order = (str(piece.file.path), piece.offset) if isinstance(piece, Copy) else ("", 0)
        return Job(order, f"{image}@{offset}", -1, piece.length, partial(_copy, sink, piece, offset))


def deal_jobs(jobs: Sequence[Job], workers: int) -> list[int]:
    """Return the numbers of `jobs` in the order of their input; of several files, one part for each worker in turn.

    Workers that write one file at once would wait for each other.
    """
    ordered = sorted(range(len(jobs)), key=lambda number: jobs[number].order)
    if workers == 1 or len({job.order[0] for job in jobs}) == 1:
        return ordered
    share = max(1, sum(job.output_bytes for job in jobs) // workers)
    places: dict[int, int] = {}
    passed = 0
    for number in ordered:
        places[number] = passed % share
        passed += jobs[number].output_bytes
    return sorted(ordered, key=places.__getitem__)


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
