"""Where an ONNX graph applies weights: which inputs of which operators, and how they are oriented."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from loraformat.adapter import SlotKind
from loraformat.bases._onnx_names import NODE_NAME, find_folding, find_repeated, module_of_node, module_of_tensor
from loraformat.bases._onnx_scopes import Trace, Visit, trace_constant
from loraformat.problems import Problem

if TYPE_CHECKING:
    import onnx

_EXPORT_AGAIN: Final = "Export with dynamo=True, or with do_constant_folding=False, which keeps the weights' names."

Orientations: TypeAlias = Mapping[SlotKind, bool]


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
    return {SlotKind.LINEAR: transposed, SlotKind.LINEAR_TRANSPOSED: transposed, SlotKind.PARAMETER: transposed}


_AS_IT_IS: Final[Orientations] = {SlotKind.PARAMETER: False}


_ANY: Final[Orientations] = dict.fromkeys(SlotKind, False)


def _use_matmul(node: "onnx.NodeProto", position: int) -> Use:
    """Y = X·W: as the second input W is `(in, out)`; as the first, W·X, it is `(out, in)`."""
    return Use(_linear(transposed=position == 1))


def _use_gemm(node: "onnx.NodeProto", position: int) -> Use:
    flag = read_attribute(node, "transB" if position == 1 else "transA", 0)
    alpha = float(read_attribute(node, "alpha", 1.0))
    refusal = "" if alpha else "the operator multiplies the product by zero"
    orientations = _linear(transposed=(position == 1) != bool(flag))
    if orientations[SlotKind.LINEAR]:  # A Linear, or GPT-2's Conv1D, whose own parameter is the other way round.
        orientations = {kind: turned for kind, turned in orientations.items() if kind is not SlotKind.PARAMETER}
    return Use(orientations, alpha or 1.0, refusal)


def _use_addend(node: "onnx.NodeProto", position: int) -> Use:
    beta = float(read_attribute(node, "beta", 1.0))
    return Use(_AS_IT_IS, refusal="" if beta == 1 else f"the operator multiplies its bias by {beta:g}")


def _use_as_it_is(node: "onnx.NodeProto", position: int) -> Use:
    return Use(_AS_IT_IS)


def _use_conv(node: "onnx.NodeProto", position: int) -> Use:
    group = read_attribute(node, "group", 1)
    return Use({SlotKind.CONV: False, **_AS_IT_IS}, refusal="" if group == 1 else f"a convolution of {group} groups")


def _use_gather(node: "onnx.NodeProto", position: int) -> Use:
    axis = read_attribute(node, "axis", 0)
    return Use({SlotKind.EMBEDDING: True, **_AS_IT_IS}, refusal="" if axis == 0 else f"a lookup along axis {axis}")


def _read_use(visit: Visit, position: int, read: "_UseReader") -> Use:
    """Return the operator's use of its weight; an attribute that the caller of its function sets is not followed."""
    borrowed = next((attribute.name for attribute in visit.node.attribute if attribute.ref_attr_name), None)
    if borrowed is not None:
        return Use(_ANY, refusal=f"the caller of a function sets the attribute {borrowed!r} of {visit.op}")
    return read(visit.node, position)


def _use_right_factor(node: "onnx.NodeProto", position: int) -> Use:
    """Y = X·W, W `(in, out)` at whatever input."""
    return Use(_linear(transposed=True))


def _use_quantised_gemm(node: "onnx.NodeProto", position: int) -> Use:
    return _use_gemm(node, 1)


def _use_nbits(node: "onnx.NodeProto", position: int) -> Use:
    """Y = X·Wᵀ: rows of the codes are those of `(out, in)`."""
    return Use(_linear(transposed=False))


def _refuse_use(node: "onnx.NodeProto", position: int) -> Use:
    return Use(_ANY, refusal=f"the operator {node.op_type} holds its weight in a form of its own")


_UseReader: TypeAlias = "Callable[[onnx.NodeProto, int], Use]"

_USES: Final[Mapping[str, tuple[tuple[int, ...], _UseReader]]] = {
    "MatMul": ((1, 0), _use_matmul),
    "Gemm": ((1, 0), _use_gemm),
    "Conv": ((1,), _use_conv),
    "Gather": ((0,), _use_gather),
    "ConvTranspose": ((1,), _refuse_use),
    "MatMulInteger": ((1,), _use_matmul),
    "ConvInteger": ((1,), _use_conv),
    "QLinearMatMul": ((3,), _use_right_factor),
    "QLinearConv": ((3,), _use_conv),
    "com.microsoft.Attention": ((1,), _refuse_use),
    "com.microsoft.DynamicQuantizeMatMul": ((1,), _use_right_factor),
    "com.microsoft.EmbedLayerNormalization": ((2,), _refuse_use),
    "com.microsoft.FusedConv": ((1,), _refuse_use),
    "com.microsoft.FusedGemm": ((1,), _refuse_use),
    "com.microsoft.FusedMatMul": ((1,), _refuse_use),
    "com.microsoft.GatherBlockQuantized": ((0,), _refuse_use),
    "com.microsoft.MatMulIntegerToFloat": ((1,), _use_right_factor),
    "com.microsoft.MatMulNBits": ((1,), _use_nbits),
    "com.microsoft.NhwcConv": ((1,), _refuse_use),
    "com.microsoft.QAttention": ((1,), _refuse_use),
    "com.microsoft.QGemm": ((3,), _use_quantised_gemm),
    "com.microsoft.nchwc.Conv": ((1,), _refuse_use),
}
"""Operator to the inputs that may hold a weight, and how they use it. MatMul may have it on either side."""

_VECTORS: Final[Mapping[str, tuple[tuple[tuple[int, ...], str, _UseReader], ...]]] = {
    "Add": (((1, 0), "bias", _use_as_it_is),),
    "Gemm": (((2,), "bias", _use_addend),),
    "Conv": (((2,), "bias", _use_as_it_is),),
    "LayerNormalization": (((1,), "weight", _use_as_it_is), ((2,), "bias", _use_as_it_is)),
    "Mul": (((1, 0), "weight", _use_as_it_is),),
}
"""Operator to the inputs that may hold one of a module's vectors: what a Linear adds, what a norm multiplies by."""


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
        parameter: which of the module's parameters it is.
        repeated: whether the exporter may have given this path to another module of the same name.
    """

    visit: Visit
    position: int
    trace: Trace
    use: Use
    module: str
    evidence: str
    folded: str = ""
    parameter: str = "weight"
    repeated: bool = False

    @property
    def obstacle(self) -> Problem | None:
        """Why nothing can be merged here, as far as the graph tells."""
        where = f"{self.visit.op} {self.visit.node.name!r}"
        if self.folded:
            return Problem("LF407", where, self.folded, "the module's own weight")
        if self.repeated:
            found = f"{self.module!r} and the same with a number: the exporter numbers what it cannot tell apart"
            return Problem("LF404", where, found, "a path, or the name of a weight or bias, of its own", _EXPORT_AGAIN)
        if self.use.refusal:
            return Problem("LF403", where, self.use.refusal, "a plain weight of MatMul, Gemm, Conv or Gather")
        if self.trace.blocked:
            return Problem("LF403", where, f"a weight behind {self.trace.blocked}", "a weight that is stored as it is")
        return None


def find_sites(visits: Iterable[Visit]) -> list[RawSite]:
    """Return every site; one whose module is unknown has an empty path."""
    sites = [site for visit in visits for site in _find_at(visit)]
    repeated = find_repeated(site.module for site in sites if site.evidence == NODE_NAME)
    return [replace(site, repeated=site.evidence == NODE_NAME and site.module in repeated) for site in sites]


def _find_at(visit: Visit) -> Iterator[RawSite]:
    positions, read_use = _USES.get(visit.op, ((), _refuse_use))
    for position in positions:
        trace = _trace_input(visit, position)
        if trace is not None:
            use = _read_use(visit, position, read_use)
            yield from _name_site(visit, position, trace, _without_doubt(visit, position, trace, use))
            break
    for positions, parameter, read_vector in _VECTORS.get(visit.op, ()):
        yield from _find_vector(visit, positions, parameter, read_vector)


def _without_doubt(visit: Visit, position: int, trace: Trace, use: Use) -> Use:
    """Return the use without the slot `parameter` where the stored matrix may lie either way round.

    A tensor that bears a weight's own name is that weight as it is; one that an operator reads the other way round than
    a Linear's is some other module's, or was turned by a tool that kept the name. A nameless left factor was made of
    the weight in a way that nothing tells.
    """
    named = trace.tensor is not None and trace.tensor.name.endswith(".weight")
    turned = use.orientations.get(SlotKind.PARAMETER, False) ^ trace.flipped
    if turned if named else (visit.op == "MatMul" and position == 0):
        return replace(use, orientations={k: v for k, v in use.orientations.items() if k is not SlotKind.PARAMETER})
    return use


def _find_vector(visit: Visit, positions: Iterable[int], parameter: str, read: _UseReader) -> Iterator[RawSite]:
    """Yield the site of a vector among the inputs at `positions`; two constants together are no module's parameter.

    A vector keeps its name on every way into a graph but one: a nameless one was computed from the parameter, as
    `1 + weight` of Gemma's norms is.
    """
    traced = [(position, trace) for position in positions if (trace := _trace_input(visit, position)) is not None]
    if len(traced) != 1:
        return
    position, trace = traced[0]
    if trace.tensor is None or len(trace.tensor.dims) != 1:
        return
    names = (visit.node.input[position], *(step.node.input[0] for step in trace.steps), trace.tensor.name)
    if not any(name.endswith(f".{parameter}") for name in names):
        return
    module, evidence = module_of_node(visit, position, trace, parameter)
    if module:
        use = _read_use(visit, position, read)
        yield RawSite(visit, position, trace, use, module, evidence, find_folding(visit, trace), parameter)


def _trace_input(visit: Visit, position: int) -> Trace | None:
    inputs = visit.node.input
    return trace_constant(visit.scope, inputs[position]) if position < len(inputs) and inputs[position] else None


def _name_site(visit: Visit, position: int, trace: Trace, use: Use) -> Iterator[RawSite]:
    """Yield the site under its module's path, and under the tensor's name too where folding hides the module."""
    folded = find_folding(visit, trace)
    module, evidence = module_of_node(visit, position, trace)
    if not module or folded:
        named, tensor_evidence = module_of_tensor(visit, trace)
        if named and named != module:
            yield RawSite(visit, position, trace, use, named, tensor_evidence, folded)
            if not module:
                return
    yield RawSite(visit, position, trace, use, module, evidence, folded)


def read_attribute(node: "onnx.NodeProto", name: str, default: Any) -> Any:
    """Return the number that an attribute holds."""
    for attribute in node.attribute:
        if attribute.name == name:
            return attribute.f if isinstance(default, float) else attribute.i
    return default
