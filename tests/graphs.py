"""ONNX models as exporters leave them, built node by node, and adapters that need no file.

Numbers that are to be compared to the bit are small dyadic fractions: their products and sums are exact in float32, so
the only rounding of a merge is the last one.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import loraformat
from builders import Factors, write_peft
from loraformat.adapter import Adapter, Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.containers.safetensors import write_safetensors
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.plan import WeightedAdapter

Array = NDArray[Any]

SCOPES = "pkg.torch.onnx.name_scopes"
CLASSES = "pkg.torch.onnx.class_hierarchy"
RULE = "pkg.onnxscript.rewriter.rule_name"
OPSET = 20
"""The first in which all operators that stand beside weights take 8-bit floats is 19."""
FORMS = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}

# --- numbers ---------------------------------------------------------------------------------------------------------


def dyadic(rng: np.random.Generator, *shape: int, step: float = 0.125, reach: int = 8) -> NDArray[np.float32]:
    """Return multiples of `step` from `-reach` to `reach` steps, none of them zero."""
    magnitude = rng.integers(1, reach + 1, shape)
    return np.asarray(magnitude * rng.choice([-1, 1], shape) * step, np.float32)


def dyadic_factors(rng: np.random.Generator, out: int, inner: int, rank: int) -> Factors:
    """Return A `(rank, inner)` and B `(out, rank)` whose product is exact in float32."""
    return dyadic(rng, rank, inner), dyadic(rng, out, rank)


def product(factors: Factors, scale: float = 1.0) -> NDArray[np.float64]:
    """Return s·B·A as `(out, in * kernel)` in float64."""
    down, up = (factor.astype(np.float64) for factor in factors)
    return np.asarray(scale * (up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)))


def round_once(values: NDArray[np.float64], form: np.dtype[Any]) -> Array:
    """Round float64 to `form` once, to nearest with ties to even, by bisecting the list of all its numbers.

    Independent of the casts of numpy and ml_dtypes for forms of 8 and 16 bits; for wider ones numpy's cast is exact.
    """
    if form.itemsize > 2:
        return np.asarray(values.astype(form))
    codes = np.arange(1 << (8 * form.itemsize), dtype=np.uint32).astype(f"u{form.itemsize}")
    with np.errstate(all="ignore"):
        numbers = codes.view(form).astype(np.float64)
    keep = np.isfinite(numbers) & ~(np.signbit(numbers) & (numbers == 0))
    order = np.argsort(numbers[keep])
    numbers, codes = numbers[keep][order], codes[keep][order]
    above = np.clip(np.searchsorted(numbers, values), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    nearer_high = values - low > high - values
    tie = values - low == high - values
    choose_high = nearer_high | (tie & (codes[above] % 2 == 0))
    return np.asarray(np.where(choose_high, codes[above], codes[above - 1]).astype(codes.dtype)).view(form)


# --- models ----------------------------------------------------------------------------------------------------------


def tensor_kind(array: Array) -> int:
    """Return the ONNX data type of an array."""
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))


def torchscript_name(module: str, op: str) -> str:
    """Return the node name that the TorchScript exporter gives: `/model/layers.0/self_attn/q_proj/MatMul`."""
    path = re.sub(r"\.(?!\d+(\.|$))", "/", module)
    return f"/{path}/{op}"


def dynamo_scopes(module: str, op: str = "linear", kind: str = "torch.nn.modules.linear.Linear") -> dict[str, str]:
    """Return the node metadata that the newer exporter leaves for an operation of `module`."""
    parts = module.split(".")
    scopes = ["", *(".".join(parts[: end + 1]) for end in range(len(parts))), op]
    classes = ["zoo.Model", *("torch.nn.modules.container.ModuleList" for _ in parts[:-1]), kind, f"aten.{op}.default"]
    return {"namespace": "x", CLASSES: str(classes), SCOPES: str(scopes)}


@dataclass
class Net:
    """A graph under construction.

    `weight` and `op` return the name of the value that they make, so that calls can be nested.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)

    def feed(self, name: str, kind: int = TensorProto.FLOAT, rank: int = 2) -> str:
        """Add a graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, [f"{name}_{axis}" for axis in range(rank)]))
        return name

    def weight(self, name: str, array: Array) -> str:
        """Add an initializer."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def constant(self, name: str, array: Array) -> str:
        """Add a Constant node; its tensor has no name of its own, as exporters leave it."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(array))
        return self.op("Constant", [], name, value=tensor)

    def op(
        self, kind: str, inputs: Sequence[str], output: str, name: str = "", notes: Mapping[str, str] = {}, **more: Any
    ) -> str:
        """Add a node; `notes` are its metadata."""
        node = helper.make_node(kind, list(inputs), [output], name=name, **more)
        for key, text in notes.items():
            node.metadata_props.add(key=key, value=text)
        self.nodes.append(node)
        return output

    def result(self, name: str, kind: int = TensorProto.FLOAT, rank: int = 2) -> str:
        """Declare a graph output."""
        self.outputs.append(helper.make_tensor_value_info(name, kind, [f"{name}_{axis}" for axis in range(rank)]))
        return name

    def model(self, *, check: bool = True) -> onnx.ModelProto:
        """Return the model."""
        graph = helper.make_graph(self.nodes, "main_graph", self.inputs, self.outputs, self.initializers)
        domains = {function.domain for function in self.functions}
        domains |= {node.domain for node in self.nodes if node.domain}
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
        model = helper.make_model(graph, functions=self.functions, opset_imports=opsets, ir_version=10)
        if check:
            onnx.checker.check_model(model)
        return model

    def branch(self, name: str) -> onnx.GraphProto:
        """Return the nodes as the body of an If."""
        return helper.make_graph(self.nodes, name, [], self.outputs, self.initializers)


def function(
    name: str, inputs: Sequence[str], outputs: Sequence[str], nodes: Sequence[onnx.NodeProto], **more: Any
) -> onnx.FunctionProto:
    """Return a model-local function in the domain `own`."""
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("own", 1)]
    made = helper.make_function("own", name, list(inputs), list(outputs), list(nodes), opsets, **more)
    return cast(onnx.FunctionProto, made)


def linear_net(weights: Mapping[str, Array], style: str = "torchscript") -> Net:
    """Return independent linear modules, `(out, in)` each: inputs `in.<module>`, outputs `out.<module>`.

    Args:
        weights: module path to weight.
        style: `torchscript`, `torchscript-unfolded`, `dynamo`, `dynamo-unfolded`, or `named`, where only the tensor's
            name tells the module.
    """
    net = Net()
    for position, (module, weight) in enumerate(weights.items()):
        kind = tensor_kind(weight)
        x, y = net.feed(f"in.{module}", kind), net.result(f"out.{module}", kind)
        real = f"{module}.weight"
        scoped = dynamo_scopes(module) if style.startswith("dynamo") else {}
        stem = torchscript_name(module, "") if style.startswith("torchscript") else f"node_{position}_"
        if style.endswith("unfolded"):
            turned = net.op(
                "Transpose", [net.weight(real, weight)], f"{real}_t", f"{stem}Transpose", scoped, perm=[1, 0]
            )
            net.op("MatMul", [x, turned], y, f"{stem}MatMul", scoped)
        elif style == "named":
            net.op("Gemm", [x, net.weight(real, weight)], y, f"{stem}Gemm", transB=1)
        else:
            anonymous = f"onnx::MatMul_{100 + position}" if style == "torchscript" else f"val_{position}"
            net.op("MatMul", [x, net.weight(anonymous, weight.T)], y, f"{stem}MatMul", scoped)
    return net


STYLES = ("torchscript", "torchscript-unfolded", "dynamo", "dynamo-unfolded", "named")


def write_model(path: Path, model: onnx.ModelProto, files: str = "") -> Path:
    """Write a model; `files` of `one` or `many` moves its weights into data files, axes and shapes excepted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not files:
        onnx.save_model(model, str(path))
        return path
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.save_model(
        copy,
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=files == "one",
        location=f"{path.name}.data" if files == "one" else None,
        size_threshold=64,
        convert_attribute=False,
    )
    return path


def write_data_by_hand(path: Path, model: onnx.ModelProto, places: Mapping[str, tuple[str, int]]) -> Path:
    """Write a model whose initializers lie where `places` says: location and offset, gaps and overlaps included."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    path.parent.mkdir(parents=True, exist_ok=True)
    for tensor in copy.graph.initializer:
        if tensor.name not in places:
            continue
        location, offset = places[tensor.name]
        data = path.parent / location
        data.parent.mkdir(parents=True, exist_ok=True)
        payload = tensor.raw_data
        content = bytearray(data.read_bytes() if data.exists() else b"")
        content.extend(b"\xaa" * (offset + len(payload) - len(content)))
        content[offset : offset + len(payload)] = payload
        data.write_bytes(content)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (("location", location), ("offset", str(offset)), ("length", str(len(payload)))):
            tensor.external_data.add(key=key, value=text)
    path.write_bytes(copy.SerializeToString())
    return path


def run(model: Path | onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """Return what onnxruntime computes."""
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, dict(feeds))]


def stored_weights(path: Path) -> dict[str, Array]:
    """Return every initializer as onnx reads it."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


def read_state(path: Path) -> dict[str, Array]:
    """Return the tensors of a safetensors file; the package's reader for numpy knows no 8-bit floats."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
    forms = {known.safetensors: known.numpy() for known in BY_NAME.values() if known.bits >= 8}
    return {
        name: np.frombuffer(data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], np.uint8)
        .view(forms[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in entries.items()
    }


def write_state(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file, 8-bit floats included."""
    entries = [(name, BY_NAME[array.dtype.name], array.shape, array) for name, array in arrays.items()]
    with path.open("wb") as stream:
        write_safetensors(stream, entries, metadata or {})
    return path


def same_bits(one: Array, other: Array) -> bool:
    """Say whether two arrays are equal to the bit."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def tensors_of(message: Any) -> Iterator[TensorProto]:
    """Yield every tensor below a protobuf message, found by reflection."""
    if isinstance(message, TensorProto):
        yield message
        return
    for item, value in message.ListFields():
        if item.message_type is not None:
            for child in value if item.is_repeated else [value]:
                yield from tensors_of(child)


# --- merging ---------------------------------------------------------------------------------------------------------


def merge_model(
    folder: Path, model: onnx.ModelProto | Path, factors: Mapping[str, Factors], *, alpha: float = 8.0, **options: Any
) -> Path:
    """Merge a PEFT adapter of `factors` into a model; return the merged file."""
    base = model if isinstance(model, Path) else write_model(folder / "base.onnx", model)
    adapter = write_peft(folder / "adapter", factors, alpha=alpha)
    output = folder / "merged.onnx"
    loraformat.merge(base, [adapter], output, force=True, **options)
    return output


# --- adapters in memory ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArrayFactor:
    """A factor that is already in memory."""

    name: str
    array: Array

    @property
    def dtype(self) -> Dtype:
        return BY_NAME[self.array.dtype.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def read(self) -> Array:
        return self.array.copy()


def make_target(
    name: str,
    factors: Factors,
    slot: SlotKind = SlotKind.LINEAR,
    scale: float = 1.0,
    *,
    kind: str = "lora",
    rule: ScalingRule = ScalingRule.MULTIPLIER,
) -> Target:
    """Return a target; `scale` is what the rule starts from."""
    roles = (
        ("lora_embedding_A", "lora_embedding_B") if slot is SlotKind.EMBEDDING else ("lora_A.weight", "lora_B.weight")
    )
    held: dict[str, Factor] = {
        role: ArrayFactor(f"{name}.{role}", array) for role, array in zip(roles, factors, strict=True)
    }
    return Target(name, kind, slot, held, factors[0].shape[0], Scaling(rule, scale))


def make_adapter(*targets: Target, **fields: Any) -> Adapter:
    """Return an adapter of these targets, in the order of their names."""
    return Adapter(tuple(sorted(targets, key=lambda target: target.name)), **fields)


def weigh(adapter: Adapter, weight: float = 1.0, name: str = "style") -> WeightedAdapter:
    """Return the adapter as a plan takes it."""
    return WeightedAdapter(adapter, weight, name)
