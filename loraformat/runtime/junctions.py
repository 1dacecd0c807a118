"""What is done to a graph's own nodes where something is added to a product: mostly, one value gets another name.

An Attention holds its product inside. It is taken apart into nodes that do the same: the product, a Split of it into
q, k and v, and MultiHeadAttention, which adds the bias and attends. So is a FusedGemm or FusedConv: into the product
and the activation.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraformat.bases._onnx.extension import Addition
from loraformat.bases._onnx.openings import Opening
from loraformat.runtime.chains import Chain

if TYPE_CHECKING:
    import onnx

_WEIGHT, _BIAS, _MASK, _ATTENTION_BIAS = 1, 2, 3, 5
_FUSED: Final = "Fused"
_INT64: Final = 7
_KEPT: Final = frozenset({"num_heads", "mask_filter_value", "scale", "unidirectional"})


@dataclass(frozen=True, slots=True)
class Junction:
    """A place under construction.

    Attributes:
        opening: where.
        before: the value to which something is added.
        summed: the value that the sum is to be.
    """

    opening: Opening
    before: str
    summed: str


def open_junction(opening: Opening, chain: Chain) -> Junction:
    """Begin the nodes at an opening."""
    node = opening.visit.node
    if not opening.is_inside:
        return Junction(opening, chain.take(f"{opening.value}.base"), opening.value)
    if opening.sizes:
        before = chain.add("MatMul", [opening.x, node.input[_WEIGHT]], "")
    else:
        before = chain.add(node.op_type.removeprefix(_FUSED), node.input, "")
        kept = (attribute for attribute in node.attribute if not attribute.name.startswith("activation"))
        chain.nodes[-1].attribute.extend(kept)
    return Junction(opening, before, chain.take(f"{chain.path}/summed"))


def close_junction(junction: Junction, chain: Chain) -> Addition:
    """End the nodes at an opening, with the sum among them."""
    opening = junction.opening
    if opening.activation:
        chain.add(opening.activation, [junction.summed], "", output=opening.value)
    elif opening.sizes:
        _attend(opening.visit.node, opening.sizes, junction.summed, chain)
    return Addition(opening, junction.before, chain.nodes)


def _attend(node: "onnx.NodeProto", sizes: tuple[int, ...], summed: str, chain: Chain) -> None:
    """Add what an Attention does after its product."""
    from onnx import helper

    constant = helper.make_tensor("", _INT64, [len(sizes)], sizes)
    parts = [chain.take(f"{chain.path}/{name}") for name in ("query", "key", "value")]
    chain.add("Split", [summed, chain.add("Constant", [], "sizes", value=constant)], "", output=parts[0], axis=2)
    chain.nodes[-1].output.extend(parts[1:])
    read = [node.input[at] if at < len(node.input) else "" for at in (_BIAS, _MASK, _ATTENTION_BIAS)]
    inputs = [*parts, *read]
    while not inputs[-1]:
        inputs.pop()
    chain.add("MultiHeadAttention", inputs, "", domain=node.domain, output=node.output[0])
    chain.nodes[-1].attribute.extend(attribute for attribute in node.attribute if attribute.name in _KEPT)
