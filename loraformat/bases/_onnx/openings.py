"""Where something can be added to what a node of an ONNX graph makes of its weight, while the model runs.

The product x·W is wanted in floating point, with x beside it. Where the graph computes in whole numbers, both are
looked for further up and down: before x is quantised as it comes, and after the product has its scale. A bias comes
first, so that runtimes still see the pattern that they fuse. What rounds a product to a range comes after: quantisers
leave activations out that such a range stands for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.traces import trace_constant
from loraformat.bases._onnx.uses import read_attribute
from loraformat.dtypes import BY_ONNX, Dtype
from loraformat.problems import Problem

if TYPE_CHECKING:
    import onnx

_FLOAT: Final = 1
_FLOATS: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
_STEPS: Final = 6
_CONV_ATTRIBUTES: Final = frozenset({"auto_pad", "dilations", "kernel_shape", "pads", "strides"})
_ATTENTION: Final = "com.microsoft.Attention"
_AS_IT_WAS: Final = "Give the model as it was before it was optimised, and let onnxruntime optimise that."
_QUANTISER: Final = "DynamicQuantizeLinear"


class Product(StrEnum):
    """How a node applies its weight, which tells how two thin factors are applied beside it.

    `right`: Y = X·W, x `(..., in)`. `left`: Y = W·X, x `(..., in, n)`. `table`: rows of W, x the numbers of rows.
    `kernel`: a convolution.
    """

    RIGHT = "right"
    LEFT = "left"
    TABLE = "table"
    KERNEL = "kernel"


@dataclass(frozen=True, slots=True)
class Opening:
    """Where the product of x and two factors can be added to the product of x and a weight.

    Attributes:
        product: how the weight is applied.
        dtype: number form in which the sum is computed.
        x: the value that the weight is applied to, floating-point but for a table.
        maker: the node whose first output the sum takes the place of.
        visit: the node that applies the weight.
        copied: the attributes with which x is applied to the first factor too.
        sizes: where the node holds its product inside and goes on to an attention, the columns of q, k and v.
        activation: where it goes on to an activation, the operator that this is.
    """

    product: Product
    dtype: Dtype
    x: str
    maker: Visit
    visit: Visit
    copied: "Mapping[str, onnx.AttributeProto]" = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    activation: str = ""

    @property
    def is_inside(self) -> bool:
        """Whether the node holds its product inside, and is taken apart."""
        return bool(self.sizes or self.activation)

    @property
    def value(self) -> str:
        """The value that the sum takes the place of."""
        return str(self.maker.node.output[0])

    @property
    def place(self) -> tuple[str, int]:
        """Where the maker stands: the label of its graph, and its position there."""
        return self.maker.scope.label, self.maker.index


_PRODUCTS: Final[Mapping[str, tuple[Product | None, ...]]] = {
    "MatMul": (Product.LEFT, Product.RIGHT),
    "Gemm": (None, Product.RIGHT),
    "Conv": (None, Product.KERNEL),
    "Gather": (Product.TABLE,),
    "MatMulInteger": (None, Product.RIGHT),
    _ATTENTION: (None, Product.RIGHT),
    "com.microsoft.DynamicQuantizeMatMul": (None, Product.RIGHT),
    "com.microsoft.FusedConv": (None, Product.KERNEL),
    "com.microsoft.FusedGemm": (None, Product.RIGHT),
    "com.microsoft.FusedMatMul": (None, Product.RIGHT),
    "com.microsoft.MatMulBnb4": (None, Product.RIGHT),
    "com.microsoft.MatMulIntegerToFloat": (None, Product.RIGHT),
    "com.microsoft.MatMulNBits": (None, Product.RIGHT),
}
"""Operator to the product for each input that may hold the weight; with the weight as the first, x is the second."""

_REASONS: Final[Mapping[str, str]] = {
    "com.microsoft.EmbedLayerNormalization": "the operator goes on to the norm, and puts out no rows of the table",
    "com.microsoft.MoE": "the operator chooses among experts itself, and puts out no product of one",
    "com.microsoft.QAttention": "the operator goes on to the attention, and puts out no product",
    "com.microsoft.QGemm": "the operator computes in whole numbers only",
    "com.microsoft.QMoE": "the operator chooses among experts itself, and puts out no product of one",
    "ConvInteger": "the operator computes in whole numbers only",
    "QLinearConv": "the operator computes in whole numbers only",
    "QLinearMatMul": "the operator computes in whole numbers only",
}
_MENDS: Final[Mapping[str, str]] = {
    "com.microsoft.EmbedLayerNormalization": _AS_IT_WAS,
}
_ACTIVATING: Final = frozenset({"com.microsoft.FusedConv", "com.microsoft.FusedGemm"})
_ACTIVATIONS: Final = frozenset({"Relu", "Sigmoid", "Tanh"})
"""Those without settings."""
_ATTENDING: Final = frozenset({"num_heads", "mask_filter_value", "scale", "unidirectional", "qkv_hidden_sizes"})
_ATTENDED: Final = frozenset({0, 1, 2, 3, 5})
"""Attributes and inputs of an Attention that MultiHeadAttention has too: no past, no rotation."""
_FEWEST: Final = 2
"""Inputs of any product."""
_EXPECTED: Final = "a MatMul, Gemm, Conv, Gather or MatMulNBits, or one of their kin"


def find_opening(raw: RawSite) -> Opening | Problem:
    """Return where something can be added to what a site's node makes, or why nothing can (LF820)."""
    visit = raw.visit
    products = _PRODUCTS.get(visit.op, ())
    product = products[raw.position] if raw.position < len(products) else None
    if product is None:
        found = _REASONS.get(visit.op, f"the operator {visit.op} has its weight as input {raw.position}")
        return _refuse(visit, found, _MENDS.get(visit.op, ""))
    if visit.call is not None:
        return _refuse(visit, "a node of a function, which its callers share", "Inline the functions (onnx.inliner).")
    if len(visit.node.input) < _FEWEST or not visit.node.output:
        return _refuse(visit, "an operator that lacks an input or its output")
    dtype = find_form(raw)
    if dtype is None or dtype.name not in _FLOATS:
        return _refuse(visit, f"numbers computed as {'nobody knows what' if dtype is None else dtype.name}")
    if visit.op == _ATTENTION:
        return _find_inside(raw, dtype)
    if visit.op in _ACTIVATING:
        return _find_activated(raw, product, dtype)
    x, maker = _find_x(raw), _find_maker(visit)
    if x is None or maker is None:
        return _refuse(visit, "codes of whole numbers without their floats beside them")
    return Opening(product, dtype, x, maker, visit, _copy_attributes(raw))


def _find_inside(raw: RawSite, dtype: Dtype) -> Opening | Problem:
    """Return an Attention as it can be taken apart, or why it cannot."""
    visit, node = raw.visit, raw.visit.node
    read = {at for at, name in enumerate(node.input) if name}
    strange = sorted(each.name for each in node.attribute if each.name not in _ATTENDING and each.i)
    if strange or not read <= _ATTENDED or any(node.output[1:]):
        found = f"an attention with {', '.join(strange) or 'a past'}"
        return _refuse(visit, found, _AS_IT_WAS)
    dims = raw.trace.sizes
    columns = dims[0 if raw.trace.flipped else 1] if len(dims) == 2 else 0
    given = next((list(each.ints) for each in node.attribute if each.name == "qkv_hidden_sizes"), [columns // 3] * 3)
    if len(given) != 3 or sum(given) != columns or min(given) <= 0:
        return _refuse(visit, f"columns {given} for q, k and v, of {columns}")
    return Opening(Product.RIGHT, dtype, node.input[0], visit, visit, {}, tuple(given))


def _find_activated(raw: RawSite, product: Product, dtype: Dtype) -> Opening | Problem:
    """Return a product with an activation as it can be taken apart, or why it cannot."""
    visit, node = raw.visit, raw.visit.node
    activation = next((each.s.decode("utf-8", "replace") for each in node.attribute if each.name == "activation"), "")
    if activation not in _ACTIVATIONS or any(node.input[3:]):
        found = f"an operator that goes on to {activation or 'nothing that it names'}, or adds something more"
        return _refuse(visit, found, _AS_IT_WAS)
    return Opening(product, dtype, node.input[0], visit, visit, _copy_attributes(raw), activation=activation)


def _refuse(visit: Visit, found: str, mend: str = "") -> Problem:
    return Problem("LF820", f"{visit.op} {visit.node.name!r}", found, _EXPECTED, mend)


def find_form(raw: RawSite) -> Dtype | None:
    """Return the number form of the node's product, once it is a float, as the weight's way to it tells."""
    op = raw.visit.op
    if op in {"MatMulInteger", "com.microsoft.DynamicQuantizeMatMul"}:
        return BY_ONNX[_FLOAT]
    scales = {
        "com.microsoft.MatMulNBits": 2,
        "com.microsoft.MatMulBnb4": 2,
        "com.microsoft.MatMulIntegerToFloat": 3,
    }.get(op)
    if scales is not None:
        return _find_constant_form(raw.visit, scales)
    for step in raw.trace.steps:
        if step.op == "Cast":
            return BY_ONNX.get(int(read_attribute(step.node, "to", 0)))
        if step.op == "DequantizeLinear":
            return _find_constant_form(step, 1)
    return BY_ONNX.get(raw.trace.tensor.data_type) if raw.trace.tensor is not None else None


def _find_constant_form(visit: Visit, position: int) -> Dtype | None:
    name = visit.read_input(position)
    trace = trace_constant(visit.scope, name) if name else None
    return BY_ONNX.get(trace.tensor.data_type) if trace is not None and trace.tensor is not None else None


def _find_x(raw: RawSite) -> str | None:
    """Return the value that the weight is applied to, as it was before it was quantised; None where that is not there.

    A value of a graph around the node's own is as good.
    """
    visit = raw.visit
    x = visit.read_input(1 if raw.position == 0 else 0)
    if visit.op not in {"MatMulInteger", "com.microsoft.MatMulIntegerToFloat"}:
        return x or None
    made_by = visit.scope.producer(x)
    if not isinstance(made_by, Visit) or made_by.op != _QUANTISER or made_by.scope is not visit.scope:
        return None
    return made_by.read_input(0) or None


def _find_maker(visit: Visit) -> Visit | None:
    """Return what makes the value to add to: the node itself, or what follows it and belongs to the product."""
    made = _find_scaled(visit) if visit.op == "MatMulInteger" else visit
    return (_find_bias(made) or made) if made is not None else None


def _find_scaled(visit: Visit) -> Visit | None:
    """Return the Mul after which a product of codes is a float: that by the scales of x and of the weight."""
    missing, last = {_QUANTISER, ""}, visit
    for follower in _follow(visit):
        if follower.op == "Mul":
            missing -= _find_factors(follower, last.node.output[0])
            if not missing:
                return follower
        elif follower.op != "Cast":
            return None
        last = follower
    return None


def _find_factors(visit: Visit, product: str) -> set[str]:
    """Return which scales a product is multiplied by: that of x is of its quantiser, that of the weight a constant."""
    pending, found = [name for name in visit.node.input if name != product], set[str]()
    seen = {product, ""}
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        made_by = visit.scope.producer(name)
        if isinstance(made_by, Visit) and made_by.op == "Mul" and made_by.scope is visit.scope:
            pending += made_by.node.input
        elif isinstance(made_by, Visit) and made_by.op == _QUANTISER:
            found.add(_QUANTISER)
        elif trace_constant(visit.scope, name) is not None:
            found.add("")
    return found


def _follow(visit: Visit) -> Iterator[Visit]:
    """Yield the nodes after one, as long as each is the only one to read what the last has made."""
    current: Visit | None = visit
    for _ in range(_STEPS):
        current = _only_reader(current) if current is not None else None
        if current is None:
            return
        yield current


def _only_reader(visit: Visit) -> Visit | None:
    name = next(iter(visit.node.output), "")
    readers = visit.scope.readers.get(name, ())
    if len(readers) != 1 or name in visit.scope.outputs or readers[0][0].scope is not visit.scope:
        return None
    return readers[0][0] if any(readers[0][0].node.output[:1]) else None


def _find_bias(visit: Visit) -> Visit | None:
    """Return the addition of a bias that alone reads a product."""
    reader = _only_reader(visit)
    if reader is None or reader.op != "Add":
        return None
    other = next((name for name in reader.node.input if name != visit.node.output[0]), "")
    trace = trace_constant(visit.scope, other) if other else None
    return reader if trace is not None and trace.tensor is not None and len(trace.tensor.dims) == 1 else None


def _copy_attributes(raw: RawSite) -> "Mapping[str, onnx.AttributeProto]":
    """Return what a convolution does besides its kernel, or that x is turned first."""
    wanted = _CONV_ATTRIBUTES if raw.visit.op.endswith("Conv") else frozenset({"transA"})
    return {attribute.name: attribute for attribute in raw.visit.node.attribute if attribute.name in wanted}
