"""The log of jobs: what binds it to its work, where it is torn, and that what is done is not done again."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loraformat
from loraformat.apply import job_log
from loraformat.apply.job_log import FileJobLog, describe_work, read_log
from loraformat.engine import jobs
from loraformat.engine.tile_sums import TileSums
from loraformat.spans import InputFile
from models import files_below, leftovers, write_adapter, write_base

SUMS = {
    "0@128:0": TileSums(0.1, 0.2, 3e300, 0, 2, 1e-9),
    "0@128:64": TileSums(math.inf, 1 / 3, -0.0, 1, 0, 0.0),
    "1@8:0": TileSums(),
}


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    base, adapter = write_base(tmp_path / "in", "safetensors"), write_adapter(tmp_path / "style")
    return loraformat.plan_merge(base, [adapter], tmp_path / "out.safetensors")


@pytest.fixture
def inputs(tmp_path: Path) -> list[InputFile]:
    path = tmp_path / "input"
    path.write_bytes(b"12345678")
    return [InputFile(path)]


@pytest.fixture
def written(tmp_path: Path, plan: Any, inputs: list[InputFile]) -> Path:
    """A log of three jobs, left as by a kill."""
    path = tmp_path / "log"
    log = FileJobLog(path, describe_work(plan, inputs), {})
    for key, sums in SUMS.items():
        log.note(key, sums)
    os.close(log._descriptor)
    return path


def test_what_was_noted_is_recalled(tmp_path: Path, plan: Any, inputs: list[InputFile], written: Path) -> None:
    found = read_log(written, plan, inputs)
    assert found == SUMS
    assert math.copysign(1, found["0@128:64"].base) == -1
    log = FileJobLog(written, describe_work(plan, inputs), found)
    assert log.recall("1@8:0") == TileSums()
    assert log.recall("1@8:64") is None
    log.note("1@8:64", TileSums(1.0))
    assert read_log(written, plan, inputs) == {**SUMS, "1@8:64": TileSums(1.0)}


def test_no_log_is_nothing_done(tmp_path: Path, plan: Any, inputs: list[InputFile]) -> None:
    assert read_log(tmp_path / "none", plan, inputs) == {}


def test_a_torn_log_counts_to_its_last_whole_line(plan: Any, inputs: list[InputFile], written: Path) -> None:
    data = written.read_bytes()
    lines = data.splitlines(keepends=True)
    ends = [sum(map(len, lines[: count + 1])) for count in range(len(lines))]
    for length in range(len(data) + 1):
        written.write_bytes(data[:length])
        whole = sum(end <= length for end in ends[1:])
        assert read_log(written, plan, inputs) == dict(list(SUMS.items())[:whole])


@pytest.mark.parametrize(
    "line",
    [b"\0" * 40, b"{}", b"[]", b'"x"', b'["k","1"]', b'["k","a","b","c","0","0","0"]', b"[" * 9999, b"\xff\xfe"],
)
def test_a_line_that_is_none_of_ours_ends_it(plan: Any, inputs: list[InputFile], written: Path, line: bytes) -> None:
    """A file system may leave zeros where a line was to be; what comes after is not trusted either."""
    lines = written.read_bytes().splitlines()
    written.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]) + b"\n")
    assert list(read_log(written, plan, inputs)) == ["0@128:0"]


def test_a_log_of_another_plan_is_none(tmp_path: Path, plan: Any, inputs: list[InputFile], written: Path) -> None:
    other = loraformat.plan_merge(tmp_path / "in" / "base.safetensors", [(tmp_path / "style", 2.0)], tmp_path / "x")
    assert read_log(written, other, inputs) == {}
    assert read_log(written, plan, inputs) == SUMS


@pytest.mark.parametrize("change", ["time", "size", "file", "count"])
def test_a_log_of_other_inputs_is_none(plan: Any, inputs: list[InputFile], written: Path, change: str) -> None:
    path = inputs[0].path
    again = [InputFile(path)]
    assert read_log(written, plan, again) == SUMS
    if change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "size":
        path.write_bytes(b"123")
    elif change == "file":
        state = path.stat()
        path.with_name("other").write_bytes(path.read_bytes())
        path.with_name("other").replace(path)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    found = [InputFile(path)] * (2 if change == "count" else 1)
    assert read_log(written, plan, found) == {}


def test_a_log_from_before_the_last_boot_is_none(
    tmp_path: Path, plan: Any, inputs: list[InputFile], written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill loses nothing that was written; a power cut may."""
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(job_log, "_BOOT", tmp_path / "boot")
    assert read_log(written, plan, inputs) == {}
    monkeypatch.setattr(job_log, "_BOOT", tmp_path / "none")
    assert read_log(written, plan, inputs) == {}


@pytest.mark.parametrize("failure", [None, ValueError, KeyboardInterrupt])
def test_a_log_stays_for_runs_that_may_be_resumed(tmp_path: Path, failure: Any) -> None:
    path = tmp_path / "log"
    try:
        with FileJobLog(path, ["x"], {}):
            if failure is not None:
                raise failure
    except (ValueError, KeyboardInterrupt):
        pass
    assert path.exists() == (failure is not None)


def test_a_refusal_leaves_no_log(tmp_path: Path) -> None:
    with pytest.raises(loraformat.LoraformatError), FileJobLog(tmp_path / "log", ["x"], {}):
        raise loraformat.LoraformatError([])
    assert not (tmp_path / "log").exists()


# --- whole merges -----------------------------------------------------------------------------------------------------


class Stopper:
    """Interrupts a merge at its n-th run of rows, and counts those that were carried out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.stop_at = 0, 0
        real: Callable[..., TileSums] = jobs.merge_rows

        def counted(*arguments: Any) -> TileSums:
            if self.done + 1 == self.stop_at:
                raise KeyboardInterrupt
            self.done += 1
            return real(*arguments)

        monkeypatch.setattr(jobs, "merge_rows", counted)


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "nothing": lambda folder, patch: None,
    "torn": lambda folder, patch: os.truncate(find_log(folder), find_log(folder).read_bytes().index(b"\n") + 9),
    "no head": lambda folder, patch: find_log(folder).write_bytes(b"[]\n"),
    "gone": lambda folder, patch: find_log(folder).unlink(),
    "no part": lambda folder, patch: next(folder.glob(".out*.part")).unlink(),
    "base": lambda folder, patch: os.utime(folder / "in" / "base.safetensors", ns=(1, 1)),
    "adapter": lambda folder, patch: os.utime(folder / "style" / "adapter_model.safetensors", ns=(1, 1)),
    "boot": lambda folder, patch: patch.setattr(job_log, "_BOOT", folder / "none"),
}


def find_log(folder: Path) -> Path:
    return next(folder.glob(".out*.log"))


@pytest.mark.parametrize("change", list(CHANGES))
def test_only_what_is_surely_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    base, adapter = write_base(tmp_path / "in", "safetensors"), write_adapter(tmp_path / "style")
    out, whole = tmp_path / "out.safetensors", tmp_path / "whole"
    whole.mkdir()
    loraformat.merge(base, [adapter], whole / out.name)
    stopper = Stopper(monkeypatch)
    stopper.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        loraformat.merge(base, [adapter], out, resume=True, jobs=1)
    assert stopper.done == 1
    assert not out.exists()
    CHANGES[change](tmp_path, monkeypatch)
    stopper.done, stopper.stop_at = 0, 0
    receipt = loraformat.merge(base, [adapter], out, resume=True, jobs=1)
    assert stopper.done == (1 if change == "nothing" else 2)
    assert files_below(whole) == {out.name: out.read_bytes()}
    assert len(receipt.weights) == 2
    assert not leftovers(tmp_path)


def test_another_plan_starts_afresh_and_removes_what_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = write_base(tmp_path / "in", "safetensors"), write_adapter(tmp_path / "style")
    out, stopper = tmp_path / "out.safetensors", Stopper(monkeypatch)
    stopper.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        loraformat.merge(base, [adapter], out, resume=True, jobs=1)
    assert len(leftovers(tmp_path)) == 2
    stopper.done, stopper.stop_at = 0, 0
    loraformat.merge(base, [(adapter, 2.0)], out, resume=True, jobs=1)
    assert stopper.done == 2
    assert not leftovers(tmp_path)
    expected = tmp_path / "expected.safetensors"
    loraformat.merge(base, [(adapter, 2.0)], expected)
    assert out.read_bytes() == expected.read_bytes()
