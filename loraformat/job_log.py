"""Which jobs of a merge are done, in a file beside its output, for a run that takes up a killed one.

Each line is a JSON list: the job's key and its sums. The first line binds the log to a plan, to the inputs as they are
and to the boot of the machine: a kill loses nothing that was written, a power cut may.
"""

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Final

from loraformat.limits import MAX_CONFIG_BYTES
from loraformat.outputs import output_errors, remove
from loraformat.plan import Plan
from loraformat.spans import InputFile, read_small
from loraformat.strict_json import JsonValue, parse_json, write_canonical
from loraformat.tiles import TileSums

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class FileJobLog:
    """A log of jobs, as `engine.JobLog`; use as a context manager.

    Args:
        path: the log's file.
        plan: what is carried out.
        inputs: the files that it is carried out with.
    """

    def __init__(self, path: Path, plan: Plan, inputs: Iterable[InputFile]) -> None:
        self._path = path
        self._head = _describe(plan, inputs)
        self._done: dict[str, TileSums] = {}
        self._lock = threading.Lock()
        lines = _read_lines(path)
        if lines and lines[0] == self._head:
            self._done = {str(key): _parse_sums(sums) for key, *sums in lines[1:]}
        with output_errors(path):
            self._stream = open(path, "wb", buffering=0)  # noqa: SIM115  closed by the context
        for line in (self._head, *(_write_sums(key, sums) for key, sums in self._done.items())):
            self._write(line)

    @property
    def finished(self) -> int:
        """How many jobs an earlier run had done."""
        return len(self._done)

    def __enter__(self) -> "FileJobLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def recall(self, key: str) -> TileSums | None:
        """Return the sums of a job that is done, None for one that is not."""
        return self._done.get(key)

    def note(self, key: str, sums: TileSums) -> None:
        """Write down that the bytes of a job are in their file."""
        with self._lock:
            self._write(_write_sums(key, sums))

    def discard(self) -> None:
        """Remove the log: the output stands."""
        remove(self._path)

    def _write(self, line: JsonValue) -> None:
        with output_errors(self._path):
            self._stream.write(write_canonical(line) + b"\n")


def _describe(plan: Plan, inputs: Iterable[InputFile]) -> list[JsonValue]:
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    states = [(str(file.path), os.fstat(file.descriptor)) for file in inputs]
    told = [[path, str(state.st_size), str(state.st_mtime_ns), str(state.st_ino)] for path, state in states]
    return [plan.sha256, boot, *told]


def _write_sums(key: str, sums: TileSums) -> list[JsonValue]:
    """Return a line; numbers as text, since sums may be infinite."""
    return [key, *map(str, astuple(sums))]


def _parse_sums(numbers: Sequence[JsonValue]) -> TileSums:
    kept, wanted, base, overflowed, not_finite, error = map(str, numbers)
    return TileSums(float(kept), float(wanted), float(base), int(overflowed), int(not_finite), float(error))


def _read_lines(path: Path) -> list[list[JsonValue]]:
    """Return the whole lines of a log; the last one may have been cut off."""
    if not path.exists():
        return []
    lines = read_small(path, 10 * MAX_CONFIG_BYTES).split(b"\n")[:-1]
    parsed = [parse_json(line, path) for line in lines]
    return [line for line in parsed if isinstance(line, list)]
