"""Systems that lack calls: what is made there is made to the same bytes, and nothing is in its own way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraformat import system
from loraformat.errors import LoraformatError
from loraformat.parts import is_held, open_part
from models import FORMS, files_below, leftovers, write_adapter, write_base

TESTS = Path(__file__).parent


def run_apart(*words: str) -> None:
    paths = os.pathsep.join(str(folder) for folder in (TESTS.parent, TESTS.parent / "cli", TESTS))
    command = [sys.executable, "-W", "error", *words]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="which files are open is asked of Linux")
@pytest.mark.parametrize("forms", [("one", "folder"), pytest.param(FORMS, marks=pytest.mark.thorough)])
def test_chores_give_the_same_files_where_calls_are_missing(forms: tuple[str, ...], tmp_path: Path) -> None:
    rich, poor = tmp_path / "rich", tmp_path / "poor"
    for form in forms:
        write_base(rich / form, form)
    write_adapter(rich / "style")
    write_adapter(rich / "task", seed=4)
    before = files_below(shutil.copytree(rich, poor))
    for folder in (rich, poor):
        run_apart("-m", "chores", str(folder), folder.name)
    expected, found = files_below(rich), files_below(poor)
    assert len(expected) > len(before) + 10 * len(forms)
    assert [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)] == []
    assert leftovers(poor) == []


PAGE = """
import poor_system, sys, threading
from pathlib import Path
from loraformat.spans import InputFile
from loraformat.parts import is_held, open_part
from loraformat.errors import LoraformatError
file = InputFile(sys.argv[1])
wrong = []
def read(start):
    for place in range(start, 40000, 7):
        if file.read(place, 2) != (place // 2 % 256).to_bytes(1, "little") * 2 and place % 2 == 0: wrong.append(place)
threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong
part = Path(sys.argv[1] + ".part")
open_part(part, taken_up=True)
assert is_held(part)
try:
    open_part(part, taken_up=True)
except LoraformatError as error:
    assert error.codes == ("LF606",)
else:
    raise AssertionError("two at once")
link = Path(sys.argv[1] + ".link")
link.symlink_to(part)
try:
    open_part(link, taken_up=True)
except OSError as error:
    assert "symbolic" in str(error)
else:
    raise AssertionError("through a link")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="as above")
def test_threads_locks_and_links_where_calls_are_missing(tmp_path: Path) -> None:
    """Threads that share a descriptor read what each asked for; a part is held, and no link is followed."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([value % 256]) * 2 for value in range(20010)))
    run_apart("-c", PAGE, str(path))


def test_parts_are_held_here(tmp_path: Path) -> None:
    descriptor = open_part(tmp_path / "part", taken_up=False)
    assert is_held(tmp_path / "part")
    with pytest.raises(LoraformatError) as caught:
        open_part(tmp_path / "part", taken_up=True)
    assert caught.value.codes == ("LF606",)
    os.close(descriptor)
    assert not is_held(tmp_path / "part")


def test_processes_are_asked_after() -> None:
    assert system.is_running(os.getpid())
    assert system.is_running(2**30) is False
