"""What a merge leaves when it is killed, interrupted, or runs out of disk.

A child process merges into a base of each form, so that all is imported, and forks for each attempt; the fork kills
itself at the n-th call of a function that writes or moves, for every n until the merge completes.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import loraformat
import models
from builders import write_peft, write_tensors
from graphs import dyadic, dyadic_factors, linear_net, read_state, stored_weights, write_model
from killing import KILL_AT
from loraformat.apply.undo import name_journal
from loraformat_cli.group import root

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

NAMES = ("layers.0.fc", "layers.1.fc")
SHAPE = (30, 20)


def also(*values: Any, id: str | None = None) -> Any:
    """Return a case for thorough runs: each law has others that always run."""
    return pytest.param(*values, id=id, marks=pytest.mark.thorough)


FORKER = (
    f"{KILL_AT}"
    """
import json, os, signal, sys
import loraformat

adapter, *bases = sys.argv[1:]
for base in bases:
    loraformat.merge(base, [adapter], jobs=1, resume=True)
    loraformat.merge_into(base, [adapter], jobs=1, keep_undo=True)
    loraformat.unmerge(base)
loraformat.merge_each(bases[0], [adapter], f"{adapter}-each", jobs=1)
FUNCTIONS = ("pwrite", "copy_file_range", "link", "replace", "rename", "unlink", "mkdir", "ftruncate", "open")

def attempt(number, act, arguments, options):
    kill_at(number, FUNCTIONS)
    getattr(loraformat, act)(*arguments, jobs=1, **options)

for line in sys.stdin:
    number, act, arguments, options = json.loads(line)
    child = os.fork()
    if not child:
        try:
            attempt(number, act, arguments, options)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
"""
)


@dataclass
class Forker:
    """A process that forks for each attempt."""

    process: "subprocess.Popen[str]"

    def run(self, number: int, act: str, *arguments: Any, **options: Any) -> int:
        """Call a function of the face, killed at call `number`; return the exit code, negative for the signal."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = json.dumps([number, act, arguments, options], default=str)
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        assert status in {0, -signal.SIGKILL}, status
        return status

    def attempt(self, number: int, base: Path, adapter: Path, output: Path, *, force: bool) -> int:
        """Merge into a copy."""
        return self.run(number, "merge", base, [adapter], output, force=force)


@contextmanager
def _forking(folder: Path) -> Iterator[Forker]:
    bases = [models.write_base(folder / f"base{number}", form) for number, form in enumerate(models.FORMS)]
    adapter = models.write_adapter(folder / "style")
    with subprocess.Popen(
        [sys.executable, "-c", FORKER, adapter, *bases],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    ) as process:
        yield Forker(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with _forking(tmp_path_factory.mktemp("forker")) as made:
        yield made


def make_inputs(folder: Path, form: str) -> tuple[Path, Path]:
    """Write a base and an adapter into `folder`."""
    rng = np.random.default_rng(61)
    folder.mkdir()
    arrays = {name: dyadic(rng, *SHAPE) for name in NAMES}
    if form == "safetensors":
        base = write_tensors(folder / "base.safetensors", {f"{name}.weight": a for name, a in arrays.items()})
    else:
        base = write_model(folder / "base.onnx", linear_net(arrays).model(), form)
    return base, write_peft(folder / "style", {name: dyadic_factors(rng, *SHAPE, 2) for name in NAMES}, alpha=2)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parts_in(folder: Path) -> list[str]:
    return [name for name in files_below(folder) if name.endswith(".part")]


@pytest.mark.parametrize(
    ("form", "old"),
    [("", False), also("one", True), ("many", True), ("safetensors", False)],
    ids=["onnx-new", "one-replacing", "many-replacing", "safetensors-new"],
)
def test_killed_at_every_step(tmp_path: Path, forker: Forker, form: str, old: bool) -> None:
    """The old output stands whole until the new one does, inputs stay, and the next run ends well and cleans up."""
    base, adapter = make_inputs(tmp_path / "in", form)
    inputs = files_below(tmp_path / "in")
    expected = _weights_after(tmp_path / "expected", base, adapter, 1.0)
    start = tmp_path / "start"
    start.mkdir()
    if old:
        loraformat.merge(base, [(adapter, 2.0)], start / f"merged{base.suffix}")
    for number in range(1, 200):
        folder = shutil.copytree(start, tmp_path / f"out{number}")
        output = folder / f"merged{base.suffix}"
        before = files_below(folder)
        status = forker.attempt(number, base, adapter, output, force=old)
        assert status in {0, -signal.SIGKILL}, status
        assert files_below(tmp_path / "in") == inputs
        after = files_below(folder)
        if status == 0:
            assert not parts_in(folder)
            break
        if before.get(output.name) == after.get(output.name):
            assert before.items() <= after.items(), "the old model keeps its data files"
        else:
            _check_weights(output, expected)
        loraformat.merge(base, [adapter], output, force=output.exists())
        _check_weights(output, expected)
        assert not parts_in(folder)
    else:
        pytest.fail("it never completes")
    assert number > 4
    _check_weights(output, expected)


def _weights_after(folder: Path, base: Path, adapter: Path, weight: float) -> dict[str, bytes]:
    folder.mkdir()
    loraformat.merge(base, [(adapter, weight)], folder / f"merged{base.suffix}")
    return _read(folder / f"merged{base.suffix}")


def _read(path: Path) -> dict[str, bytes]:
    arrays = read_state(path) if path.suffix == ".safetensors" else stored_weights(path)
    return {name: array.tobytes() for name, array in arrays.items()}


def _check_weights(output: Path, expected: dict[str, bytes]) -> None:
    assert _read(output) == expected


def _number(start: int = 1) -> Iterator[int]:
    """Yield which call to be killed at; more than any merge here makes is an error."""
    yield from range(start, 120)
    pytest.fail("it never completes")


@pytest.mark.parametrize(
    ("form", "old"),
    [("torch", True), also("npz", False), ("folder", True), also("torch folder", False)],
    ids=["torch-replacing", "npz-new", "folder-replacing", "torch folder-new"],
)
def test_state_dicts_killed_at_every_step(tmp_path: Path, forker: Forker, form: str, old: bool) -> None:
    """As above; the receipt beside an archive comes after it."""
    base, adapter = models.write_base(tmp_path / "in", form), models.write_adapter(tmp_path / "style")
    start, expected = tmp_path / "start", tmp_path / f"expected{base.suffix}"
    start.mkdir()
    loraformat.merge(base, [adapter], expected)
    if old:
        loraformat.merge(base, [(adapter, 2.0)], start / f"merged{base.suffix}")
    wanted, inputs = models.read_model(expected), models.files_below(tmp_path / "in")
    for number in _number():
        folder = shutil.copytree(start, tmp_path / f"out{number}")
        output = folder / f"merged{base.suffix}"
        before = models.read_model(output) if old else None
        status = forker.attempt(number, base, adapter, output, force=old)
        assert models.files_below(tmp_path / "in") == inputs
        assert output.exists() or not (old and sys.platform == "linux")
        if output.exists():
            assert models.read_model(output) in (before, wanted)
        if not status:
            break
        loraformat.merge(base, [adapter], output, force=True)
        assert models.read_model(output) == wanted
        assert not models.leftovers(folder)
        shutil.rmtree(folder)
    assert number > 10
    assert not models.leftovers(folder)


@pytest.mark.parametrize("form", ["many", also("torch"), also("folder")])
def test_in_place_killed_at_every_step(tmp_path: Path, forker: Forker, form: str) -> None:
    """The model is the base, or the merged one, or a journal says that it is neither and takes it back."""
    base, adapter = models.write_base(tmp_path / "in", form), models.write_adapter(tmp_path / "style")
    before = models.files_below(base.parent)
    whole = models.copy_base(base, tmp_path / "whole")
    loraformat.merge_into(whole, [adapter])
    merged, journals = models.files_below(whole.parent), 0
    for number in _number():
        model = models.copy_base(base, tmp_path / f"work{number}")
        status = forker.run(number, "merge_into", model, [adapter])
        if not status:
            break
        if name_journal(model).exists():
            journals += 1
            for act in (loraformat.merge_into, loraformat.plan_merge):
                with pytest.raises(loraformat.LoraformatError) as caught:
                    act(model, [adapter])
                assert caught.value.codes == ("LF621",)
            assert loraformat.unmerge(model).exact
        found = {name: data for name, data in models.files_below(model.parent).items() if ".part" not in name}
        assert found == before
        loraformat.merge_into(model, [adapter])
        assert models.files_below(model.parent) == merged
        shutil.rmtree(model.parent)
    assert journals >= 5
    assert models.files_below(model.parent) == merged


@pytest.mark.parametrize("form", ["onnx", also("safetensors"), also("torch folder")])
def test_unmerge_in_place_killed_at_every_step(tmp_path: Path, forker: Forker, form: str) -> None:
    """A model that is half restored is never taken for a whole one, and the next run restores it."""
    base, adapter = models.write_base(tmp_path / "in", form), models.write_adapter(tmp_path / "style")
    before = models.files_below(base.parent)
    loraformat.merge_into(base, [adapter], keep_undo=True)
    merged = models.files_below(base.parent)
    for number in _number():
        model = models.copy_base(base, tmp_path / f"work{number}")
        status = forker.run(number, "unmerge", model)
        after = models.files_below(model.parent)
        if not status:
            break
        assert after == merged or name_journal(model).exists()
        loraformat.unmerge(model)
        assert models.files_below(model.parent) == before
        shutil.rmtree(model.parent)
    assert number > 3
    assert after == before


RESUMED = [
    also("many", {}, id="many"),
    also("npz", {}, id="npz"),
    also("one", {"keep_undo": True}, id="one-keep_undo"),
    pytest.param("folder", {"link": True}, id="folder-link"),
    also("torch folder", {"dtype": "bfloat16", "to": "safetensors"}, id="torch folder-anew"),
]


@pytest.mark.parametrize(("form", "options"), RESUMED)
def test_a_resumed_run_gives_the_same_bytes(
    tmp_path: Path, forker: Forker, form: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an uninterrupted run writes, wherever it was killed; and tiles whose jobs are done are not done again."""
    base, adapter = models.write_base(tmp_path / "in", form), models.write_adapter(tmp_path / "style")
    name = f"merged{models.suffix_of(form, anew='to' in options)}"
    whole = tmp_path / "whole"
    whole.mkdir()
    tiles = _count_tiles(monkeypatch)
    loraformat.merge(base, [adapter], whole / name, **options)
    expected, all_tiles, fewest = models.files_below(whole), tiles.pop(), 99
    for number in _number():
        folder = tmp_path / f"out{number}"
        folder.mkdir()
        status = forker.run(number, "merge", base, [adapter], folder / name, resume=True, **options)
        if not status:
            break
        placed = set(models.files_below(folder)) & set(expected)
        tiles.append(0)
        loraformat.merge(base, [adapter], folder / name, resume=True, force=bool(placed), **options)
        fewest = min(fewest, tiles.pop())
        if form not in models.GRAPHS or not placed:  # a data file in place keeps its name from the next one
            assert models.files_below(folder) == expected
        assert models.read_model(folder / name) == models.read_model(whole / name)
        assert not models.leftovers(folder)
        shutil.rmtree(folder)
    assert models.files_below(folder) == expected
    assert fewest == 0 < all_tiles


def _count_tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the tiles that this process merges, in the last number of a list."""
    from loraformat.engine import jobs

    counts, real = [0], jobs.merge_rows

    def counted(*arguments: Any) -> Any:
        counts[-1] += 1
        return real(*arguments)

    monkeypatch.setattr(jobs, "merge_rows", counted)
    return counts


@pytest.mark.parametrize("form", ["safetensors", also("folder")])
def test_each_killed_at_every_step(tmp_path: Path, forker: Forker, form: str) -> None:
    """A model stands whole or not at all; the next run makes what is missing and cleans up."""
    base = models.write_base(tmp_path / "in", form)
    adapters = [models.write_adapter(tmp_path / f"style{seed}", seed) for seed in (1, 2)]
    names = [f"style{seed}{base.suffix}" for seed in (1, 2)]
    loraformat.merge_each(base, adapters, tmp_path / "whole")
    wanted = {name: models.read_model(tmp_path / "whole" / name) for name in names}
    for number in _number():
        folder = tmp_path / f"out{number}"
        status = forker.run(number, "merge_each", base, adapters, folder)
        standing = [name for name in names if (folder / name).exists()]
        assert all(models.read_model(folder / name) == wanted[name] for name in standing)
        if not status:
            break
        loraformat.merge_each(base, adapters, folder, force=bool(standing))
        assert not models.leftovers(folder)
        assert {name: models.read_model(folder / name) for name in names} == wanted
        shutil.rmtree(folder)
    assert models.files_below(folder) == models.files_below(tmp_path / "whole")


def test_parts_of_a_running_process_are_left_alone(tmp_path: Path, forker: Forker) -> None:
    base, adapter = make_inputs(tmp_path / "in", "")
    out = tmp_path / "out"
    out.mkdir()
    running = out / f".merged.onnx.loraformat-{os.getpid()}-0123abcd.part"
    foreign = out / ".merged.onnx.part"
    for path in (running, foreign):
        path.write_bytes(b"in work")
    assert forker.attempt(0, base, adapter, out / "merged.onnx", force=False) == 0
    assert running.read_bytes() == foreign.read_bytes() == b"in work"


# --- interruption ----------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys, threading, time
import loraformat

class Progress:
    def start(self, total):
        self.lock, self.sent = threading.Lock(), False
    def advance(self, done):
        with self.lock:
            if not self.sent:
                self.sent = True
                os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # The main thread takes the signal while the workers are still at work.

signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background job would ignore it.
try:
    loraformat.merge(sys.argv[1], [sys.argv[2]], sys.argv[3], progress=Progress())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("form", ["", also("one"), also("safetensors")], ids=["onnx", "one", "safetensors"])
def test_an_interrupt_leaves_nothing(tmp_path: Path, form: str) -> None:
    base, adapter = make_inputs(tmp_path / "in", form)
    inputs = files_below(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", INTERRUPTED, base, adapter, out / f"merged{base.suffix}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert list(out.iterdir()) == []
    assert files_below(tmp_path / "in") == inputs


# --- a full disk -----------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
sys.dont_write_bytecode = True  # The cap would cut what other runs read.
from loraformat_cli.main import main

limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv[0] = "loraformat"
sys.exit(main())
"""


@pytest.mark.parametrize("form", [also(""), "one", also("safetensors")], ids=["onnx", "one", "safetensors"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "replacing"])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, form: str, old: bool) -> None:
    """A cap on the size of files stands in for a full disk: the kernel refuses the same calls."""
    base, adapter = make_inputs(tmp_path / "in", form)
    out = tmp_path / "out"
    out.mkdir()
    output = out / f"merged{base.suffix}"
    if old:
        loraformat.merge(base, [(adapter, 2.0)], output)
    before = files_below(out)
    arguments = ["merge", str(base), str(adapter), "-o", str(output), *(["--force"] if old else [])]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "1500", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 5, done.stderr
    assert "LF604" in done.stderr
    assert files_below(out) == before


MADE = {
    "convert": ["--to", "native", "-o", "out.safetensors"],
    "convert to a folder": ["--to", "peft", "-o", "out"],
    "convert to a torch file": ["--to", "peft", "-o", "adapter_model.bin"],
    "compose": ["-o", "out.safetensors"],
}


@contextmanager
def _capped(size_bytes: int) -> Iterator[None]:
    """Have the kernel refuse files of more bytes, as it refuses them in `LIMITED`."""
    limits, writes_none = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.dont_write_bytecode = writes_none


@pytest.mark.parametrize("command", MADE)
def test_a_full_disk_under_an_adapter_is_told_and_leaves_nothing(tmp_path: Path, command: str) -> None:
    """Containers write through plain files: their errors are the output's, not those of stdout."""
    _, adapter = make_inputs(tmp_path / "in", also("safetensors"))
    before = files_below(tmp_path)
    *options, name = MADE[command]
    arguments = [command.split()[0], str(adapter), *options, str(tmp_path / name)]
    with _capped(100):
        done = CliRunner().invoke(root, arguments)
    assert done.exit_code == 5, done.output
    assert "LF604" in done.stderr
    assert files_below(tmp_path) == before
    assert not (tmp_path / "out").exists()
