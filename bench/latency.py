"""Latency on onnxruntime of a base, its merged model, and of adapters that stay: the comparison of LoRA's Table 1.

    python bench/latency.py                                  # 4 layers of 256
    python bench/latency.py --layers 24 --width 1024         # GPT-2 medium's size

The model is a stack of transformer layers (pre-norm, causal attention, four times as wide inside) with random weights.
Beside it stand
  base again     the same file in another session: what differs from `base` here is noise
  merged         `loraformat.merge` of an adapter of rank 8 on all six matrices of each layer
  run-time LoRA  the same adapter as two more MatMuls beside each matrix
  Houlsby        bottlenecks after attention and after the inner layers (Houlsby et al. 2019: the paper's Adapter-H)
  Lin            one bottleneck after the inner layers (Lin et al. 2020; Pfeiffer et al. 2021: the paper's Adapter-L)
The sessions take turns in random order; printed is each one's 25th percentile, its median, and the difference from
`base`.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import loraformat

SETTINGS = ((1, 128), (8, 128))
RANK, HEAD = 8, 64


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
        y = self.add("MatMul", x, self.hold(self.random(self.rng, inner, outer)), name=f"/{path}/MatMul")
        if self.kind == "run-time LoRA":
            down = self.hold(self.random(self.side, inner, RANK))
            up = self.hold(self.random(self.side, RANK, outer))
            y = self.add("Add", y, self.add("MatMul", self.add("MatMul", x, down), up))
        return y

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


def build_adapter(folder: Path, layers: int, width: int) -> Path:
    """Write a PEFT folder of rank 8 on all matrices."""
    import json

    from safetensors.numpy import save_file

    rng, tensors = np.random.default_rng(2), {}
    shapes = {f"attn.{name}": (width, width) for name in ("q", "k", "v", "o")}
    shapes |= {"up": (4 * width, width), "down": (width, 4 * width)}
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


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(
    sessions: dict[str, onnxruntime.InferenceSession], feeds: dict[str, np.ndarray], rounds: int
) -> dict[str, list[float]]:
    """Return the milliseconds of each session's runs."""
    found: dict[str, list[float]] = {name: [] for name in sessions}
    order = list(sessions)
    for session in sessions.values():
        session.run(None, feeds)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            sessions[name].run(None, feeds)
            found[name].append(1000 * (time.perf_counter() - start))
    return found


def report(setting: tuple[int, int], found: dict[str, list[float]]) -> None:
    quarters = {name: statistics.quantiles(times, n=4)[0] for name, times in found.items()}
    print(f"batch {setting[0]} x {setting[1]}, {len(found['base'])} rounds, load {os.getloadavg()[0]:.1f}")
    for name, times in found.items():
        change = 100 * (quarters[name] / quarters["base"] - 1)
        print(f"  {name:14} {quarters[name]:9.2f} ms  median {statistics.median(times):9.2f} ms  {change:+6.1f} %")


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--bottleneck", type=int, default=0, help="of the adapters that stay (default: width / 8)")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    size = (arguments.layers, arguments.width, arguments.bottleneck or arguments.width // 8)
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = build(folder / "base.onnx", "base", *size)
        adapter = build_adapter(folder / "adapter", arguments.layers, arguments.width)
        loraformat.merge(base, [adapter], folder / "merged.onnx")
        paths = {"base": base, "base again": base, "merged": folder / "merged.onnx"}
        paths |= {kind: build(folder / f"{kind}.onnx", kind, *size) for kind in ("run-time LoRA", "Houlsby", "Lin")}
        sessions = {kind: open_session(path, arguments.threads) for kind, path in paths.items()}
        parameters = {path: path.with_name(f"{path.name}.data").stat().st_size for path in paths.values()}
    share = {kind: 100 * (parameters[path] / parameters[base] - 1) for kind, path in paths.items()}
    print(
        "weights more than the base's: "
        + ", ".join(f"{kind} {more:.1f} %" for kind, more in share.items() if more > 0.1)
    )
    for batch, length in SETTINGS:
        mask = np.triu(np.full((length, length), -1e9, np.float32), 1)
        x = np.random.default_rng(3).standard_normal((batch, length, arguments.width)).astype(np.float32)
        report((batch, length), measure(sessions, {"x": x, "mask": mask}, max(5, arguments.rounds // batch)))


if __name__ == "__main__":
    main()
