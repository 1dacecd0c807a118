"""Which jobs of a merge are done, in a file beside its output, for a run that takes up a killed one.

Each line is a JSON list: the job's key and its sums. The first line binds the log to a plan, to the inputs as they are
and to the boot of the machine: a kill loses nothing that was written, a power cut may.
"""

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from types import TracebackType
from typing import Final, TypeAlias

from loraformat.engine.tile_sums import TileSums
from loraformat.errors import LoraformatError
from loraformat.files import write_at
from loraformat.outputs import may_resume, output_errors, remove
from loraformat.parts import open_part
from loraformat.plan import Plan
from loraformat.spans import InputFile
from loraformat.strict_json import JsonValue, parse_json, write_canonical

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")

Head: TypeAlias = list[JsonValue]
"""What a log's first line says of the work that it is of."""


class FileJobLog:
    """A log of jobs, as `jobs.JobLog`; use as a context manager, which removes it unless the run may be resumed.

    Args:
        path: the log's file; a log that stands there is overwritten.
        head: what binds it to the work.
        done: jobs that are done already.
    """

    def __init__(self, path: Path, head: Head, done: Mapping[str, TileSums]) -> None:
        self._path = path
        self._done = dict(done)
        self._lock = threading.Lock()
        lines = (head, *(_write_sums(key, sums) for key, sums in self._done.items()))
        with output_errors(path):
            self._descriptor = open_part(path, taken_up=True)
            os.ftruncate(self._descriptor, 0)
        self._end = 0
        self._write(b"".join(write_canonical(line) + b"\n" for line in lines))

    def __enter__(self) -> "FileJobLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        if not may_resume(error):
            remove(self._path)

    def recall(self, key: str) -> TileSums | None:
        """Return the sums of a job that is done, None for one that is not."""
        return self._done.get(key)

    def note(self, key: str, sums: TileSums) -> None:
        """Write down that the bytes of a job are in their file."""
        with self._lock:
            self._write(write_canonical(_write_sums(key, sums)) + b"\n")

    def _write(self, data: bytes) -> None:
        with output_errors(self._path):
            write_at(self._descriptor, data, self._end)
        self._end += len(data)


def describe_work(plan: Plan, inputs: Iterable[InputFile]) -> Head:
    """Return what binds a log to a plan, to the inputs as they are and to the boot of the machine."""
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    states = [(ascii(str(file.path)), os.fstat(file.descriptor)) for file in inputs]
    told = [[path, str(state.st_size), str(state.st_mtime_ns), str(state.st_ino)] for path, state in states]
    return [plan.sha256, boot, *told]


def read_log(path: Path, plan: Plan, inputs: Iterable[InputFile]) -> dict[str, TileSums]:
    """Return the jobs that a log of the same work says are done; it ends at the first line that is none of ours."""
    done: dict[str, TileSums] = {}
    if not path.is_file():
        return done
    with path.open("rb") as stream:
        if _read_line(stream.readline(), path) != describe_work(plan, inputs):
            return done
        for line in stream:
            parsed = _read_line(line, path)
            sums = _parse_sums(parsed[1:])
            if sums is None:
                break
            done[str(parsed[0])] = sums
    return done


def _write_sums(key: str, sums: TileSums) -> list[JsonValue]:
    """Return a line; numbers as text, since sums may be infinite."""
    return [key, *map(str, astuple(sums))]


def _parse_sums(numbers: Sequence[JsonValue]) -> TileSums | None:
    try:
        kept, wanted, base, overflowed, not_finite, error = map(str, numbers)
        return TileSums(float(kept), float(wanted), float(base), int(overflowed), int(not_finite), float(error))
    except ValueError:
        return None


def _read_line(line: bytes, path: Path) -> list[JsonValue]:
    """Return a whole line, nothing for one that was cut off or is none of ours."""
    try:
        parsed = parse_json(line, path) if line.endswith(b"\n") else []
    except LoraformatError:
        return []
    return parsed if isinstance(parsed, list) else []
