"""Seconds and memory of a merge into a model folder, beside `cp -r` of the same files and PEFT, from one run.

    python bench/merge_checkpoint.py                     # 1.1 billion parameters, bfloat16, 5 shards
    python bench/merge_checkpoint.py --sizes 0.1 0.5 1.1 3
    python bench/merge_checkpoint.py --no-peft           # without torch

The base is a Llama with random numbers, the adapter has rank 16 on every linear layer. Files lie in the page cache.
The candidates take turns; printed are medians, ratios of each round's pair to `cp -r`, and the peak memory of the
process as Linux accounts for it (VmHWM, interpreter included). "merge, call" is `loraformat.merge` once imported,
"merge, process" the whole `python` process; PEFT's time is loading, `merge_and_unload` and `save_pretrained`, once
imported. "numpy alone" is floor.py: the same reads, numpy calls and writes, and nothing else.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FLOOR = Path(__file__).with_name("floor.py")
RANK = 16
TOKENS = 32_000


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int


SHAPES = {
    0.1: Shape(768, 2048, 8, 12, 4),
    0.5: Shape(1280, 3456, 22, 20, 4),
    1.1: Shape(2048, 5632, 22, 32, 4),
    3.0: Shape(2560, 6912, 40, 32, 8),
}
MERGE = """
import re, sys, time
from loraformat import merge
start = time.perf_counter()
merge(sys.argv[1], [sys.argv[2]], sys.argv[3])
seconds = time.perf_counter() - start
print(seconds, re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
PEFT = """
import re, sys, time, warnings
warnings.simplefilter("ignore")
import torch, transformers, peft
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3], max_shard_size="500MB")
seconds = time.perf_counter() - start
print(seconds, re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def list_weights(shape: Shape) -> list[tuple[str, tuple[int, ...], bool]]:
    """Return name, shape and whether it is adapted, in the order of a checkpoint."""
    hidden, inner, keys = shape.hidden, shape.inner, shape.hidden // shape.heads * shape.groups
    listed: list[tuple[str, tuple[int, ...], bool]] = [("model.embed_tokens.weight", (TOKENS, hidden), False)]
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        listed += [(f"{prefix}.{name}.weight", size, True) for name, size in matrices.items()]
        listed += [
            (f"{prefix}.{name}.weight", (hidden,), False) for name in ("input_layernorm", "post_attention_layernorm")
        ]
    return [*listed, ("model.norm.weight", (hidden,), False), ("lm_head.weight", (TOKENS, hidden), False)]


def build_base(folder: Path, shape: Shape, shards: int) -> None:
    """Write a model folder: shards of about equal size, their index, and a configuration."""
    folder.mkdir()
    weights = list_weights(shape)
    total = sum(int(np.prod(size)) * 2 for _, size, _ in weights)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, size, _ in weights:
        if filled >= total / shards and len(groups) < shards:
            groups.append([])
            filled = 0
        groups[-1].append((name, size))
        filled += int(np.prod(size)) * 2
    numbers = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float32)
    block = numbers.view(np.uint16)[1::2].tobytes()  # The upper halves: bfloat16, cut off.
    index = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        index |= {weight: name for weight, _ in group}
        _write_shard(folder / name, group, block)
    record = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(record, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "vocab_size": TOKENS,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_shard(path: Path, group: list[tuple[str, tuple[int, ...]]], block: bytes) -> None:
    header, end = {}, 0
    for name, size in group:
        begin, end = end, end + int(np.prod(size)) * 2
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            sink.write(block[: min(len(block), end - start)])


def build_adapter(folder: Path, shape: Shape) -> None:
    """Write a PEFT folder of rank 16 on every linear layer."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    factors = {}
    for name, size, adapted in list_weights(shape):
        if adapted:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{path}.lora_A.weight"] = (rng.standard_normal((RANK, size[1])) * 0.02).astype(np.float32)
            factors[f"{path}.lora_B.weight"] = (rng.standard_normal((size[0], RANK)) * 0.02).astype(np.float32)
    folder.mkdir()
    save_file(factors, str(folder / "adapter_model.safetensors"))
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def run_child(code: list[str], *words: Path) -> tuple[float, float, float]:
    """Return seconds of the call, seconds of the process, and its peak in MB."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *code, *map(str, words)], capture_output=True, text=True, check=False)
    whole = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, peak_kb = done.stdout.split()[-2:]
    return float(seconds), whole, int(peak_kb) / 1024


def copy_folder(source: Path, sink: Path) -> float:
    """Return the seconds of `cp -r`."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(sink)], check=True)
    return time.perf_counter() - start


def measure(work: Path, size: float, shards: int, rounds: int, *, peft: bool) -> None:
    """Build one base, let the candidates take turns, and print what was measured."""
    base, adapter = work / "base", work / "adapter"
    build_base(base, SHAPES[size], shards)
    build_adapter(adapter, SHAPES[size])
    total = sum(file.stat().st_size for file in base.iterdir())
    times: dict[str, list[float]] = {
        name: [] for name in ("cp -r", "numpy alone", "merge, call", "merge, process", "PEFT")
    }
    peaks: dict[str, float] = {}
    for turn in range(-1, rounds):  # The first turn warms the page cache and counts for nothing.
        found: dict[str, float] = {}
        for name in list(times)[:: 1 if turn % 2 else -1]:
            if name == "cp -r":
                found[name] = copy_folder(base, work / "out")
            elif name == "merge, call":
                found[name], found["merge, process"], peak = run_child(["-c", MERGE], base, adapter, work / "out")
                peaks[name] = max(peak, peaks.get(name, 0))
            elif name == "numpy alone":
                found[name], _, peaks[name] = run_child([str(FLOOR)], base, adapter, work / "out")
            elif name == "PEFT" and peft and turn >= 0:
                found[name], _, peaks[name] = run_child(["-c", PEFT], base, adapter, work / "out")
            # What the next one writes must not wait for the disk to take what this one wrote.
            shutil.rmtree(work / "out", ignore_errors=True)
        if turn >= 0:
            for name, seconds in found.items():
                times[name].append(seconds)
    report(size, total, times, peaks)


def report(size: float, total_bytes: int, times: dict[str, list[float]], peaks: dict[str, float]) -> None:
    """Print medians, spreads, and medians of the ratios of each round."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{size:g}B parameters: {total_bytes / 1e9:.2f} GB, bfloat16; {processors} processors")
    copies, merges = times["cp -r"], times["merge, call"]
    for name, seconds in times.items():
        if not seconds:
            continue
        ratio = statistics.median(a / b for a, b in zip(seconds, copies, strict=True))
        spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
        peak = f"  peak {peaks[name]:.0f} MB" if name in peaks else ""
        print(f"  {name:15} {statistics.median(seconds):7.2f} s  {spread:17} {ratio:6.2f} x cp{peak}")
    if times["PEFT"]:
        faster = statistics.median(a / b for a, b in zip(times["PEFT"], merges, strict=True))
        print(f"  merge is {faster:.1f} x faster than PEFT")


def main() -> None:
    """Parse the arguments and measure each size."""
    parser = argparse.ArgumentParser(description="Merge into a model folder, beside cp -r and PEFT.")
    parser.add_argument(
        "--sizes", type=float, nargs="+", choices=sorted(SHAPES), default=[1.1], help="in 1e9 parameters"
    )
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out")
    options = parser.parse_args()
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="loraformat-bench-") as folder:
            measure(Path(folder), size, options.shards, options.rounds, peft=not options.no_peft)


if __name__ == "__main__":
    main()
