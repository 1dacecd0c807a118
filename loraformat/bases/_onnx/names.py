"""Whose weight it is that an ONNX node applies: what exporters leave of module paths.

Evidence that stands at a node (scopes that the exporter wrote down, or the node's own path) beats the name of the
tensor: exporters merge equal tensors under the name of one of their owners, and fold others into them.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.traces import Trace, trace_constant
from loraformat.limits import MAX_EVIDENCE_BYTES

NODE_NAME: Final = "node name"
OUTPUT_NAME: Final = "output name"
_WITH_BIAS: Final = frozenset({"Gemm", "Conv", "com.microsoft.FusedGemm", "com.microsoft.FusedConv"})
_ADDENDS: Final = {
    "com.microsoft.BiasGelu": 1,
    "com.microsoft.FastGelu": 1,
    "com.microsoft.SkipLayerNormalization": 4,
    "com.microsoft.SkipSimplifiedLayerNormalization": 3,
}
"""The input at which an operator takes the bias of the layer whose product it reads first."""
_SKIPS: Final = frozenset({"com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization"})
"""Of these, those that add their first two inputs: either may be the product."""
_PRODUCTS: Final = frozenset({"MatMul", "Gemm", "MatMulInteger"}) | frozenset(
    f"com.microsoft.{name}"
    for name in (
        "FusedMatMul",
        "FusedGemm",
        "MatMulNBits",
        "MatMulBnb4",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
    )
)
_SCALED: Final = frozenset({"Cast", "Identity", "Mul", "Reshape"})
"""What stands between a product of codes and its value."""
_STEPS: Final = 4
_SCOPES_KEY: Final = "pkg.torch.onnx.name_scopes"
_CLASSES_KEY: Final = "pkg.torch.onnx.class_hierarchy"
_RULE_KEY: Final = "pkg.onnxscript.rewriter.rule_name"
_MARKS: Final = ("BatchNormalization", "ConvBnFusion", "ConvMulFusion")
_CONVS: Final[Mapping[str, tuple[int, int]]] = {
    "Conv": (1, 2),
    "com.microsoft.FusedConv": (1, 2),
    "ConvInteger": (1, 9),
    "QLinearConv": (3, 8),
}
"""Convolutions, and their inputs with weight and bias."""
_COMPOSED: Final = "//"
_UNCALLED: Final = "out_proj"
"""The module in torch's MultiheadAttention whose weight that applies without calling it; PEFT adapts both."""
_QUANTISED: Final = "_quantized"
_REPEATED: Final = re.compile(r"\.\d")
_NUMBER: Final = re.compile(r"_\d+$")
_NUMBERED: Final = re.compile(r"^(?:(.+)_\._|(layer)_)(\d+)$")
_OF_KERAS: Final = frozenset({"MatMul", "Tensordot", "Conv1D", "Conv2D", "Conv3D", "BiasAdd"})
"""What TensorFlow calls operations on a layer's kernel."""
_KERAS_BIAS: Final = "/BiasAdd/ReadVariableOp"


def find_folding(visit: Visit, trace: Trace) -> str:
    """Return what shows that another layer's numbers were multiplied into the weight, or nothing."""
    metadata = _metadata(visit)
    rule = metadata.get(_RULE_KEY, "")
    if "FuseBatchNorm" in rule:
        return f"BatchNorm was folded into it (exporter's rule {rule})"
    classes = _read_list(metadata.get(_CLASSES_KEY, ""))
    if len(classes) > 1 and "batchnorm" in classes[-2].lower():
        return f"BatchNorm was folded into it (its class is {classes[-2]})"
    return _find_folded_conv(visit, trace) if visit.op in _CONVS and not trace.blocked else ""


def _find_folded_conv(visit: Visit, trace: Trace) -> str:
    """Return what shows it of a convolution whose node says nothing: its weight, its bias or its output has a new name.

    No exporter renames a convolution's weight unless it has computed another; tools that fold BatchNorm afterwards name
    weight, bias or output after it.
    """
    inputs, (weight, place) = visit.node.input, _CONVS[visit.op]
    weights = [name.removesuffix(_QUANTISED) for name in _list_names(visit, weight, trace)]
    bias, output = next(iter(inputs[place : place + 1]), ""), next(iter(visit.node.output), "")
    bias = bias.removesuffix(_QUANTISED)
    if _read_keras_path(visit, weights):
        is_own = not bias or _KERAS_BIAS in bias
        return "" if is_own else f"BatchNorm was folded into it (it was given the bias {bias})"
    if not any(name.endswith(".weight") for name in weights):
        if _is_anonymous(visit) or any(_is_parameter(name, visit) for name in weights):
            return ""
        return f"BatchNorm was folded into it (the weight was renamed to {trace.name})"
    if any(bias == f"{name}_bias" for name in weights):
        return f"BatchNorm was folded into it (it was given the bias {bias})"
    if any(mark in name.rpartition("/")[2] for mark in _MARKS for name in (*weights, bias, output)):
        return f"BatchNorm was folded into it (it makes {output} of {trace.name} and {bias})"
    return ""


def _is_anonymous(visit: Visit) -> bool:
    """Say whether nothing at a node tells its module, so that its weight's name tells nothing either."""
    return not (_read_scopes(_metadata(visit).get(_SCOPES_KEY, "")) or read_node_path(visit.node.name))


def _is_parameter(name: str, visit: Visit) -> bool:
    """Say whether a tensor has the name of a parameter of the node's module other than its weight: a filter bank."""
    owner, _, own = name.rpartition(".")
    path = read_node_path(visit.node.name)
    return bool(owner and path) and "weight" not in own and _holds(owner.split("."), path.split("."))


def module_of_node(visit: Visit, position: int, trace: Trace, parameter: str = "weight") -> tuple[str, str]:
    """Return the module path that stands at the node, at a Transpose before its weight, or at the call around it."""
    around: Visit | None = visit
    while around is not None:
        for candidate in (around, *(step for step in trace.steps if around is visit)):
            path = _read_scopes(_metadata(candidate).get(_SCOPES_KEY, ""))
            if path:
                uncalled = _find_uncalled(path, visit, position, trace, parameter)
                return (uncalled, "name scopes and tensor name") if uncalled else (path, "name scopes")
            path = read_node_path(candidate.node.name)
            if path:
                return _refine(path, visit, position, trace, parameter)
        if around is visit and (path := _read_keras_path(visit, _list_names(visit, position, trace))):
            return path, NODE_NAME
        around = around.call
    return "", ""


def _refine(path: str, visit: Visit, position: int, trace: Trace, parameter: str) -> tuple[str, str]:
    """Return the whole path where the weight's or bias's own name tells it.

    The TorchScript exporter leaves out modules that are never called themselves, and numbers what then looks alike: for
    `self.inner.fc(x)` beside `self.fc(x)` it writes `/fc` and `/fc_1`, in the order of the calls. A name that the node
    reads directly, before Identity, is the parameter's own. One that does not hold the node's path is that of a tied
    weight, and tells nothing here.
    """
    beside = _bias_names(visit) if parameter == "weight" else ()
    owners = [*_list_owners(visit, position, trace, parameter), *_strip_endings(beside, ".bias")]
    whole = next((owner for owner in owners if _holds(owner.split("."), path.split("."))), "")
    whole = whole or _find_uncalled(path, visit, position, trace, parameter)
    return (whole, f"{NODE_NAME} and tensor name") if whole else (path, NODE_NAME)


def _list_owners(visit: Visit, position: int, trace: Trace, parameter: str) -> Iterator[str]:
    """Yield the modules whose parameter a node reads, by the names of what it reads."""
    return _strip_endings([visit.node.input[position], *(s.node.input[0] for s in trace.steps)], f".{parameter}")


def _strip_endings(names: Iterable[str], ending: str) -> Iterator[str]:
    """Yield the modules of parameters; what `onnx.compose` put before a name ends at a slash."""
    return (name.removesuffix(ending).replace("/", ".") for name in names if name.endswith(ending))


def _find_uncalled(path: str, visit: Visit, position: int, trace: Trace, parameter: str) -> str:
    """Return the module inside that of a path which never runs itself, where a node applies its weight; else nothing.

    A bias tells nothing here: of new models all biases are zeros, and stored once.
    """
    for owner in _list_owners(visit, position, trace, parameter):
        parent, _, own = owner.rpartition(".")
        if own == _UNCALLED and parent and _holds(parent.split("."), path.split(".")):
            return owner
    return ""


def _holds(whole: list[str], parts: list[str]) -> bool:
    """Say whether `parts` are some of `whole`, in order and with the last of both the same, numbers aside."""
    if not _is_same(parts[-1], whole[-1]):
        return False
    rest = iter(whole[:-1])
    return all(any(_is_same(part, other) for other in rest) for part in parts[:-1])


def _is_same(part: str, own: str) -> bool:
    return part == own or _NUMBER.sub("", part) == own


def find_repeated(paths: Iterable[str]) -> set[str]:
    """Return the paths that differ from another only by a number that the exporter may have added to a part."""
    known = set(paths)
    repeated: set[str] = set()
    for path in known:
        parts = path.split(".")
        for index, part in enumerate(parts):
            plain = ".".join([*parts[:index], _NUMBER.sub("", part), *parts[index + 1 :]])
            if plain != path and plain in known:
                repeated |= {path, plain}
    return repeated


def module_of_tensor(visit: Visit, trace: Trace) -> tuple[str, str]:
    """Return the module path that the tensor's name, or the name of a bias beside it, gives."""
    own = [trace.tensor.name] if trace.tensor is not None else []
    for names, ending, evidence in ((own, ".weight", "initializer name"), (_bias_names(visit), ".bias", "bias name")):
        for module in _strip_endings(names, ending):
            return module, evidence
    # Tools that rename nodes keep the names of values; a fused node has that of its last operator.
    path = next(filter(None, (read_node_path(name) for name in visit.node.output)), "")
    return path, OUTPUT_NAME if path else ""


def _bias_names(visit: Visit) -> Iterator[str]:
    """Yield the names by which the node reads what it adds, or by which the one addition after it does."""
    if visit.op in _WITH_BIAS:
        yield from visit.node.input[2:3]
        return
    for reader, position in visit.scope.readers.get(next(iter(visit.node.output), ""), ()):
        other = find_addend(reader, position)
        if other:
            trace = trace_constant(reader.scope, other)
            if trace is not None and trace.tensor is not None and len(trace.tensor.dims) == 1:
                yield from (other, trace.tensor.name)


def find_addend(reader: Visit, position: int) -> str:
    """Return the name of what an operator adds to the value that it reads at `position`; empty for nothing."""
    inputs = list(reader.node.input)
    if reader.op == "Add" and len(inputs) == 2:
        return str(inputs[1 - position])
    place = _ADDENDS.get(reader.op, 0) if position <= (reader.op in _SKIPS) else 0
    if not 0 < place < len(inputs) or (reader.op in _SKIPS and _is_product(reader, 1 - position)):
        return ""
    return str(inputs[place])


def _is_product(visit: Visit, position: int) -> bool:
    """Say whether a layer's product is read at a position: of two that are added, either may have the bias."""
    made_by = visit.scope.producer(visit.node.input[position])
    for _ in range(_STEPS):
        if isinstance(made_by, Visit) and made_by.op in _SCALED:
            made_by = made_by.scope.producer(made_by.node.input[0])
    return isinstance(made_by, Visit) and made_by.op in _PRODUCTS


def read_node_path(name: str) -> str:
    """Return the module path in a node name that the TorchScript exporter wrote, or nothing.

    `/model/layers.0/self_attn/q_proj/MatMul` is `model.layers.0.self_attn.q_proj`. A Sequential that is called stands
    twice: `/classifier/classifier.1/Gemm` is `classifier.1`. What `onnx.compose` put before it ends at a slash too:
    `first//model/fc/MatMul` is `first.model.fc`.
    """
    if not name.startswith("/") and _COMPOSED not in name:
        return ""
    parts = name.removeprefix("/").replace(_COMPOSED, "/", 1).split("/")[:-1]
    kept = [part for part, after in zip(parts, [*parts[1:], ""], strict=False) if not _is_repeated(part, after)]
    return ".".join(kept)


def _read_keras_path(visit: Visit, read: Iterable[str]) -> str:
    """Return the path of layers in the name of an operation of TensorFlow, or nothing.

    `tf_bert_model/bert/encoder/layer_._0/attention/self/query/Tensordot/MatMul` is the module
    `bert.encoder.layer.0.attention.self.query` of a `tf_bert_model`; Google's own BERT has `layer_0`. What the node
    reads must be called after the same layer: tf2onnx stores equal tensors once, and folds others.
    """
    *parts, operation = visit.node.name.split("/")
    if not parts or operation not in _OF_KERAS:
        return ""
    while parts and parts[-1] in _OF_KERAS:
        parts.pop()
    layer = "/".join(parts)
    if not layer or not any(name.startswith(f"{layer}/") for name in read):
        return ""
    return ".".join(_NUMBERED.sub(lambda found: f"{found[1] or found[2]}.{found[3]}", part) for part in parts)


def _list_names(visit: Visit, position: int, trace: Trace) -> list[str]:
    """Return the names by which a node reads its weight, from its input to the tensor."""
    return [visit.node.input[position], *(step.node.input[0] for step in trace.steps), trace.name]


def _is_repeated(part: str, after: str) -> bool:
    return after.startswith(part) and _REPEATED.match(after[len(part) :]) is not None


def _read_scopes(text: str) -> str:
    """Return the module path in the exporter's list of scopes: the last but one; the last names the operation."""
    scopes = _read_list(text)
    return scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_") else ""


def _read_list(text: str) -> list[str]:
    """Return a list of strings written as a Python literal; nothing for anything else."""
    if not text.startswith("[") or len(text) > MAX_EVIDENCE_BYTES:
        return []
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else []


def _metadata(visit: Visit) -> Mapping[str, str]:
    return {entry.key: entry.value for entry in visit.node.metadata_props}
