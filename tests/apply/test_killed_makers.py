"""What commands that make an adapter leave when they are killed at any of their writes and moves.

A child process makes everything once, so that all is imported, and forks for each attempt. Some kill themselves at the
n-th call that opens, moves or removes; others write behind a limit on the size of files, whose signal kills them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import models
from killing import KILL_AT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

FORKER = (
    f"{KILL_AT}"
    """
import json, os, resource, signal, sys
import loraformat

base, tuned, adapter, first = sys.argv[1:]
MAKERS = {
    "save": lambda out: loraformat.save(loraformat.load(adapter), out, force=True),
    "compose": lambda out: loraformat.save(loraformat.compose([adapter, adapter], rank=2), out, force=True),
    "stamp": lambda out: loraformat.save(loraformat.stamp(adapter, base), out, force=True),
    "extract": lambda out: loraformat.save(loraformat.extract(tuned, base, rank=2).adapter, out, force=True),
    "convert": lambda out: loraformat.convert(adapter, "native", out, force=True),
    "convert to a folder": lambda out: loraformat.convert(adapter, "peft", out, force=True),
}
FUNCTIONS = ("pwrite", "link", "replace", "rename", "unlink", "mkdir", "rmdir", "open")

def limit_to(size_bytes):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))

for maker, make in MAKERS.items():
    make(os.path.join(first, maker.replace(" ", "-")))
print("ready", flush=True)
for line in sys.stdin:
    maker, out, number, size_bytes = json.loads(line)
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            kill_at(number, FUNCTIONS) if size_bytes is None else limit_to(size_bytes)
            MAKERS[maker](out)
        except BaseException as error:
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
)

Fork = Callable[[str, Path, int, int | None], int]


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fork]:
    folder = tmp_path_factory.mktemp("makers")
    base, tuned = models.write_base(folder, "safetensors"), models.write_base(folder, "safetensors", "tuned", 5)
    adapter = models.write_adapter(folder / "style")
    (folder / "first").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", FORKER, base, tuned, adapter, folder / "first"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        source, sink = process.stdout, process.stdin
        assert source.readline() == "ready\n"

        def run(maker: str, out: Path, number: int, size_bytes: int | None) -> int:
            sink.write(f"{json.dumps([maker, str(out), number, size_bytes])}\n")
            sink.flush()
            return int(source.readline())

        yield run
        sink.close()
        assert process.wait(20) == 0


TENSORS = {"out", "out/adapter_model.safetensors"}
MAKERS = ("save", "compose", "stamp", "extract", "convert", "convert to a folder")


@pytest.mark.parametrize("maker", MAKERS)
def test_killed_at_every_step_the_old_output_stands_or_the_new_one(tmp_path: Path, fork: Fork, maker: str) -> None:
    whole = tmp_path / "whole" / "out"
    whole.parent.mkdir()
    assert fork(maker, whole, 0, None) == 0
    new = models.files_below(whole.parent)
    largest = max(map(len, new.values()))
    attempts = [(number, None) for number in range(1, 60)] + [(0, size) for size in (0, largest // 2, largest - 1)]
    ended = set()
    for number, size in attempts:
        place = tmp_path / "attempt"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole.parent, place)
        old = dict.fromkeys(new, b"old")
        for name, data in old.items():
            (place / name).write_bytes(data)
        status = fork(maker, place / "out", number, size)
        ended.add(status)
        found = {name: data for name, data in models.files_below(place).items() if ".loraformat-" not in name}
        assert found in (old, new) or not found.keys() & TENSORS
        if size is not None:
            assert (status, found) == (-signal.SIGXFSZ, old)
        assert fork(maker, place / "out", 0, None) == 0
        assert models.files_below(place) == new
        if status == 0:
            break
    assert ended >= {0, -signal.SIGKILL}


@pytest.mark.parametrize("maker", MAKERS)
def test_killed_at_a_write_nothing_new_stands(tmp_path: Path, fork: Fork, maker: str) -> None:
    assert fork(maker, tmp_path / "out", 0, 64) == -signal.SIGXFSZ
    assert [name for name in models.files_below(tmp_path) if ".loraformat-" not in name] == []
    assert fork(maker, tmp_path / "out", 0, None) == 0
    assert models.leftovers(tmp_path) == []
