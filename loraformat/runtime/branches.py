"""The nodes of a run-time branch: y = W·x becomes y = W·x + (x·A)·B, with A and B inputs of the model.

Without an adapter A has the rank 0, and B a width of 1: x·A has no numbers, (x·A)·B is one zero for each row, and
adding it is a pass over the product in place. Of what was measured (docs/runtime-inputs.md) this costs least: an `If`
around the branch costs more than the three nodes that it saves, and a B of full width a second pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraformat.bases._onnx.extension import Addition
from loraformat.bases._onnx.openings import Opening, Product
from loraformat.runtime.chains import Chain, Names
from loraformat.runtime.junctions import close_junction, open_junction
from loraformat.runtime.layouts import Layout
from loraformat.runtime.targets import Served

if TYPE_CHECKING:
    import onnx

_FORMS: Final = {
    Product.RIGHT: "linear",
    Product.LEFT: "linear",
    Product.TABLE: "embedding",
    Product.KERNEL: "conv",
}


@dataclass(frozen=True, slots=True)
class Branch:
    """Two inputs of a model, and the nodes beside which their product is added.

    Attributes:
        layout: the inputs.
        openings: the nodes, of one kind.
        changes: the changes of all adapters that are added there.
    """

    layout: Layout
    openings: tuple[Opening, ...]
    changes: tuple[Served, ...]

    @property
    def path(self) -> str:
        """What the names of its nodes begin with, as torch's exporter would have it."""
        return "/" + self.layout.name.replace(".", "/")


def name_form(product: Product) -> str:
    """Return the form that the inputs have beside a node."""
    return _FORMS[product]


def build_branch(branch: Branch, names: Names) -> list[Addition]:
    """Return the nodes of a branch at each of its openings.

    Args:
        branch: the branch.
        names: gives names to values and nodes.
    """
    return [_build_at(branch, opening, names) for opening in branch.openings]


def _build_at(branch: Branch, opening: Opening, names: Names) -> Addition:
    chain = Chain(branch.path, names)
    junction = open_junction(opening, chain)
    product = _PRODUCTS[opening.product](branch, opening, chain)
    chain.add("Add", [junction.before, product], "lora", output=junction.summed)
    return close_junction(junction, chain)


def _multiply_right(branch: Branch, opening: Opening, chain: Chain) -> str:
    """Add (x·A)·B, with x turned where the node beside turns it."""
    node = opening.visit.node
    turned = opening.copied["transA"].i if "transA" in opening.copied else 0
    if turned:
        op, domain = ("Gemm", "") if opening.activation else (node.op_type, node.domain)
        inner = chain.add(op, [opening.x, branch.layout.down], "lora_A", domain=domain, transA=1)
    else:
        inner = chain.add("MatMul", [opening.x, branch.layout.down], "lora_A")
    return chain.add("MatMul", [inner, branch.layout.up], "lora_B")


def _multiply_left(branch: Branch, opening: Opening, chain: Chain) -> str:
    """Add Bᵀ·(Aᵀ·x)."""
    turned = chain.add("Transpose", [branch.layout.down], "lora_A")
    inner = chain.add("MatMul", [turned, opening.x], "lora_A")
    return chain.add("MatMul", [chain.add("Transpose", [branch.layout.up], "lora_B"), inner], "lora_B")


def _look_up(branch: Branch, opening: Opening, chain: Chain) -> str:
    """Add the rows of A, times B."""
    inner = chain.add("Gather", [branch.layout.down, opening.x], "lora_A")
    return chain.add("MatMul", [inner, branch.layout.up], "lora_B")


def _convolve(branch: Branch, opening: Opening, chain: Chain) -> str:
    """Add the convolution of x with A, as the node beside does it, and one with B, whose kernel is a point."""
    inner = chain.add("Conv", [opening.x, branch.layout.down], "lora_A")
    chain.nodes[-1].attribute.extend(opening.copied.values())
    return chain.add("Conv", [inner, branch.layout.up], "lora_B")


_PRODUCTS: Final[Mapping[Product, Callable[[Branch, Opening, Chain], str]]] = {
    Product.RIGHT: _multiply_right,
    Product.LEFT: _multiply_left,
    Product.TABLE: _look_up,
    Product.KERNEL: _convolve,
}


def describe_inputs(layout: Layout, slots: int) -> "list[tuple[onnx.ValueInfoProto, onnx.TensorProto]]":
    """Return the inputs of a branch and their defaults, of no numbers.

    Each branch has a symbol of its own for its rank: inputs of one symbol would have to be of one size, and onnxruntime
    reuses buffers by it.

    Args:
        layout: the inputs.
        slots: how many adapters are stacked; 0 for one that is not stacked.
    """
    from onnx import helper

    rank, out, one = f"{layout.name}.rank", f"{layout.name}.out", (1,) * len(layout.kernel)
    if layout.form == "conv":
        shapes: list[tuple[int | str, ...]] = [(rank, layout.width, *layout.kernel), (out, rank, *one)]
        empty: list[tuple[int, ...]] = [(0, layout.width, *layout.kernel), (1, 0, *one)]
    else:
        shapes, empty = [(layout.width, rank), (rank, out)], [(layout.width, 0), (0, 1)]
    stack = (slots,) if slots else ()
    kind = layout.dtype.onnx or 0
    return [
        (
            helper.make_tensor_value_info(name, kind, [*stack, *shape]),
            helper.make_tensor(name, kind, [*stack, *size], b"", raw=True),
        )
        for name, shape, size in zip((layout.down, layout.up), shapes, empty, strict=True)
    ]
