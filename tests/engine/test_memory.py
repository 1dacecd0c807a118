"""How much memory merging, writing anew and proving take: no more for a large model than for a small one.

The peak of a process of its own is read from `VmHWM`, not `ru_maxrss`: Linux lets a new process begin with the peak of
the one that started it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import write_peft
from graphs import linear_net, write_model

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")

MEASURED = """
import json, sys
from pathlib import Path
import loraformat

act, arguments, options = json.loads(sys.argv[1])
found = getattr(loraformat, act)(*arguments, jobs=4, **options)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
count = found.weights if act == "verify" else len(found.weights)
assert act != "verify" or found.holds, found
print(json.dumps([count, int(peak.split()[1]) * 1024]))
"""


def measure(act: str, *arguments: Any, **options: Any) -> tuple[int, int]:
    """Call a function of the face in a process of its own; return the number of merged weights and its peak, bytes."""
    asked = json.dumps([act, arguments, options], default=str)
    done = subprocess.run([sys.executable, "-c", MEASURED, asked], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    count, peak_bytes = json.loads(done.stdout)
    return count, peak_bytes


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
        count, peak_bytes = measure("merge", path, [adapter], output)
        assert count == 3
        assert peak_bytes < 200_000_000
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


ROWS, COLUMNS = 4096, 4096
NBYTES = ROWS * COLUMNS * 4


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, int]]) -> Path:
    """Write a state dict of float32 zeros that are holes of the file."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + shape[0] * shape[1] * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def test_writing_anew_and_proving_do_not_grow_with_the_model(tmp_path: Path) -> None:
    """270 MB of weights: half of them merged, all written in another form, and all of it proven."""
    rng = np.random.default_rng(63)
    names = [f"layers.{index}.fc" for index in range(4)]
    base = write_sparse(tmp_path / "base.safetensors", {f"{name}.weight": (ROWS, COLUMNS) for name in names})
    assert base.stat().st_size > 4 * NBYTES > 250_000_000
    factors = {
        name: (rng.standard_normal((8, COLUMNS)).astype(np.float32), rng.standard_normal((ROWS, 8)).astype(np.float32))
        for name in names[:2]
    }
    adapter, output = write_peft(tmp_path / "style", factors), tmp_path / "merged.safetensors"
    try:
        for act, arguments, options in (
            ("merge", (base, [adapter], output), {"dtype": "bfloat16"}),
            ("verify", (output, base, [adapter]), {}),
        ):
            count, peak_bytes = measure(act, *arguments, **options)
            assert count == 2
            assert peak_bytes < 200_000_000, act
        assert output.stat().st_size > 2 * NBYTES
    finally:
        base.unlink()
        output.unlink(missing_ok=True)
