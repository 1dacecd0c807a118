"""The demo's model and adapter.

A decoder of two layers with the names that torch's exporter leaves: node paths, anonymous `onnx::MatMul_12`
initializers stored (in, out), and kept names where a Gemm or a Gather holds the weight. With `factors`, the adapter's
branches `s·x·Aᵀ·Bᵀ` stand beside each weight: the reference that owes nothing to our merge.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Floats = NDArray[np.float32]
Factors = Mapping[str, tuple[Floats, Floats]]
"""Module path to A (rank, in) and B (out, rank)."""

VOCABULARY: Final = 1000
RANK: Final = 8
_LAYERS: Final = 2
_HIDDEN: Final = 192
_CLASSES: Final = 11
_ALPHA: Final = 16.0
SCALE: Final = _ALPHA / RANK
_EMBEDDING: Final = "model.embed_tokens"
_CLASSIFIER: Final = "classifier"
_WIDTHS: Final = {
    "self_attn.q_proj": (_HIDDEN, 64),
    "self_attn.k_proj": (_HIDDEN, 64),
    "self_attn.v_proj": (_HIDDEN, 256),
    "self_attn.o_proj": (256, _HIDDEN),
    "mlp.gate_proj": (_HIDDEN, 512),
    "mlp.up_proj": (_HIDDEN, 512),
    "mlp.down_proj": (512, _HIDDEN),
}
"""(in, out) of the linear modules of one layer; none is square, so that a transposed change cannot fit by accident."""
_UNADAPTED: Final = "self_attn.k_proj"


def make_weights() -> dict[str, Floats]:
    """Return the base's weights by module path, each (out, in); the embedding is (vocabulary, dim)."""
    random = np.random.default_rng(0)

    def normal(rows: int, columns: int) -> Floats:
        return np.asarray(random.standard_normal((rows, columns)) / np.sqrt(columns), np.float32)

    linear = {
        f"model.layers.{layer}.{module}": normal(width_out, width_in)
        for layer in range(_LAYERS)
        for module, (width_in, width_out) in _WIDTHS.items()
    }
    return {_EMBEDDING: normal(VOCABULARY, _HIDDEN), _CLASSIFIER: normal(_CLASSES, _HIDDEN)} | linear


def make_factors() -> dict[str, tuple[Floats, Floats]]:
    """Return the adapter's factors: all linear modules but the keys' projections, and the classifier."""
    random = np.random.default_rng(1)
    widths = {
        f"model.layers.{layer}.{module}": width
        for layer in range(_LAYERS)
        for module, width in _WIDTHS.items()
        if module != _UNADAPTED
    } | {_CLASSIFIER: (_HIDDEN, _CLASSES)}
    return {
        module: (
            (random.standard_normal((RANK, width_in)) / np.sqrt(width_in)).astype(np.float32),
            (0.03 * random.standard_normal((width_out, RANK))).astype(np.float32),
        )
        for module, (width_in, width_out) in widths.items()
    }


def write_adapter(folder: Path, factors: Factors) -> None:
    """Write the adapter as PEFT's `save_pretrained` does."""
    from safetensors.numpy import save_file

    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": np.ascontiguousarray(factor)
        for module, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "loraformat-demo",
        "r": RANK,
        "lora_alpha": _ALPHA,
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }
    folder.mkdir()
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_model(weights: Mapping[str, Floats], factors: Factors | None = None) -> onnx.ModelProto:
    """Return the model; with `factors`, explicit branches stand beside the weights that the adapter changes."""
    graph = _Graph(weights, factors or {})
    hidden = graph.embed("input_ids")
    for layer in range(_LAYERS):
        hidden = _attention(graph, hidden, f"model.layers.{layer}")
        hidden = _mlp(graph, hidden, f"model.layers.{layer}")
    graph.classify(hidden, "logits")
    return graph.model(
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", _CLASSES]),
    )


def _attention(graph: "_Graph", hidden: str, layer: str) -> str:
    """Add one head of attention with its residual connection; return the name of its output."""
    normal = graph.norm(hidden, f"{layer}.input_layernorm")
    query, key, value = (graph.linear(normal, f"{layer}.self_attn.{name}_proj") for name in "qkv")
    turned = graph.node("Transpose", [key], f"{layer}.self_attn", perm=[0, 2, 1])
    scores = graph.node("MatMul", [query, turned], f"{layer}.self_attn")
    scaled = graph.node("Div", [scores, graph.constant(np.float32(np.sqrt(64)))], f"{layer}.self_attn")
    mixed = graph.node("MatMul", [graph.node("Softmax", [scaled], f"{layer}.self_attn"), value], f"{layer}.self_attn")
    return graph.node("Add", [hidden, graph.linear(mixed, f"{layer}.self_attn.o_proj")], layer)


def _mlp(graph: "_Graph", hidden: str, layer: str) -> str:
    """Add a gated MLP with its residual connection; return the name of its output."""
    normal = graph.norm(hidden, f"{layer}.post_attention_layernorm")
    gate, up = (graph.linear(normal, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
    active = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], f"{layer}.mlp.act_fn")], f"{layer}.mlp.act_fn")
    product = graph.node("Mul", [active, up], f"{layer}.mlp")
    return graph.node("Add", [hidden, graph.linear(product, f"{layer}.mlp.down_proj")], layer)


@dataclass(slots=True)
class _Graph:
    """A graph in the making: nodes named by module path, values named by node."""

    weights: Mapping[str, Floats]
    factors: Factors
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)

    def node(self, operator: str, inputs: list[str], module: str, output: str = "", **attributes: Any) -> str:
        """Add a node called `/model/layers.0/mlp/Mul`, repetitions `_1` and so on; return its output's name."""
        path = "/" + module.replace(".", "/").replace("layers/", "layers.") + "/" + operator
        repetition = self.names[path] = self.names.get(path, -1) + 1
        name = f"{path}_{repetition}" if repetition else path
        output = output or f"{name}_output_0"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def tensor(self, name: str, values: NDArray[Any]) -> str:
        """Add an initializer; return its name."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def constant(self, value: Any) -> str:
        """Add an anonymous scalar or list."""
        return self.tensor(f"onnx::Const_{len(self.initializers) + 100}", np.asarray(value))

    def linear(self, source: str, module: str) -> str:
        """Add a linear module without bias, its weight stored (in, out) under a name that says nothing."""
        weight = self.tensor(f"onnx::MatMul_{len(self.initializers) + 100}", self.weights[module].T)
        return self._branch(source, self.node("MatMul", [source, weight], module), module)

    def embed(self, tokens: str) -> str:
        """Add the embedding."""
        table = self.tensor(f"{_EMBEDDING}.weight", self.weights[_EMBEDDING])
        return self.node("Gather", [table, tokens], _EMBEDDING)

    def norm(self, source: str, module: str) -> str:
        """Add a layer norm."""
        scale = self.tensor(f"{module}.weight", np.ones(_HIDDEN, np.float32))
        return self.node("LayerNormalization", [source, scale], module, axis=-1)

    def classify(self, source: str, output: str) -> None:
        """Add the mean over the tokens and the classifier, a Gemm whose weight keeps its name and its (out, in)."""
        pooled = self.node("ReduceMean", [source, self.constant(np.array([1]))], "pool", keepdims=0)
        weight = self.tensor(f"{_CLASSIFIER}.weight", self.weights[_CLASSIFIER])
        bias = self.tensor(f"{_CLASSIFIER}.bias", np.linspace(-1, 1, _CLASSES, dtype=np.float32))
        logits = self.node("Gemm", [pooled, weight, bias], _CLASSIFIER, transB=1)
        self.node("Identity", [self._branch(pooled, logits, _CLASSIFIER)], "output", output)

    def _branch(self, source: str, straight: str, module: str) -> str:
        """Add `straight + source·Aᵀ·Bᵀ·s` when the module has factors; return the sum's name."""
        if module not in self.factors:
            return straight
        down, up = self.factors[module]
        low = self.node("MatMul", [source, self.constant(down.T)], f"{module}.lora_A")
        high = self.node("MatMul", [low, self.constant(up.T)], f"{module}.lora_B")
        scaled = self.node("Mul", [high, self.constant(np.float32(SCALE))], f"{module}.scaling")
        return self.node("Add", [straight, scaled], f"{module}.lora")

    def model(self, source: onnx.ValueInfoProto, output: onnx.ValueInfoProto) -> onnx.ModelProto:
        """Return the finished model, checked."""
        graph = helper.make_graph(self.nodes, "main_graph", [source], [output], self.initializers)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, producer_name="demo"
        )
        onnx.checker.check_model(model)
        return model
