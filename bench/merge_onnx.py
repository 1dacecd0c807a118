"""Seconds and memory of a merge into an ONNX model, beside `cp` of the same files, from one run.

    python bench/merge_onnx.py            # 1 GB
    python bench/merge_onnx.py --gb 4
    python bench/merge_onnx.py --inline   # weights inside the .onnx file
    python bench/merge_onnx.py --export   # also PEFT merge and torch export again (export_again.py); needs torch

The model is Llama-shaped: an embedding of 32,000 tokens, layers (MatMul only) as the size asks for, and a head, of
random numbers. The adapter has rank 16 on every matrix of the layers. Files lie in the page cache. `cp` and the merge
take turns, and so does the merge that shares the base's data file (`--external-data share`), beside `cp` of as many
bytes as it writes. Printed are medians and ratios, for the whole process and for the call of `loraformat.merge` inside
it, the first and, in a process that merged before, the second (modules are imported where they are first needed), and
the peak memory of the process as Linux accounts for it (VmHWM; ru_maxrss would hold this script's own), interpreter
included.
"""

import argparse
import collections
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

HIDDEN, INNER, RANK, TOKENS = 2048, 5504, 16, 32_000
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // 4),
    "self_attn.v_proj": (HIDDEN, HIDDEN // 4),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
FORMS = {
    "float32": (TensorProto.FLOAT, 4),
    "float16": (TensorProto.FLOAT16, 2),
    "bfloat16": (TensorProto.BFLOAT16, 2),
}
MERGE = """
import re, sys, time
import onnx
from loraformat import merge
for output in sys.argv[3:]:
    start = time.perf_counter()
    merge(sys.argv[1], [sys.argv[2]], output, jobs={jobs}, external_data={data!r})
    seconds = time.perf_counter() - start
print(seconds, re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def list_weights(total_bytes: int, itemsize: int) -> list[tuple[str, tuple[int, int]]]:
    """Return module paths and shapes `(in, out)` of whole layers that add up to about `total_bytes`."""
    layer_bytes = sum(rows * columns for rows, columns in MATRICES.values()) * itemsize
    layers = max(1, round((total_bytes - 2 * TOKENS * HIDDEN * itemsize) / layer_bytes))
    return [(f"model.layers.{i}.{name}", shape) for i in range(layers) for name, shape in MATRICES.items()]


def write_numbers(path: Path, sizes: list[int]) -> None:
    """Append random numbers to a file: one block repeated, since its content does not matter for time."""
    block = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float16).tobytes()
    with path.open("wb") as sink:
        for size in sizes:
            for start in range(0, size, len(block)):
                sink.write(block[: min(len(block), size - start)])


def build_base(folder: Path, total_bytes: int, form: str, *, inline: bool) -> Path:
    """Write `base.onnx` with its weights in `base.onnx.data`, or inside."""
    code, itemsize = FORMS[form]
    weights = [("model.embed_tokens", (TOKENS, HIDDEN)), *list_weights(total_bytes, itemsize)]
    weights.append(("lm_head", (HIDDEN, TOKENS)))
    sizes = [rows * columns * itemsize for _, (rows, columns) in weights]
    write_numbers(folder / "base.onnx.data", sizes)
    nodes, initializers, offset = [], [], 0
    for index, ((path, shape), size) in enumerate(zip(weights, sizes, strict=True)):
        tensor = TensorProto(name=f"onnx::MatMul_{index}", data_type=code, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "base.onnx.data"), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        offset += size
        initializers.append(tensor)
        nodes.append(make_node(path, shape, tensor.name, index))
    inputs = [helper.make_tensor_value_info(f"x{width}", code, ["n", width]) for width in (HIDDEN, INNER)]
    inputs.append(helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n"]))
    outputs = [helper.make_tensor_value_info(f"y{i}", code, ["n", shape[1]]) for i, (_, shape) in enumerate(weights)]
    model = helper.make_model(helper.make_graph(nodes, "bench", inputs, outputs, initializers))
    base = folder / "base.onnx"
    onnx.save(onnx.load_from_string(model.SerializeToString()), str(base)) if not inline else _save_inline(model, base)
    return base


def make_node(path: str, shape: tuple[int, int], weight: str, index: int) -> onnx.NodeProto:
    """Return the node that applies a weight, named as torch's TorchScript exporter does."""
    scope = "/" + path.replace("layers.", "layers#").replace(".", "/").replace("#", ".")
    if shape[0] == TOKENS:
        return helper.make_node("Gather", [weight, "tokens"], [f"y{index}"], name=f"{scope}/Gather")
    return helper.make_node("MatMul", [f"x{shape[0]}", weight], [f"y{index}"], name=f"{scope}/MatMul")


def _save_inline(model: onnx.ModelProto, base: Path) -> None:
    """Write the model with its data inside; below the 2 GB that protobuf libraries can write."""
    data = base.with_name("base.onnx.data")
    numbers, offset = data.read_bytes(), 0
    for tensor in model.graph.initializer:
        size = next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = numbers[offset : offset + size]
        offset += size
    data.unlink()
    base.write_bytes(model.SerializeToString())


def build_adapter(folder: Path, total_bytes: int, itemsize: int) -> Path:
    """Write a PEFT folder of rank 16 on every matrix."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    tensors = {}
    for path, (inner, outer) in list_weights(total_bytes, itemsize):
        tensors[f"base_model.model.{path}.lora_A.weight"] = rng.standard_normal((RANK, inner), np.float32) * 0.02
        tensors[f"base_model.model.{path}.lora_B.weight"] = rng.standard_normal((outer, RANK), np.float32) * 0.02
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(tensors, str(adapter / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": sorted(MATRICES)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


def time_cp(base: Path, folder: Path) -> float:
    """Return the seconds that `cp` takes for all files of the base, into new files."""
    target = folder / "cp"
    target.mkdir()
    files = sorted(str(path) for path in base.parent.glob("base.onnx*"))
    start = time.perf_counter()
    subprocess.run(["cp", *files, str(target)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def time_touched(touched: int, folder: Path) -> float:
    """Return the seconds that `cp` takes for as many bytes as a merge touches."""
    source, target = folder / "touched", folder / "touched-copy"
    if not source.exists():
        write_numbers(source, [touched])
    start = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def time_merge(
    base: Path, adapter: Path, folder: Path, jobs: int | None, data: str = "copy", calls: int = 1
) -> tuple[float, float, int]:
    """Return the seconds of a whole process, those of the last of its merges, and its peak memory in bytes."""
    target = folder / "merged" if data == "copy" else base.parent
    target.mkdir(exist_ok=True)
    outputs = [str(target / f"merged{number}.onnx") for number in range(calls)]
    command = [sys.executable, "-c", MERGE.format(jobs=jobs, data=data), str(base), str(adapter), *outputs]
    start = time.perf_counter()
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    for path in target.glob("merged*.onnx*"):
        path.unlink()
    inside, peak = result.stdout.split()
    return seconds, float(inside), int(peak) * 1024


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of the model (default 1)")
    parser.add_argument("--form", choices=sorted(FORMS), default="float32")
    parser.add_argument("--inline", action="store_true", help="weights inside the .onnx file (below 2 GB)")
    parser.add_argument("--export", action="store_true", help="also merge in torch and export again (export_again.py)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: the system's)")
    arguments = parser.parse_args()
    total_bytes = int(arguments.gb * 1e9)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        (folder / "base").mkdir()
        base = build_base(folder / "base", total_bytes, arguments.form, inline=arguments.inline)
        adapter = build_adapter(folder, total_bytes, FORMS[arguments.form][1])
        size = sum(path.stat().st_size for path in base.parent.iterdir())
        itemsize = FORMS[arguments.form][1]
        touched = itemsize * sum(rows * columns for _, (rows, columns) in list_weights(total_bytes, itemsize))
        seconds, peak = take_turns(base, adapter, folder, touched, arguments)
    report(arguments, size, touched, seconds, peak)
    if arguments.export:
        subprocess.run([sys.executable, str(Path(__file__).with_name("export_again.py"))], check=True)


def take_turns(
    base: Path, adapter: Path, folder: Path, touched: int, arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of each round by name, and the merge's peak memory in bytes."""
    time_cp(base, folder)
    found: dict[str, list[float]] = collections.defaultdict(list)
    peak = 0
    ways = {"merge": "copy"} if arguments.inline else {"merge": "copy", "sharing": "share"}
    for _ in range(arguments.rounds):
        found["cp"].append(time_cp(base, folder))
        if not arguments.inline:
            found["cp, touched"].append(time_touched(touched, folder))
        for name, data in ways.items():
            process, call, memory = time_merge(base, adapter, folder, arguments.jobs, data)
            again = time_merge(base, adapter, folder, arguments.jobs, data, calls=2)[1]
            for what, seconds in (("process", process), ("call", call), ("second", again)):
                found[f"{name}, {what}"].append(seconds)
            peak = max(peak, memory)
    return found, peak


def report(arguments: argparse.Namespace, size: int, touched: int, seconds: dict[str, list[float]], peak: int) -> None:
    """Print the figures: seconds of each round by name, `cp` among them, and bytes."""
    place = "inline" if arguments.inline else "external data"
    print(f"model            {size / 1e9:.2f} GB, {arguments.form}, {place}; {touched / size:.0%} of it rewritten")
    print(f"machine          {os.cpu_count()} processors")
    for name, rounds in seconds.items():
        beside = "cp, touched" if name.startswith("sharing") else "cp"
        ratio = statistics.median(s / c for s, c in zip(rounds, seconds[beside], strict=True))
        times = f"{statistics.median(rounds):.2f} s  ({min(rounds):.2f} to {max(rounds):.2f})"
        print(f"{name:16} {times}  {ratio:.2f} x {beside}, median of {len(rounds)} pairs")
    print(f"peak memory      {peak / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
