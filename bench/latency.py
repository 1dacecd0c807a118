"""Latency on onnxruntime of a base and of all ways to put an adapter on it, in one table: LoRA's Table 1, and more.

    python bench/latency.py                                  # 4 layers of 256
    python bench/latency.py --layers 24 --width 1024         # GPT-2 medium's size
    python bench/latency.py --layers 1 --width 64 --rounds 5 --settings 1x8    # does it run?

The model is a stack of transformer layers (pre-norm, causal attention, four times as wide inside) with random weights.
The adapter is of rank 8 on all six matrices of each layer. Beside the base stand
  base again           the same file in another session: what differs from `base` here is noise
  merged               `loraformat.merge`, a file
  in memory            `loraformat.runtime.session`, no file
  run time, none       `loraformat.runtime.export_runtime`, the adapter's inputs at their defaults
  run time, active     the same session with the adapter
  batched, none        the same with slots, every row without an adapter
  batched, mixed       every row with another of the slots' adapters (at batch 1 there is one row)
  Houlsby              bottlenecks after attention and after the inner layers (Houlsby et al. 2019: the paper's
                       Adapter-H)
  Lin                  one bottleneck after the inner layers (Lin et al. 2020; Pfeiffer et al. 2021: its Adapter-L)
They take turns in random order; printed is each one's first quartile, its median, the width between first and third
quartile, and the difference of its first quartile from that of `base`. Before that, outputs are compared: `in memory`
must be `merged` to the bit, what has no adapter the base, and the active ones `merged` but for rounding.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import loraformat

RANK, HEAD = 8, 64
BOTTLENECKS = ("Houlsby", "Lin")
TOLERANCE = 1e-3


class Graph:
    """A transformer under construction."""

    def __init__(self, width: int, kind: str, bottleneck: int) -> None:
        self.width, self.kind, self.bottleneck = width, kind, bottleneck
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)
        self.side = np.random.default_rng(1)

    def add(self, op: str, *inputs: str, name: str = "", **attributes: object) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def hold(self, array: np.ndarray) -> str:
        name = f"onnx::w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def random(self, rng: np.random.Generator, inner: int, outer: int) -> np.ndarray:
        return (rng.standard_normal((inner, outer)) / np.sqrt(inner)).astype(np.float32)

    def linear(self, x: str, path: str, inner: int, outer: int) -> str:
        return self.add("MatMul", x, self.hold(self.random(self.rng, inner, outer)), name=f"/{path}/MatMul")

    def adapt(self, x: str) -> str:
        """Return a bottleneck with a shortcut."""
        down, up = (
            self.random(self.side, self.width, self.bottleneck),
            self.random(self.side, self.bottleneck, self.width),
        )
        inner = self.add("Relu", self.add("MatMul", x, self.hold(down)))
        return self.add("Add", x, self.add("MatMul", inner, self.hold(up)))

    def norm(self, x: str) -> str:
        ones, zeros = np.ones(self.width, np.float32), np.zeros(self.width, np.float32)
        return self.add("LayerNormalization", x, self.hold(ones), self.hold(zeros), axis=-1)

    def heads(self, x: str, perm: list[int]) -> str:
        shape = self.hold(np.array([0, 0, self.width // HEAD, HEAD]))
        return self.add("Transpose", self.add("Reshape", x, shape), perm=perm)

    def attention(self, x: str, path: str) -> str:
        q, k, v = (self.linear(x, f"{path}/{name}", self.width, self.width) for name in ("q", "k", "v"))
        scores = self.add("MatMul", self.heads(q, [0, 2, 1, 3]), self.heads(k, [0, 2, 3, 1]))
        scores = self.add("Mul", scores, self.hold(np.array(HEAD**-0.5, np.float32)))
        mixed = self.add(
            "MatMul", self.add("Softmax", self.add("Add", scores, "mask"), axis=-1), self.heads(v, [0, 2, 1, 3])
        )
        joined = self.add(
            "Reshape", self.add("Transpose", mixed, perm=[0, 2, 1, 3]), self.hold(np.array([0, 0, self.width]))
        )
        return self.linear(joined, f"{path}/o", self.width, self.width)

    def layer(self, x: str, number: int) -> str:
        path = f"layers.{number}"
        attended = self.attention(self.norm(x), f"{path}/attn")
        x = self.add("Add", x, self.adapt(attended) if self.kind == "Houlsby" else attended)
        inner = self.add("Gelu", self.linear(self.norm(x), f"{path}/up", self.width, 4 * self.width))
        outer = self.linear(inner, f"{path}/down", 4 * self.width, self.width)
        return self.add("Add", x, self.adapt(outer) if self.kind in ("Houlsby", "Lin") else outer)


def build(path: Path, kind: str, layers: int, width: int, bottleneck: int) -> Path:
    """Write a model of a kind."""
    graph, value = Graph(width, kind, bottleneck), helper.make_tensor_value_info
    x = "x"
    for number in range(layers):
        x = graph.layer(x, number)
    graph.nodes[-1].output[0] = "y"
    feeds = [value("x", TensorProto.FLOAT, ["b", "s", width]), value("mask", TensorProto.FLOAT, ["s", "s"])]
    ends = [value("y", TensorProto.FLOAT, ["b", "s", width])]
    model = helper.make_graph(graph.nodes, "g", feeds, ends, graph.weights)
    model = helper.make_model(model, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    return path


def build_adapter(folder: Path, layers: int, width: int, seed: int = 2, modules: str = "q,k,v,o,up,down") -> Path:
    """Write a PEFT folder of rank 8 on the matrices of each layer that are named."""
    import json

    from safetensors.numpy import save_file

    rng, tensors = np.random.default_rng(seed), {}
    shapes = {f"attn.{name}": (width, width) for name in ("q", "k", "v", "o")}
    shapes |= {"up": (4 * width, width), "down": (width, 4 * width)}
    shapes = {name: shape for name, shape in shapes.items() if name.removeprefix("attn.") in modules.split(",")}
    for number in range(layers):
        for name, (out, inner) in shapes.items():
            stem = f"base_model.model.layers.{number}.{name}"
            tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((RANK, inner), np.float32) * 0.02
            tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((out, RANK), np.float32) * 0.02
    folder.mkdir()
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(shapes)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Row:
    """One way to run the model.

    Attributes:
        session: the session.
        settings: of a run: the active adapter; None for none.
        index: whether the session is told which slot each row of the batch takes.
        slots: the slots that rows take in turn.
    """

    session: onnxruntime.InferenceSession
    settings: onnxruntime.RunOptions | None = None
    index: str = ""
    slots: int = 0

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the output."""
        more = {self.index: np.arange(len(feeds["x"])) % self.slots} if self.index else {}
        return self.session.run(None, {**feeds, **more}, self.settings)[0]


def make_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # It warns of every input with a default.
    return options


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), make_options(threads), providers=["CPUExecutionProvider"])


@dataclass
class Bench:
    """The files and the rows of a comparison.

    Attributes:
        folder: where the files go.
        arguments: of the command line.
        rows: what is timed, by name.
        held: what onnxruntime wants to be kept: adapters of runs.
    """

    folder: Path
    arguments: argparse.Namespace
    rows: dict[str, Row] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)

    def open(self) -> None:
        """Write all models and make all sessions."""
        layers, width = self.arguments.layers, self.arguments.width
        size = (layers, width, self.arguments.bottleneck or width // 8)
        self.base = build(self.folder / "base.onnx", "base", *size)
        self.adapters = [
            build_adapter(self.folder / f"adapter{number}", layers, width, 2 + number)
            for number in range(self.arguments.slots)
        ]
        loraformat.merge(self.base, self.adapters[:1], self.folder / "merged.onnx")
        threads = self.arguments.threads
        self.rows = {name: Row(open_session(self.base, threads)) for name in ("base", "base again")}
        self.rows["merged"] = Row(open_session(self.folder / "merged.onnx", threads))
        in_memory = loraformat.runtime.session(
            self.base,
            self.adapters[:1],
            providers=["CPUExecutionProvider"],
            session_options=make_options(threads),
        )
        self.rows["in memory"] = Row(in_memory)
        self.open_run_time(threads)
        for kind in BOTTLENECKS:
            self.rows[kind] = Row(open_session(build(self.folder / f"{kind}.onnx", kind, *size), threads))

    def open_run_time(self, threads: int) -> None:
        """Add the rows of adapters that are inputs."""
        for name, slots in (("run time", 0), ("batched", len(self.adapters))):
            path = self.folder / f"{name}.onnx"
            loraformat.runtime.export_runtime(self.base, self.adapters[:1], path, batched=slots)
            session = open_session(path, threads)
            chosen = self.adapters if slots else self.adapters[:1]
            self.rows[f"{name}, none"] = Row(session)
            index = "adapter_index" if slots else ""
            self.rows[f"{name}, {'mixed' if slots else 'active'}"] = Row(
                session, self.activate(path, chosen), index, slots
            )

    def activate(self, model: Path, adapters: list[Path]) -> onnxruntime.RunOptions:
        """Return settings of runs with adapters."""
        path = model.with_suffix(".onnx_adapter")
        loraformat.runtime.export_adapter(model, adapters, path)
        adapter, settings = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        adapter.Load(str(path))
        settings.add_active_adapter(adapter)
        self.held.append(adapter)
        return settings

    def check(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Stop where rows that must agree do not; the first row of the batch has the adapter everywhere."""
        outputs = {name: row.run(feeds)[0] for name, row in self.rows.items()}
        found = {
            "in memory": (outputs["in memory"], outputs["merged"], 0.0),
            "run time, none": (outputs["run time, none"], outputs["base"], TOLERANCE),
            "batched, none": (outputs["batched, none"], outputs["base"], TOLERANCE),
            "run time, active": (outputs["run time, active"], outputs["merged"], TOLERANCE),
            "batched, mixed": (outputs["batched, mixed"], outputs["merged"], TOLERANCE),
        }
        effect = np.abs(outputs["merged"] - outputs["base"]).max()
        worst = {name: np.abs(one - other).max() for name, (one, other, _) in found.items()}
        print(f"the adapter changes outputs by {effect:.2g}; largest differences from what they should be:", end=" ")
        print(", ".join(f"{name} {difference:.1g}" for name, difference in worst.items()))
        if any(worst[name] > most * effect for name, (*_, most) in found.items()):
            raise SystemExit("rows that must agree do not")


def measure(rows: Mapping[str, Row], feeds: Mapping[str, np.ndarray], rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each row's runs."""
    found: dict[str, list[float]] = {name: [] for name in rows}
    order = list(rows)
    for row in rows.values():
        row.run(feeds)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            rows[name].run(feeds)
            found[name].append(1000 * (time.perf_counter() - start))
    return found


def report(setting: tuple[int, int], found: dict[str, list[float]]) -> None:
    quartiles = {name: statistics.quantiles(times, n=4) for name, times in found.items()}
    print(f"batch {setting[0]} x {setting[1]}, {len(found['base'])} rounds, load {os.getloadavg()[0]:.1f}")
    print(f"  {'':18} {'quartile':>9} {'median':>9} {'spread':>9}   to base")
    for name, (first, median, third) in quartiles.items():
        change = 100 * (first / quartiles["base"][0] - 1)
        print(f"  {name:18} {first:6.2f} ms {median:6.2f} ms {third - first:6.2f} ms {change:+7.1f} %")


def report_sizes(bench: Bench) -> None:
    """Print how many bytes more than the base's each way keeps."""
    data = {kind: (bench.folder / f"{kind}.onnx.data").stat().st_size for kind in ("base", *BOTTLENECKS)}
    lora = (bench.adapters[0] / "adapter_model.safetensors").stat().st_size
    more = {"LoRA": lora, **{kind: data[kind] - data["base"] for kind in BOTTLENECKS}}
    shares = ", ".join(f"{name} {100 * size / data['base']:.1f} %" for name, size in more.items())
    print(f"base of {data['base'] / 1e6:.1f} MB; weights beside it: {shares}")


def parse_settings(text: str) -> list[tuple[int, int]]:
    pairs = (part.split("x") for part in text.split(","))
    return [(int(batch), int(length)) for batch, length in pairs]


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--bottleneck", type=int, default=0, help="of the adapters that stay (default: width / 8)")
    parser.add_argument("--slots", type=int, default=4, help="adapters that the rows of a batch take in turn")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--settings", type=parse_settings, default="1x1,1x128,8x128", help="batch x length, ...")
    arguments = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), arguments)
        bench.open()
        report_sizes(bench)
        for batch, length in arguments.settings:
            mask = np.triu(np.full((length, length), -1e9, np.float32), 1)
            x = np.random.default_rng(3).standard_normal((batch, length, arguments.width)).astype(np.float32)
            feeds = {"x": x, "mask": mask}
            bench.check(feeds)
            report((batch, length), measure(bench.rows, feeds, max(10, arguments.rounds // batch)))


if __name__ == "__main__":
    main()
