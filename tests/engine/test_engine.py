"""Carrying out plans: the order of jobs, several plans at once, and the memory that is held."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import loraformat
from loraformat import engine
from loraformat.bases import BaseModel
from loraformat.engine import Assignment, Effort, carry_out
from loraformat.engine.tile_sums import TileSums
from loraformat.images import Copy, Literal
from loraformat.loading import open_base
from loraformat.output_forms import Order, describe_output
from loraformat.plan import WeightedAdapter
from loraformat.planning import build_plan
from models import STATES, suffix_of, write_adapter, write_base

ROOM = 4000
"""Bytes for a receipt, which nobody writes here."""


class MemorySink:
    """A file in memory; every byte is written at most once."""

    def __init__(self) -> None:
        self.data, self.taken = bytearray(), bytearray()

    def reserve(self, length: int) -> None:
        self.data, self.taken = bytearray(length), bytearray(length)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        stop = offset + len(bytes(data))
        assert not any(self.taken[offset:stop])
        self.data[offset:stop], self.taken[offset:stop] = bytes(data), b"\1" * (stop - offset)

    def copy(self, piece: Copy, offset: int) -> None:
        self.write(piece.file.read(piece.offset, piece.length), offset)


class Notes:
    """A job log in memory."""

    def __init__(self, trace: list[str], name: str = "", done: dict[str, TileSums] | None = None) -> None:
        self.trace, self.name, self.done = trace, name, done or {}
        self.noted: dict[str, TileSums] = {}

    def recall(self, key: str) -> TileSums | None:
        return self.done.get(key)

    def note(self, key: str, sums: TileSums) -> None:
        self.trace.append(f"{self.name}{key}")
        assert key not in self.noted
        self.noted[key] = sums


def assign(base: BaseModel, adapter: Path, output: Path, log: Notes | None = None) -> Assignment:
    weighted = [WeightedAdapter(loraformat.load(adapter), 1.0, adapter.name)]
    plan = build_plan(base, weighted, output)
    images = describe_output(Order(plan, weighted), base, ROOM)
    return Assignment(plan, base, weighted, images, [MemorySink() for _ in images], log)


def contents(assignment: Assignment) -> dict[str, bytes]:
    sinks: Sequence[Any] = assignment.sinks
    return {image.path.name: bytes(sink.data) for image, sink in zip(assignment.images, sinks, strict=True)}


@pytest.fixture
def opened(tmp_path: Path) -> BaseModel:
    return open_base(write_base(tmp_path / "in", "safetensors"))


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / f"style{seed}", seed) for seed in (1, 2)]


@pytest.mark.parametrize("form", STATES)
def test_every_byte_but_the_blank_is_written_once(tmp_path: Path, two: list[Path], form: str) -> None:
    base = open_base(write_base(tmp_path / "in", form))
    assignment = assign(base, two[0], tmp_path / f"out{suffix_of(form)}")
    carry_out([assignment], Effort(3, 1 << 28))
    unwritten = [sink.taken.count(0) for sink in assignment.sinks if isinstance(sink, MemorySink)]
    assert unwritten[:-1] == [0] * (len(unwritten) - 1)
    assert unwritten[-1] == ROOM


def test_jobs_are_taken_in_the_order_of_their_input(tmp_path: Path, opened: BaseModel, two: list[Path]) -> None:
    """New bytes first, then what stands first in the base, merged or copied."""
    trace: list[str] = []
    assignment = assign(opened, two[0], tmp_path / "out.safetensors", Notes(trace))
    carry_out([assignment], Effort(1, 1 << 28))
    offsets = [int(key.partition("@")[2].partition(":")[0]) for key in trace]
    assert offsets == sorted(offsets)
    assert len(offsets) > len(assignment.plan.weights) > 1


@pytest.mark.parametrize("jobs", [1, 4])
def test_several_plans_give_what_each_gives_alone(
    tmp_path: Path, opened: BaseModel, two: list[Path], jobs: int
) -> None:
    output, alone = tmp_path / "out.safetensors", []
    for adapter in two:
        single = assign(opened, adapter, output)
        (sums,) = carry_out([single], Effort(1, 1 << 28))
        alone.append((contents(single), sums))
    together = [assign(opened, adapter, output) for adapter in two]
    found = carry_out(together, Effort(jobs, 1 << 28))
    assert [(contents(each), sums) for each, sums in zip(together, found, strict=True)] == alone
    assert alone[0] != alone[1]


def test_several_plans_read_the_base_once(tmp_path: Path, opened: BaseModel, two: list[Path]) -> None:
    """What they take from one place of it, they take one after another."""
    trace: list[str] = []
    plans = [assign(opened, each, tmp_path / "out.safetensors", Notes(trace, each.name[-1])) for each in two]
    carry_out(plans, Effort(1, 1 << 28))
    new = {f"0@{offset}" for offset, piece in plans[0].images[0].placed() if isinstance(piece, Literal)}
    read = [key for key in trace if key[1:] not in new]
    assert [key[1:] for key in read[::2]] == [key[1:] for key in read[1::2]]
    assert sorted(key[0] for key in read[:4]) == ["1", "1", "2", "2"]


def test_jobs_that_a_log_recalls_are_not_done(tmp_path: Path, opened: BaseModel, two: list[Path]) -> None:
    whole = assign(opened, two[0], tmp_path / "out.safetensors", notes := Notes([]))
    (expected,) = carry_out([whole], Effort(1, 1 << 28))
    done = dict(list(notes.noted.items())[::2])
    rest = assign(opened, two[0], tmp_path / "out.safetensors", Notes(trace := [], done=done))
    assert carry_out([rest], Effort(1, 1 << 28)) == [expected]
    assert trace == [key for key in notes.noted if key not in done]
    sink, missing = rest.sinks[0], whole.sinks[0]
    assert isinstance(sink, MemorySink)
    assert isinstance(missing, MemorySink)
    assert 0 < sink.taken.count(1) < missing.taken.count(1)


def test_files_that_need_nothing_are_left_out(tmp_path: Path, two: list[Path]) -> None:
    """Shards that are hard links have no sink."""
    base = open_base(write_base(tmp_path / "in", "folder"))
    assignment = assign(base, two[0], tmp_path / "out", Notes(trace := []))
    touched = {weight.file for weight in assignment.plan.weights}
    sinks = [
        MemorySink() if Path(image.path).name in {Path(file).name for file in touched} else None
        for image in assignment.images
    ]
    left_out = {str(index) for index, sink in enumerate(sinks) if sink is None}
    assert left_out
    carry_out(
        [Assignment(assignment.plan, base, assignment.adapters, assignment.images, sinks, Notes(trace))],
        Effort(2, 1 << 28),
    )
    assert trace
    assert not left_out & {key.partition("@")[0] for key in trace}


def test_a_small_budget_takes_fewer_workers(
    tmp_path: Path, opened: BaseModel, two: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers: list[int] = []
    real: Callable[..., Any] = engine.ThreadPoolExecutor

    def counted(number: int, **options: Any) -> Any:
        workers.append(number)
        return real(number, **options)

    monkeypatch.setattr(engine, "ThreadPoolExecutor", counted)
    one = [assign(opened, two[0], tmp_path / "out.safetensors")]
    both = [*one, assign(opened, two[1], tmp_path / "out.safetensors")]
    with pytest.raises(loraformat.LoraformatError) as caught:
        carry_out(one, Effort(4, 0))
    assert caught.value.codes == ("LF607",)
    least = int(caught.value.problems[0].expected.removeprefix("at least ").removesuffix(" bytes"))
    for plans, budget in ((one, least), (one, 3 * least), (one, 99 * least), (both, 2 * least), (both, 7 * least)):
        carry_out(plans, Effort(4, budget))
    assert workers == [1, 3, 4, 1, 3]
    with pytest.raises(loraformat.LoraformatError):
        carry_out(both, Effort(4, 2 * least - 1))


def test_progress_is_told_every_byte(tmp_path: Path, opened: BaseModel, two: list[Path]) -> None:
    class Told:
        total, done = 0, 0

        def start(self, total_bytes: int) -> None:
            self.total = total_bytes

        def advance(self, done_bytes: int) -> None:
            self.done += done_bytes

    assignment = assign(opened, two[0], tmp_path / "out.safetensors")
    carry_out([assignment], Effort(3, 1 << 28, told := Told()))
    assert told.done == told.total == sum(image.size_bytes for image in assignment.images) - ROOM
