"""What people do to an exported model before they deploy it, each tool with its usual settings.

A path makes one ONNX file from another, or from a specimen; what a tool refuses for a model is its own affair.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime
import zoo

Tool = Callable[[zoo.Specimen, Path, Path], Path]


def optimise(level: str) -> Tool:
    """Return onnxruntime's own optimisation, saved."""

    def save(specimen: zoo.Specimen, source: Path, path: Path) -> Path:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        return path

    return save


_KINDS: Final = {"gpt2": "gpt2", "vit": "vit", "unet": "unet"}


def fuse_transformer(specimen: zoo.Specimen, source: Path, path: Path) -> Path:
    """Run onnxruntime's transformer optimiser: Attention, SkipLayerNormalization, BiasGelu."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    config = getattr(specimen.make(), "config", None)
    kind = _KINDS.get(str(getattr(config, "model_type", specimen.name)), "bert")
    heads = getattr(config, "num_attention_heads", 0) or 0
    hidden = getattr(config, "hidden_size", 0)
    with zoo.quiet():
        model = optimize_model(
            str(source),
            model_type=kind,
            num_heads=heads,
            hidden_size=hidden,
            optimization_options=FusionOptions(kind),
            opt_level=0,
        )
        model.save_model_to_file(str(path))
    return path


def slim(specimen: zoo.Specimen, source: Path, path: Path) -> Path:
    """Run onnxslim."""
    import onnxslim

    with zoo.quiet():
        onnxslim.slim(str(source), str(path))
    return path


def simplify(specimen: zoo.Specimen, source: Path, path: Path) -> Path:
    """Run onnxsim."""
    import onnxsim

    with zoo.quiet():
        model, sound = onnxsim.simplify(onnx.load(source))
    assert sound
    onnx.save(model, path)
    return path


def to_bfloat16(specimen: zoo.Specimen, source: Path, path: Path) -> Path:
    """Store the matrices in bfloat16 with a Cast behind each."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        import ml_dtypes

        values = onnx.numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, f"{name}_bf16"))
        cast = onnx.helper.make_node("Cast", [f"{name}_bf16"], [name], to=onnx.TensorProto.FLOAT)
        model.graph.node.insert(0, cast)
    onnx.save(model, path)
    return path


def to_constants(specimen: zoo.Specimen, source: Path, path: Path) -> Path:
    """Turn initializers into Constant nodes."""
    model = onnx.load(source)
    nodes = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    del model.graph.initializer[:]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    onnx.save(model, path)
    return path


def forget_names(specimen: zoo.Specimen, source: Path, path: Path) -> Path:
    """Rename everything and drop all metadata, as old exporters and some tools leave a graph."""
    model = onnx.load(source)
    _rename_graph(model.graph, {})
    del model.functions[:]
    onnx.save(model, path)
    return path


def _rename_graph(graph: onnx.GraphProto, outer: Mapping[str, str]) -> None:
    kept = {entry.name for entry in (*graph.input, *graph.output)}
    names: dict[str, str] = {**outer}
    for name in (*(t.name for t in graph.initializer), *(o for node in graph.node for o in node.output)):
        if name and name not in kept:
            names.setdefault(name, f"v{len(names)}")
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for index, node in enumerate(graph.node):
        node.name = f"n{index}"
        del node.metadata_props[:]
        node.doc_string = ""
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _rename_graph(inner, names)
    del graph.value_info[:]
    del graph.metadata_props[:]


def _half(specimen: zoo.Specimen, source: Path, path: Path) -> Path:
    return zoo.to_float16(source, path)


def _external(one_file: bool) -> Tool:
    return lambda specimen, source, path: zoo.to_external(source, path, one_file=one_file)


TOOLS: Final[Mapping[str, Tool]] = {
    "ORT basic": optimise("BASIC"),
    "ORT extended": optimise("EXTENDED"),
    "ORT all": optimise("ALL"),
    "ORT transformer optimiser": fuse_transformer,
    "onnxslim": slim,
    "onnxsim": simplify,
    "float16": _half,
    "bfloat16 + Cast": to_bfloat16,
    "Constant nodes": to_constants,
    "external data, one file": _external(one_file=True),
    "external data, many files": _external(one_file=False),
    "without names": forget_names,
}


def describe(error: Exception) -> str:
    """Return an exception in a line, for tables."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}" if str(error) else type(error).__name__


def make(lab: Any, name: str, exporter: zoo.Exporter, tool: str) -> Path:
    """Return a model after a tool, made once in a run."""
    path = lab.root / f"{name}-{exporter}-{tool.replace(' ', '_').replace(',', '')}" / "base.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        source = lab.exported(name, exporter)
        TOOLS[tool](zoo.SPECIMENS[name], source, path)
    return path
