"""What it costs to change the adapter of a model on onnxruntime: time, and memory of two sessions on one base.

    python bench/switching.py                                  # 4 layers of 1024
    python bench/switching.py --layers 1 --width 64 --rounds 2    # does it run?

The model is that of `latency.py`, and so are the adapters: of rank 8, on the modules that `--modules` names. Timed,
from two adapters on disk to a session that has run once:
  load a merged file    of a model that was merged before: the least that a new file costs
  merge a file, load it
  thin merge, load it   the same with `external_data="share"`
  session               `loraformat.runtime.session`, the base opened anew
  switch                its `.switch`
  switch, kept          `.switch` with `keep_merged`, to weights that a living session has kept
  switch, unpacked      `.switch` with `session.disable_prepacking`: onnxruntime leaves weights in the order they have
  run once              the run alone that is part of all of them

Memory is what a process of its own has more after making sessions and running each once, than after its imports: all
of it, and what of it no other process can share (resident and private in /proc/self/smaps_rollup; Linux alone has it).
`inline` is the base in one file, its weights inside.
"""

import argparse
import gc
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from latency import build, build_adapter, make_options

import loraformat
import loraformat.runtime

PROVIDERS = ["CPUExecutionProvider"]


def unpacked(threads: int) -> onnxruntime.SessionOptions:
    options = make_options(threads)
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def make_feeds(width: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(3).standard_normal((1, 8, width)).astype(np.float32)
    return {"x": x, "mask": np.triu(np.full((8, 8), -1e9, np.float32), 1)}


class Ways:
    """The ways to a session with another adapter.

    Args:
        folder: with `base.onnx`, `merged0.onnx`, `merged1.onnx`, `adapter0` and `adapter1`.
        threads: of onnxruntime.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.base = folder / "base.onnx"
        self.adapters = [folder / "adapter0", folder / "adapter1"]

    def open(self, path: Path, *, pack: bool = True) -> Any:
        options = (make_options if pack else unpacked)(self.threads)
        return onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)

    def session(self, *, pack: bool = True, keep: bool = False) -> Any:
        options = (make_options if pack else unpacked)(self.threads)
        return loraformat.runtime.session(
            self.base, self.adapters[:1], providers=PROVIDERS, session_options=options, keep_merged=keep
        )

    def merge(self, name: str, **options: Any) -> Any:
        loraformat.merge(self.base, self.adapters[1:], self.folder / name, force=True, **options)
        return self.open(self.folder / name)


def time_ways(ways: Ways, rounds: int, feeds: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Return the milliseconds of each way, which take turns."""
    packed, plain, kept = ways.session(), ways.session(pack=False), ways.session(keep=True)
    loaded = [loraformat.load(path) for path in ways.adapters]
    once: dict[str, Callable[[], Any]] = {
        "load a merged file": lambda: ways.open(ways.folder / "merged1.onnx"),
        "merge a file, load it": lambda: ways.merge("again.onnx"),
        "thin merge, load it": lambda: ways.merge("thin.onnx", external_data="share"),
        "session": ways.session,
        "switch": lambda: packed.switch(loaded[1:]),
        "switch, kept": lambda: kept.switch(loaded[:1]),
        "switch, unpacked": lambda: plain.switch(loaded[1:]),
        "run once": lambda: packed,
    }
    found: dict[str, list[float]] = {name: [] for name in once}
    for number in range(rounds + 1):
        for name, make in once.items():
            gc.collect()
            start = time.perf_counter()
            session = make()
            session.run(None, feeds)
            if number:  # The first round warms what stays.
                found[name].append(1000 * (time.perf_counter() - start))
            del session
    return found


def report_times(found: dict[str, list[float]]) -> None:
    print(f"{len(found['session'])} rounds, load {os.getloadavg()[0]:.1f}")
    print(f"  {'':22} {'median':>9} {'least':>9} {'most':>9}")
    for name, times in found.items():
        print(f"  {name:22} {statistics.median(times):6.0f} ms {min(times):6.0f} ms {max(times):6.0f} ms")


def make_sessions(ways: Ways, kind: str) -> list[Any]:
    """Return the sessions whose memory a process measures."""
    return {
        "one merged file": lambda: [ways.open(ways.folder / "merged0.onnx")],
        "two merged files": lambda: [ways.open(ways.folder / f"merged{number}.onnx") for number in (0, 1)],
        "one in memory": lambda: [ways.session()],
        "two in memory": lambda: _pair(ways.session(), ways),
        "two in memory, kept": lambda: _pair(ways.session(keep=True), ways),
        "two merged files, unpacked": lambda: [
            ways.open(ways.folder / f"merged{number}.onnx", pack=False) for number in (0, 1)
        ],
        "one in memory, unpacked": lambda: [ways.session(pack=False)],
        "two in memory, unpacked": lambda: _pair(ways.session(pack=False), ways),
        "base twice, unpacked": lambda: [ways.open(ways.base, pack=False) for _ in range(2)],
        "base inline, twice, unpacked": lambda: [ways.open(ways.folder / "inline.onnx", pack=False) for _ in range(2)],
        "the same, by session": lambda: _pair_inline(ways),
    }[kind]()


KINDS = (
    "one merged file",
    "two merged files",
    "one in memory",
    "two in memory",
    "two in memory, kept",
    "two merged files, unpacked",
    "one in memory, unpacked",
    "two in memory, unpacked",
    "base twice, unpacked",
    "base inline, twice, unpacked",
    "the same, by session",
)


def _pair(session: Any, ways: Ways) -> list[Any]:
    return [session, session.switch(ways.adapters[1:])]


def _pair_inline(ways: Ways) -> list[Any]:
    session = loraformat.runtime.session(
        ways.folder / "inline.onnx", providers=PROVIDERS, session_options=unpacked(ways.threads)
    )
    return [session, session.switch()]


def read_memory() -> tuple[float, float]:
    """Return resident and private memory of this process, in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in lines}
    return sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


def measure_memory(ways: Ways, kind: str, width: int) -> None:
    """Print what sessions take: to be called in a process of its own."""
    importlib.import_module("loraformat.runtime._adapted_session")
    before = read_memory()
    sessions = make_sessions(ways, kind)
    for session in sessions:
        session.run(None, make_feeds(width))
    gc.collect()
    after = read_memory()
    print(*(f"{now - then:.0f}" for now, then in zip(after, before, strict=True)))


def report_memory(folder: Path, arguments: argparse.Namespace) -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        return
    print(f"memory, base of {(folder / 'base.onnx.data').stat().st_size / 1e6:.0f} MB")
    print(f"  {'':28} {'resident':>9} {'private':>9}")
    for kind in KINDS:
        call = [sys.executable, __file__, "--memory-of", kind, "--folder", str(folder)]
        call += ["--width", str(arguments.width), "--threads", str(arguments.threads)]
        resident, private = subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()
        print(f"  {kind:28} {resident:>6} MB {private:>6} MB")


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Write base, adapters and merged files."""
    base = build(folder / "base.onnx", "base", arguments.layers, arguments.width, 8)
    onnx.save(onnx.load(base), folder / "inline.onnx")
    for number in range(2):
        adapter = build_adapter(
            folder / f"adapter{number}", arguments.layers, arguments.width, 2 + number, arguments.modules
        )
        loraformat.merge(base, [adapter], folder / f"merged{number}.onnx")


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--modules", default="q,k,v,o,up,down", help="that the adapters change")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(Ways(arguments.folder, arguments.threads), arguments.memory_of, arguments.width)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments)
        ways = Ways(folder, arguments.threads)
        report_times(time_ways(ways, arguments.rounds, make_feeds(arguments.width)))
        report_memory(folder, arguments)


if __name__ == "__main__":
    main()
