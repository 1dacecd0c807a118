"""Parts of outputs: nothing planted in their place is written to, and what another run holds is left to it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraformat.apply.job_log import FileJobLog
from loraformat.apply.output_folders import PendingFolder
from loraformat.errors import LoraformatError
from loraformat.outputs import PendingOutput, name_log, name_part, remove_stale_parts
from loraformat.parts import open_part

TOKEN = "0123456789abcdef"
HOLDER = """
import fcntl, os, sys
for path in sys.argv[1:]:
    fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def codes(call) -> tuple[str, ...]:
    with pytest.raises(LoraformatError) as caught:
        call()
    return caught.value.codes


def enter(pending: PendingOutput | PendingFolder | FileJobLog) -> None:
    with pending:
        pass


def write_dead(folder: Path, final: str) -> Path:
    """Make a part of a process that no longer is, as another machine's looks from here."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    part = folder / f".{final}.loraformat-{gone.pid}-0123abcd.part"
    part.write_bytes(b"in work")
    return part


@pytest.fixture
def hold() -> Iterator:
    """Return a function that has another process lock files."""
    running: list[subprocess.Popen[str]] = []

    def start(*paths: Path) -> None:
        command = [sys.executable, "-c", HOLDER, *paths]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"

    yield start
    for process in running:
        process.communicate(timeout=20)


def test_a_part_that_another_machine_writes_is_not_stale(tmp_path: Path, hold) -> None:
    """Its process id says nothing here: containers that share a folder count for themselves."""
    held, left = write_dead(tmp_path, "a"), write_dead(tmp_path, "b")
    hold(held)
    remove_stale_parts(tmp_path / "c")
    assert held.exists()
    assert not left.exists()


@pytest.mark.parametrize("force", [False, True])
def test_one_run_writes_an_output(tmp_path: Path, hold, force: bool) -> None:
    """Two that replace a model in several files could leave the graph of one with the weights of the other."""
    final = tmp_path / "merged.onnx"
    held = write_dead(tmp_path, final.name)
    hold(held)
    assert codes(lambda: enter(PendingOutput([tmp_path / "data", final], force=force))) == ("LF606",)
    assert codes(lambda: enter(PendingFolder(final, [Path("x")], force=force))) == ("LF606",)
    assert list(tmp_path.iterdir()) == [held]
    enter(PendingOutput([tmp_path / "other.onnx"], force=force))


def test_one_run_takes_up_a_killed_one(tmp_path: Path, hold) -> None:
    """The second would cut off the log of the first."""
    final, folder = tmp_path / "merged.onnx", tmp_path / "merged"
    log = name_log(final, TOKEN)
    parts = [name_part(final, TOKEN), name_part(folder, TOKEN)]
    parts[0].write_bytes(b"half")
    (parts[1] / "sub").mkdir(parents=True)
    log.write_text("line\n")
    hold(*parts, log)
    assert codes(lambda: enter(PendingOutput([final], force=True, resume=TOKEN))) == ("LF606",)
    assert codes(lambda: enter(PendingFolder(folder, [Path("x")], force=True, resume=TOKEN))) == ("LF606",)
    assert codes(lambda: enter(FileJobLog(log, ["head"], {}))) == ("LF606",)
    assert (parts[0].read_bytes(), log.read_text()) == (b"half", "line\n")
    assert [path.name for path in parts[1].iterdir()] == ["sub"]


@pytest.mark.parametrize("plant", [os.symlink, os.link], ids=["symlink", "hard link"])
def test_nothing_is_written_through_a_planted_link(tmp_path: Path, plant) -> None:
    """Names of parts that may be taken up can be foretold: in a folder of all users they could lead anywhere."""
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.write_bytes(b"mine")
    out.mkdir()
    final = out / "merged.onnx"
    for path in (name_part(final, TOKEN), name_log(final, TOKEN), out / "folder-part" / "x"):
        path.parent.mkdir(exist_ok=True)
        plant(precious, path)
    expected = ("LF605",) if plant is os.symlink else ("LF603",)
    assert codes(lambda: enter(PendingOutput([final], force=True, resume=TOKEN))) == expected
    assert codes(lambda: enter(FileJobLog(name_log(final, TOKEN), ["head"], {}))) == expected
    folder = out / "merged"
    os.rename(out / "folder-part", name_part(folder, TOKEN))
    assert codes(lambda: enter(PendingFolder(folder, [Path("x")], force=True, resume=TOKEN))) == expected
    assert precious.read_bytes() == b"mine"


def test_nothing_is_removed_behind_a_planted_link(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "merged"
    home.mkdir()
    (home / "letters").write_text("mine")
    name_part(folder, TOKEN).symlink_to(home)
    assert codes(lambda: enter(PendingFolder(folder, [Path("x")], force=True, resume=TOKEN))) == ("LF605",)
    assert [path.name for path in home.iterdir()] == ["letters"]


def test_what_replaces_a_closed_file_is_closed_from_the_first_byte(tmp_path: Path) -> None:
    final = tmp_path / "merged.onnx"
    final.write_bytes(b"old")
    final.chmod(0o640)
    old = os.umask(0)
    try:
        with PendingOutput([final], force=True) as pending:
            assert os.stat(pending.parts[0]).st_mode & 0o777 == 0o640
            pending.commit()
    finally:
        os.umask(old)
    assert final.stat().st_mode & 0o777 == 0o640


def test_what_stands_in_place_already_is_taken_up_and_another_name_is_not(tmp_path: Path) -> None:
    """A run that is killed while it places its part leaves the file under both names."""
    part, final, other = (tmp_path / name for name in ("part", "final", "other"))
    part.write_bytes(b"whole")
    final.hardlink_to(part)
    os.close(open_part(part, taken_up=True, final=final))
    assert codes(lambda: open_part(part, taken_up=True, final=other)) == ("LF603",)
    other.hardlink_to(part)
    assert codes(lambda: open_part(part, taken_up=True, final=final)) == ("LF603",)
