"""Seconds and error of extracting a LoRA from a full fine-tune, beside a full SVD of the same difference, from one run.

    python bench/extract.py                                # 4096 x 4096, ranks 16 and 64
    python bench/extract.py --rows 2048 --columns 5504 --rank 32 --threads 1

Both models are safetensors files with one weight in bfloat16; the difference has the spectrum of `--decay`: singular
values i^-decay, as full fine-tunes have them, plus what rounding to bfloat16 adds. Ours is the whole call of
`loraformat.extract`, files and fingerprints included; the peer is `numpy.linalg.svd` (LAPACK gesdd, as in torch) of the
difference alone, already in memory, once for all ranks. Errors are ||D - BA|| / ||D|| in float64, from the factors.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_limits

import loraformat

NAME = "model.layers.0.self_attn.q_proj.weight"


def write_models(folder: Path, rows: int, columns: int, decay: float) -> tuple[Path, Path]:
    """Write `tuned.safetensors` and `base.safetensors`."""
    rng = np.random.default_rng(0)
    base = (0.02 * rng.standard_normal((rows, columns), np.float32)).astype(ml_dtypes.bfloat16)
    count = min(rows, columns)
    values = np.arange(1, count + 1, dtype=np.float32) ** np.float32(-decay)
    left = rng.standard_normal((rows, count), np.float32) * values
    difference = left @ rng.standard_normal((count, columns), np.float32)
    difference *= 0.002 / difference.std()
    tuned = (base.astype(np.float32) + difference).astype(ml_dtypes.bfloat16)
    for name, weight in (("base", base), ("tuned", tuned)):
        save_file({NAME: weight}, str(folder / f"{name}.safetensors"))
    return folder / "tuned.safetensors", folder / "base.safetensors"


def read_difference(tuned: Path, base: Path) -> NDArray[np.float32]:
    """Return tuned - base in float32."""
    return load_file(tuned)[NAME].astype(np.float32) - load_file(base)[NAME].astype(np.float32)


def measure_error(difference: NDArray[np.float32], up: NDArray[np.float32], down: NDArray[np.float32]) -> float:
    """Return ||D - BA|| / ||D|| in float64, some rows at a time."""
    left, whole = 0.0, 0.0
    for start in range(0, len(difference), 256):
        rows = difference[start : start + 256].astype(np.float64)
        rest = rows - up[start : start + 256].astype(np.float64) @ down.astype(np.float64)
        left, whole = left + float(np.vdot(rest, rest)), whole + float(np.vdot(rows, rows))
    return float(np.sqrt(left / whole))


def run_ours(
    tuned: Path, base: Path, rank: int, repeats: int
) -> tuple[float, NDArray[np.float32], NDArray[np.float32]]:
    """Return the median seconds of an extraction, and B and A."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        extraction = loraformat.extract(tuned, base, rank=rank)
        (target,) = extraction.adapter.targets
        down, up = (target.factors[role].read() for role in ("lora_A.weight", "lora_B.weight"))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), up * np.float32(target.scale), down


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--decay", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="threads of BLAS, for both")
    options = parser.parse_args()
    with threadpool_limits(limits=options.threads):
        run(options)


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        tuned, base = write_models(Path(name), options.rows, options.columns, options.decay)
        difference = read_difference(tuned, base)
        ours = {rank: run_ours(tuned, base, rank, options.repeats) for rank in options.rank}
    start = time.perf_counter()
    left, values, right = np.linalg.svd(difference, full_matrices=False)
    full = time.perf_counter() - start
    print(
        json.dumps(
            {"rows": options.rows, "columns": options.columns, "decay": options.decay, "full_svd_s": round(full, 2)}
        )
    )
    for rank, (seconds, up, down) in ours.items():
        error = measure_error(difference, up, down)
        best = measure_error(difference, left[:, :rank] * values[:rank], right[:rank])
        line = {"rank": rank, "ours_s": round(seconds, 2), "times_faster": round(full / seconds, 1)}
        line |= {"error": round(error, 5), "full_svd_error": round(best, 5), "error_ratio": round(error / best, 5)}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
