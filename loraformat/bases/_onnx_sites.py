"""Where an ONNX graph applies weights: which inputs of which operators, how they are oriented, whose they are.

Evidence that stands at a node (scopes that the exporter wrote down, or the node's own path) beats the name of the
tensor: exporters merge equal tensors under the name of one of their owners, and fold others into them.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from loraformat.adapter import SlotKind
from loraformat.bases._onnx_scopes import Trace, Visit, trace_constant
from loraformat.limits import MAX_EVIDENCE_BYTES
from loraformat.problems import Problem

if TYPE_CHECKING:
    import onnx

Orientations: TypeAlias = Mapping[SlotKind, bool]

_SCOPES_KEY: Final = "pkg.torch.onnx.name_scopes"
_CLASSES_KEY: Final = "pkg.torch.onnx.class_hierarchy"
_RULE_KEY: Final = "pkg.onnxscript.rewriter.rule_name"
_ANONYMOUS_CONV: Final = re.compile(r"^onnx::Conv_\d+$")
_REPEATED: Final = re.compile(r"\.\d")


@dataclass(frozen=True, slots=True)
class Use:
    """How an operator uses its weight.

    Attributes:
        orientations: kinds of slot that it is, each with whether the operator's view of the matrix is the transpose of
            the canonical `(out, in * kernel)`.
        divisor: what the operator multiplies the product by.
        refusal: why nothing can be merged here; empty when it can.
    """

    orientations: Orientations
    divisor: float = 1.0
    refusal: str = ""


def _linear(*, transposed: bool) -> Orientations:
    return {SlotKind.LINEAR: transposed, SlotKind.LINEAR_TRANSPOSED: transposed}


_ANY: Final[Orientations] = dict.fromkeys(SlotKind, False)


def _use_matmul(node: "onnx.NodeProto", position: int) -> Use:
    """Y = X·W: as the second input W is `(in, out)`; as the first, W·X, it is `(out, in)`."""
    return Use(_linear(transposed=position == 1))


def _use_gemm(node: "onnx.NodeProto", position: int) -> Use:
    flag = _attribute(node, "transB" if position == 1 else "transA", 0)
    alpha = float(_attribute(node, "alpha", 1.0))
    refusal = "" if alpha else "the operator multiplies the product by zero"
    return Use(_linear(transposed=(position == 1) != bool(flag)), alpha or 1.0, refusal)


def _use_conv(node: "onnx.NodeProto", position: int) -> Use:
    group = _attribute(node, "group", 1)
    return Use({SlotKind.CONV: False}, refusal="" if group == 1 else f"a convolution of {group} groups")


def _use_gather(node: "onnx.NodeProto", position: int) -> Use:
    axis = _attribute(node, "axis", 0)
    return Use({SlotKind.EMBEDDING: True}, refusal="" if axis == 0 else f"a lookup along axis {axis}")


def _read_use(visit: Visit, position: int, read: "_UseReader") -> Use:
    """Return the operator's use of its weight; an attribute that the caller of its function sets is not followed."""
    borrowed = next((attribute.name for attribute in visit.node.attribute if attribute.ref_attr_name), None)
    if borrowed is not None:
        return Use(_ANY, refusal=f"the caller of a function sets the attribute {borrowed!r} of {visit.op}")
    return read(visit.node, position)


def _refuse_use(node: "onnx.NodeProto", position: int) -> Use:
    return Use(_ANY, refusal=f"the operator {node.op_type} holds its weight in a form of its own")


_UseReader: TypeAlias = "Callable[[onnx.NodeProto, int], Use]"

_USES: Final[Mapping[str, tuple[tuple[int, ...], _UseReader]]] = {
    "MatMul": ((1, 0), _use_matmul),
    "Gemm": ((1, 0), _use_gemm),
    "Conv": ((1,), _use_conv),
    "Gather": ((0,), _use_gather),
    "ConvTranspose": ((1,), _refuse_use),
    "MatMulInteger": ((1,), _refuse_use),
    "ConvInteger": ((1,), _refuse_use),
    "QLinearMatMul": ((3,), _refuse_use),
    "QLinearConv": ((3,), _refuse_use),
    "com.microsoft.Attention": ((1,), _refuse_use),
    "com.microsoft.DynamicQuantizeMatMul": ((1,), _refuse_use),
    "com.microsoft.EmbedLayerNormalization": ((2,), _refuse_use),
    "com.microsoft.FusedConv": ((1,), _refuse_use),
    "com.microsoft.FusedGemm": ((1,), _refuse_use),
    "com.microsoft.FusedMatMul": ((1,), _refuse_use),
    "com.microsoft.GatherBlockQuantized": ((0,), _refuse_use),
    "com.microsoft.MatMulNBits": ((1,), _refuse_use),
    "com.microsoft.NhwcConv": ((1,), _refuse_use),
    "com.microsoft.QAttention": ((1,), _refuse_use),
    "com.microsoft.QGemm": ((3,), _refuse_use),
    "com.microsoft.nchwc.Conv": ((1,), _refuse_use),
}
"""Operator to the inputs that may hold a weight, and how they use it. MatMul may have it on either side."""


@dataclass(frozen=True, slots=True)
class RawSite:
    """A place where an operator reads a constant as its weight.

    Attributes:
        visit: the node.
        position: which input.
        trace: where the constant is.
        use: how it is used.
        module: module path.
        evidence: how the path is known.
        folded: why the stored values are not the module's own weight; empty when they are.
    """

    visit: Visit
    position: int
    trace: Trace
    use: Use
    module: str
    evidence: str
    folded: str = ""

    @property
    def obstacle(self) -> Problem | None:
        """Why nothing can be merged here, as far as the graph tells."""
        where = f"{self.visit.op} {self.visit.node.name!r}"
        if self.folded:
            return Problem("LF407", where, self.folded, "the module's own weight")
        if self.use.refusal:
            return Problem("LF403", where, self.use.refusal, "a plain weight of MatMul, Gemm, Conv or Gather")
        if self.trace.blocked:
            return Problem("LF403", where, f"a weight behind {self.trace.blocked}", "a weight that is stored as it is")
        return None


def find_sites(visits: "Iterator[Visit] | list[Visit]") -> Iterator[RawSite]:
    """Yield every site; one whose module is unknown has an empty path."""
    for visit in visits:
        positions, read_use = _USES.get(visit.op, ((), _refuse_use))
        for position in positions:
            trace = _trace_input(visit, position)
            if trace is not None:
                yield from _name_site(visit, position, trace, _read_use(visit, position, read_use))
                break


def _trace_input(visit: Visit, position: int) -> Trace | None:
    inputs = visit.node.input
    return trace_constant(visit.scope, inputs[position]) if position < len(inputs) and inputs[position] else None


def _name_site(visit: Visit, position: int, trace: Trace, use: Use) -> Iterator[RawSite]:
    """Yield the site under its module's path, and under the tensor's name too where folding hides the module."""
    folded = _find_folding(visit, trace)
    module, evidence = _module_of_node(visit, trace)
    if not module or folded:
        named, tensor_evidence = _module_of_tensor(visit, trace)
        if named and named != module:
            yield RawSite(visit, position, trace, use, named, tensor_evidence, folded)
            if not module:
                return
    yield RawSite(visit, position, trace, use, module, evidence, folded)


def _find_folding(visit: Visit, trace: Trace) -> str:
    """Return what shows that another layer's numbers were multiplied into the weight, or nothing."""
    metadata = _metadata(visit)
    rule = metadata.get(_RULE_KEY, "")
    if "FuseBatchNorm" in rule:
        return f"BatchNorm was folded into it (exporter's rule {rule})"
    classes = _read_list(metadata.get(_CLASSES_KEY, ""))
    if len(classes) > 1 and "batchnorm" in classes[-2].lower():
        return f"BatchNorm was folded into it (its class is {classes[-2]})"
    if visit.op == "Conv" and _ANONYMOUS_CONV.match(trace.name):
        return f"BatchNorm was folded into it (the exporter renamed the weight to {trace.name})"
    return ""


def _module_of_node(visit: Visit, trace: Trace) -> tuple[str, str]:
    """Return the module path that stands at the node, at a Transpose before its weight, or at the call around it."""
    around: Visit | None = visit
    while around is not None:
        for candidate in (around, *(step for step in trace.steps if around is visit)):
            path = _read_scopes(_metadata(candidate).get(_SCOPES_KEY, ""))
            if path:
                return path, "name scopes"
            path = read_node_path(candidate.node.name)
            if path:
                return path, "node name"
        around = around.call
    return "", ""


def _module_of_tensor(visit: Visit, trace: Trace) -> tuple[str, str]:
    """Return the module path that the tensor's name, or the name of a bias beside it, gives."""
    if trace.tensor is not None and trace.tensor.name.endswith(".weight"):
        return trace.tensor.name.removesuffix(".weight"), "initializer name"
    for name in _bias_names(visit):
        if name.endswith(".bias"):
            return name.removesuffix(".bias"), "bias name"
    return "", ""


def _bias_names(visit: Visit) -> Iterator[str]:
    """Yield the names of tensors that the node adds, or that the one addition after it does."""
    if visit.op in {"Gemm", "Conv"}:
        yield from visit.node.input[2:3]
        return
    for reader, position in visit.scope.readers.get(next(iter(visit.node.output), ""), ()):
        if reader.op == "Add" and len(reader.node.input) == 2:
            other = trace_constant(reader.scope, reader.node.input[1 - position])
            if other is not None and other.tensor is not None and len(other.tensor.dims) == 1:
                yield other.tensor.name


def read_node_path(name: str) -> str:
    """Return the module path in a node name that the TorchScript exporter wrote, or nothing.

    `/model/layers.0/self_attn/q_proj/MatMul` is `model.layers.0.self_attn.q_proj`. A Sequential that is called stands
    twice: `/classifier/classifier.1/Gemm` is `classifier.1`.
    """
    if not name.startswith("/"):
        return ""
    parts = name[1:].split("/")[:-1]
    kept = [part for part, after in zip(parts, [*parts[1:], ""], strict=False) if not _is_repeated(part, after)]
    return ".".join(kept)


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


def _attribute(node: "onnx.NodeProto", name: str, default: Any) -> Any:
    """Return the number that an attribute holds."""
    for attribute in node.attribute:
        if attribute.name == name:
            return attribute.f if isinstance(default, float) else attribute.i
    return default
