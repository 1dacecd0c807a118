"""What a merge leaves when it is killed, interrupted, or runs out of disk; and how much memory it takes.

A child process imports the package once and forks for each attempt; the fork kills itself at the n-th call of a
function that writes or moves, for every n until the merge completes.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import loraformat
from builders import write_peft, write_tensors
from graphs import dyadic, dyadic_factors, linear_net, read_state, stored_weights, write_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

NAMES = ("layers.0.fc", "layers.1.fc")
SHAPE = (30, 20)

FORKER = """
import os, signal, sys
import loraformat
import loraformat.plan, loraformat.apply, loraformat.bases.onnx_graph, loraformat.bases.checkpoint, onnx, threadpoolctl

FUNCTIONS = ("pwrite", "copy_file_range", "link", "replace", "unlink")

def attempt(number, base, adapter, output, force):
    calls = 0
    def patch(name):
        real = getattr(os, name)
        def counted(*arguments, **more):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)
        setattr(os, name, counted)
    for name in FUNCTIONS:
        if hasattr(os, name):
            patch(name)
    loraformat.merge(base, [adapter], output, force=force == "force", jobs=1)

for line in sys.stdin:
    number, *rest = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if not child:
        try:
            attempt(int(number), *rest)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
"""


@dataclass
class Forker:
    """A process that forks for each attempt."""

    process: "subprocess.Popen[str]"

    def attempt(self, number: int, base: Path, adapter: Path, output: Path, *, force: bool) -> int:
        """Merge, killed at call `number`; return the exit code, negative for the signal."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = "\t".join([str(number), str(base), str(adapter), str(output), "force" if force else ""])
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def _forking() -> Iterator[Forker]:
    with subprocess.Popen(
        [sys.executable, "-c", FORKER],
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
def forker() -> Iterator[Forker]:
    with _forking() as made:
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


@pytest.mark.parametrize("old", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("form", ["", "one", "many", "safetensors"], ids=["onnx", "one", "many", "safetensors"])
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


@pytest.mark.parametrize("form", ["", "one", "safetensors"], ids=["onnx", "one", "safetensors"])
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
from loraformat_cli.main import main

limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv[0] = "loraformat"
sys.exit(main())
"""


@pytest.mark.parametrize("form", ["", "one", "safetensors"], ids=["onnx", "one", "safetensors"])
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


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURED = """
import sys
from pathlib import Path
import loraformat

receipt = loraformat.merge(sys.argv[1], [sys.argv[2]], sys.argv[3], jobs=4)
assert len(receipt.weights) == 3, receipt
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(peak.split()[1])
"""
"""Not ru_maxrss: Linux lets a new process begin with the peak of the one that started it."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """300 MB of weights, two thirds of it rewritten, in a process that stays below 200 MB with all its imports."""
    rng = np.random.default_rng(62)
    rows, columns = 4096, 4096
    nbytes = rows * columns * 4
    names = [f"layers.{index}.fc" for index in range(4)]
    small = {name: np.zeros((1, columns), np.float32) for name in names}
    path = write_model(tmp_path / "base.onnx", linear_net(small, "named").model(), "one")
    _enlarge(path, rows, nbytes)
    assert (tmp_path / "base.onnx.data").stat().st_size == 4 * nbytes > 250_000_000
    factors = {
        name: (rng.standard_normal((8, columns)).astype(np.float32), rng.standard_normal((rows, 8)).astype(np.float32))
        for name in names[:3]
    }
    adapter = write_peft(tmp_path / "style", factors)
    output = tmp_path / "merged.onnx"
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, path, adapter, output], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) * 1024 < 200_000_000
        with (tmp_path / "merged.onnx.data").open("rb") as data:
            first = np.frombuffer(data.read(4 * columns), np.float32)
            data.seek(3 * nbytes)
            assert not any(data.read(1 << 20))
        down, up = factors[names[0]]
        np.testing.assert_allclose(first, 2 * up[0].astype(np.float64) @ down, rtol=1e-4, atol=1e-4)
    finally:
        for name in ("base.onnx.data", "merged.onnx.data"):
            (tmp_path / name).unlink(missing_ok=True)


def _enlarge(path: Path, rows: int, nbytes: int) -> None:
    """Give every weight `rows` rows of zeros, in a data file full of holes."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for index, tensor in enumerate(model.graph.initializer):
        tensor.dims[0] = rows
        for entry in tensor.external_data:
            if entry.key in {"offset", "length"}:
                entry.value = str(index * nbytes if entry.key == "offset" else nbytes)
    path.write_bytes(model.SerializeToString())
    os.truncate(f"{path}.data", len(model.graph.initializer) * nbytes)
