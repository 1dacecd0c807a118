"""How ONNX operators use their weights: which inputs hold them, and how they are oriented."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from loraformat.adapter import SlotKind
from loraformat.bases._onnx.scopes import Visit

if TYPE_CHECKING:
    import onnx

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


def _use_fused_matmul(node: "onnx.NodeProto", position: int) -> Use:
    """Y = alpha·op(X)·op(W), as onnxruntime fuses Transposes and constant factors into a MatMul."""
    flag = read_attribute(node, "transB" if position == 1 else "transA", 0)
    alpha = float(read_attribute(node, "alpha", 1.0))
    batched = read_attribute(node, "transBatchA", 0) or read_attribute(node, "transBatchB", 0)
    refusal = "" if alpha else "the operator multiplies the product by zero"
    orientations = _linear(transposed=(position == 1) != bool(flag))
    return Use(orientations, alpha or 1.0, "the operator turns batches" if batched else refusal)


def _use_packed(node: "onnx.NodeProto", position: int) -> Use:
    """The weights of q, k and v side by side, `(in, q + k + v)`."""
    return Use({kind: True for kind in _linear(transposed=True) if kind is not SlotKind.PARAMETER})


def _use_table(node: "onnx.NodeProto", position: int) -> Use:
    return Use({SlotKind.EMBEDDING: True, **_AS_IT_IS})


def _use_addend(node: "onnx.NodeProto", position: int) -> Use:
    beta = float(read_attribute(node, "beta", 1.0))
    return Use(_AS_IT_IS, refusal="" if beta == 1 else f"the operator multiplies its bias by {beta:g}")


def _use_as_it_is(node: "onnx.NodeProto", position: int) -> Use:
    return Use(_AS_IT_IS)


def _use_conv(node: "onnx.NodeProto", position: int) -> Use:
    """W is `(out, in / group, *kernel)`: a change of that shape is one, whatever the groups."""
    return Use({SlotKind.CONV: False, **_AS_IT_IS})


def _use_gather(node: "onnx.NodeProto", position: int) -> Use:
    axis = read_attribute(node, "axis", 0)
    return Use({SlotKind.EMBEDDING: True, **_AS_IT_IS}, refusal="" if axis == 0 else f"a lookup along axis {axis}")


def _use_right_factor(node: "onnx.NodeProto", position: int) -> Use:
    """Y = X·W, W `(in, out)` at whatever input."""
    return Use(_linear(transposed=True))


def _use_quantised_gemm(node: "onnx.NodeProto", position: int) -> Use:
    return _use_gemm(node, 1)


def _use_nbits(node: "onnx.NodeProto", position: int) -> Use:
    """Y = X·Wᵀ: rows of the codes are those of `(out, in)`, unless they were laid out for CUDA's kernels."""
    layout = read_attribute(node, "weight_prepacked", 0)
    refusal = f"codes laid out for CUDA's kernels (weight_prepacked is {layout})" if layout else ""
    return Use(_linear(transposed=False), refusal=refusal)


def _use_bnb4(node: "onnx.NodeProto", position: int) -> Use:
    """Y = X·Wᵀ, unless an attribute says that it is the other way round, as for training."""
    turned = not read_attribute(node, "transB", 1)
    return Use(_linear(transposed=False), refusal="codes of the transpose (transB = 0)" if turned else "")


def read_use(visit: Visit, position: int, read: "UseReader") -> Use:
    """Return the operator's use of its weight; an attribute that the caller of its function sets is not followed."""
    borrowed = next((attribute.name for attribute in visit.node.attribute if attribute.ref_attr_name), None)
    if borrowed is not None:
        return Use(_ANY, refusal=f"the caller of a function sets the attribute {borrowed!r} of {visit.op}")
    return read(visit.node, position)


def refuse_use(node: "onnx.NodeProto", position: int) -> Use:
    """Return the use of an operator that nothing can be merged into."""
    return Use(_ANY, refusal=f"the operator {node.op_type} holds its weight in a form of its own")


UseReader: TypeAlias = "Callable[[onnx.NodeProto, int], Use]"

USES: Final[Mapping[str, tuple[tuple[int, ...], UseReader]]] = {
    "MatMul": ((1, 0), _use_matmul),
    "Gemm": ((1, 0), _use_gemm),
    "Conv": ((1,), _use_conv),
    "Gather": ((0,), _use_gather),
    "ConvTranspose": ((1,), refuse_use),
    "Einsum": ((1, 0), refuse_use),
    "GRU": ((1,), refuse_use),
    "LSTM": ((1,), refuse_use),
    "RNN": ((1,), refuse_use),
    "MatMulInteger": ((1,), _use_matmul),
    "ConvInteger": ((1,), _use_conv),
    "QLinearMatMul": ((3,), _use_right_factor),
    "QLinearConv": ((3,), _use_conv),
    "com.microsoft.Attention": ((1,), _use_packed),
    "com.microsoft.DynamicQuantizeMatMul": ((1,), _use_right_factor),
    "com.microsoft.EmbedLayerNormalization": ((2,), _use_table),
    "com.microsoft.FusedConv": ((1,), _use_conv),
    "com.microsoft.FusedGemm": ((1, 0), _use_gemm),
    "com.microsoft.FusedMatMul": ((1, 0), _use_fused_matmul),
    "com.microsoft.GatherBlockQuantized": ((0,), _use_table),
    "com.microsoft.MatMulBnb4": ((1,), _use_bnb4),
    "com.microsoft.MatMulFpQ4": ((1,), refuse_use),
    "com.microsoft.MatMulIntegerToFloat": ((1,), _use_right_factor),
    "com.microsoft.MatMulNBits": ((1,), _use_nbits),
    "com.microsoft.NhwcConv": ((1,), refuse_use),
    "com.microsoft.QAttention": ((1,), _use_packed),
    "com.microsoft.QGemm": ((3,), _use_quantised_gemm),
    "com.microsoft.nchwc.Conv": ((1,), refuse_use),
}
"""Operator to the inputs that may hold a weight, and how they use it. MatMul may have it on either side."""

UNREAD: Final = frozenset({"Einsum", "GRU", "LSTM", "RNN"})
"""Operators that are sites only to say so: they are no layers of their own in the flow of values."""

VECTORS: Final[Mapping[str, tuple[tuple[tuple[int, ...], str, UseReader], ...]]] = {
    "Add": (((1, 0), "bias", _use_as_it_is),),
    "Gemm": (((2,), "bias", _use_addend),),
    "Conv": (((2,), "bias", _use_as_it_is),),
    "LayerNormalization": (((1,), "weight", _use_as_it_is), ((2,), "bias", _use_as_it_is)),
    "Mul": (((1, 0), "weight", _use_as_it_is),),
}
"""Operator to the inputs that may hold one of a module's vectors: what a Linear adds, what a norm multiplies by."""


def read_attribute(node: "onnx.NodeProto", name: str, default: Any) -> Any:
    """Return the number that an attribute holds."""
    for attribute in node.attribute:
        if attribute.name == name:
            return attribute.f if isinstance(default, float) else attribute.i
    return default


def read_expert_bits(node: "onnx.NodeProto", position: int) -> int:
    """Return the bits of the codes that a QMoE has as its input at `position`: fc1, fc2 or fc3."""
    number = {2: 1, 5: 2, 8: 3}[position]
    return int(read_attribute(node, f"fc{number}_expert_weight_bits", read_attribute(node, "expert_weight_bits", 4)))
