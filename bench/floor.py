"""What a merge of LoRA into bfloat16 shards costs when nothing is asked of it: the numpy calls and the system's.

    python bench/floor.py BASE ADAPTER OUTPUT

No names are resolved, no number is checked, nothing is refused, reported, resumed or moved into place last: files are
reserved, untouched bytes copied inside the kernel, and workers read a tile, add B @ A to it, round and write it.
`merge_checkpoint.py` runs this beside the real merge. Printed are seconds and the peak memory in KB.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits

TILE_NUMBERS = 1 << 19
WRITE_BYTES = 256 << 10
COPY_BYTES = 64 << 20
ALPHA_OVER_RANK = np.float32(2)

Job = Callable[[], None]
held = threading.local()


def list_jobs(base: Path, output: Path, factors: dict[str, np.ndarray]) -> Iterator[Job]:
    """Yield what there is to do, file by file; makes the output files."""
    for path in sorted(base.iterdir()):
        source = os.open(path, os.O_RDONLY)
        sink = os.open(output / path.name, os.O_RDWR | os.O_CREAT)
        size = os.fstat(source).st_size
        os.posix_fallocate(sink, 0, size)
        if path.suffix != ".safetensors":
            yield copy(source, sink, 0, size)
            continue
        start = 8 + int.from_bytes(os.pread(source, 8, 0), "little")
        header = json.loads(os.pread(source, start - 8, 8))
        yield copy(source, sink, 0, start)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            module = f"base_model.model.{name.removesuffix('.weight')}"
            begin, end = (start + offset for offset in entry["data_offsets"])
            if f"{module}.lora_A.weight" not in factors:
                yield copy(source, sink, begin, end)
                continue
            a = factors[f"{module}.lora_A.weight"]
            b = factors[f"{module}.lora_B.weight"] * ALPHA_OVER_RANK
            step = max(1, TILE_NUMBERS // a.shape[1])
            for row in range(0, b.shape[0], step):
                yield merge(source, sink, begin + row * a.shape[1] * 2, b[row : row + step], a)


def copy(source: int, sink: int, begin: int, end: int) -> Job:
    """Return the copying of bytes."""

    def work() -> None:
        done = begin
        while done < end:
            done += os.copy_file_range(source, sink, min(COPY_BYTES, end - done), done, done)

    return work


def merge(source: int, sink: int, offset: int, b: np.ndarray, a: np.ndarray) -> Job:
    """Return the merge of one tile."""

    def work() -> None:
        if not hasattr(held, "stored"):
            held.stored = np.empty(TILE_NUMBERS, ml_dtypes.bfloat16)
            held.sums = np.empty(TILE_NUMBERS, np.float32)
        shape = (b.shape[0], a.shape[1])
        stored, sums = (array[: shape[0] * shape[1]].reshape(shape) for array in (held.stored, held.sums))
        view = memoryview(stored.reshape(-1).view(np.uint8))
        os.preadv(source, [view], offset)
        np.matmul(b, a, out=sums)
        np.add(stored, sums, out=sums, dtype=np.float32)
        np.copyto(stored, sums, casting="unsafe")
        for start in range(0, len(view), WRITE_BYTES):
            os.pwrite(sink, view[start : start + WRITE_BYTES], offset + start)

    return work


def main() -> None:
    """Merge, and print what was measured."""
    base, adapter, output = map(Path, sys.argv[1:])
    start = time.perf_counter()
    output.mkdir()
    jobs = list_jobs(base, output, load_file(str(adapter / "adapter_model.safetensors")))
    lock = threading.Lock()

    def take() -> Job | None:
        with lock:
            return next(jobs, None)

    def work() -> None:
        while (job := take()) is not None:
            job()

    with threadpool_limits(limits=1):
        workers = [threading.Thread(target=work) for _ in range(len(os.sched_getaffinity(0)))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    seconds = time.perf_counter() - start
    peak_kb = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(seconds, peak_kb[1] if peak_kb else 0)


if __name__ == "__main__":
    main()
