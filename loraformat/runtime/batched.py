"""Branches for batches whose rows have adapters of their own: A and B are stacked, and a number for each row chooses.

    adapter_index    (batch,) int64: the slot of each row
    A                (slots, in, rank)
    B                (slots, rank, out)

The stacks are inputs as they are, rather than one input for each slot: onnxruntime would have to copy all slots
together in every run. The last slot holds no adapter; it is the default for all rows.

What comes in is taken apart by rows of the batch, whatever its dimensions: `(batch, in)`, or `(batch · length, in)` as
some exporters leave it. Where shapes tell that it is `(batch, length, in)`, nothing need be.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraformat.bases._onnx.extension import Addition
from loraformat.bases._onnx.openings import Opening, Product
from loraformat.bases._onnx.rows import Rows
from loraformat.runtime.branches import Branch
from loraformat.runtime.chains import Chain, Names
from loraformat.runtime.junctions import close_junction, open_junction

if TYPE_CHECKING:
    import onnx

ADAPTER_INDEX: Final = "adapter_index"
_INT64: Final = 7
_ONE: Final = 1


@dataclass(frozen=True, slots=True)
class Sizes:
    """Values of the graph that say how to take something apart by rows.

    Attributes:
        nodes: what makes them, of the main graph.
        constants: the numbers that they are made of.
        by_width: for each width the value `[batch, -1, width]`.
        sequences: values that are `(batch, length, width)`.
    """

    nodes: "Sequence[onnx.NodeProto]"
    constants: "Sequence[onnx.TensorProto]"
    by_width: Mapping[int, str]
    sequences: frozenset[str]


def find_obstacle(opening: Opening, rows: Rows) -> str:
    """Return why rows cannot have adapters of their own at a node; empty where they can, or nothing tells."""
    if opening.product not in _PRODUCTS or ("transA" in opening.copied and opening.copied["transA"].i):
        return "an operator that does not take the rows of x one by one"
    return "an x whose first axis is not the batch" if rows is Rows.OTHER else ""


def build_sizes(branches: Sequence[Branch], names: Names, sequences: frozenset[str]) -> Sizes:
    """Return what branches need to know of the batch; computed once in a run.

    Args:
        branches: the branches.
        names: gives names to values and nodes.
        sequences: values that are `(batch, length, width)`.
    """
    chain, constants = Chain(f"/{ADAPTER_INDEX}", names), []
    by_width: dict[int, str] = {}
    parted = [
        branch.layout
        for branch in branches
        if not all(opening.product is Product.RIGHT and opening.x in sequences for opening in branch.openings)
    ]
    count = chain.add("Shape", [ADAPTER_INDEX], "count") if parted else ""
    for width in sorted({width for layout in parted for width in (layout.width, layout.out, _ONE)}):
        rest = _make_constant(names.take(f"/{ADAPTER_INDEX}/rest_{width}"), [-1, width])
        constants.append(rest)
        by_width[width] = chain.add("Concat", [count, rest.name], f"by_{width}", axis=0)
    return Sizes(chain.nodes, constants, by_width, sequences)


def build_batched(branch: Branch, names: Names, sizes: Sizes) -> list[Addition]:
    """Return the nodes of a branch at each of its openings.

    Args:
        branch: the branch.
        names: gives names to values and nodes.
        sizes: from `build_sizes`.
    """
    return [_build_at(branch, opening, names, sizes) for opening in branch.openings]


def describe_index(slots: int) -> "tuple[onnx.ValueInfoProto, onnx.TensorProto]":
    """Return the input that chooses, and its default: the slot without an adapter for any number of rows."""
    from onnx import helper

    return helper.make_tensor_value_info(ADAPTER_INDEX, _INT64, [f"{ADAPTER_INDEX}.rows"]), _make_constant(
        ADAPTER_INDEX, [slots - 1]
    )


def _make_constant(name: str, numbers: Sequence[int]) -> "onnx.TensorProto":
    from onnx import helper

    return helper.make_tensor(name, _INT64, [len(numbers)], list(numbers))


def _build_at(branch: Branch, opening: Opening, names: Names, sizes: Sizes) -> Addition:
    chain = Chain(branch.path, names)
    junction = open_junction(opening, chain)
    inner = _PRODUCTS[opening.product](branch, opening, chain, sizes)
    up = chain.add("Gather", [branch.layout.up, ADAPTER_INDEX], "lora_B")
    product = chain.add("MatMul", [inner, up], "lora_B")
    if opening.product is Product.RIGHT and opening.x in sizes.sequences:
        chain.add("Add", [junction.before, product], "lora", output=junction.summed)
        return close_junction(junction, chain)
    shape = chain.add("Shape", [junction.before], "lora")
    rows = chain.add("Reshape", [junction.before, sizes.by_width[branch.layout.out]], "lora")
    added = chain.add("Add", [rows, product], "lora")
    chain.add("Reshape", [added, shape], "lora_out", output=junction.summed)
    return close_junction(junction, chain)


def _multiply(branch: Branch, opening: Opening, chain: Chain, sizes: Sizes) -> str:
    """Add x·A, `(batch, length, rank)`."""
    rows = opening.x
    if rows not in sizes.sequences:
        rows = chain.add("Reshape", [rows, sizes.by_width[branch.layout.width]], "lora_A")
    return chain.add("MatMul", [rows, chain.add("Gather", [branch.layout.down, ADAPTER_INDEX], "lora_A")], "lora_A")


def _look_up(branch: Branch, opening: Opening, chain: Chain, sizes: Sizes) -> str:
    """Add the rows of A, `(batch, length, rank)`, each from the slot of its row of the batch."""
    ids = chain.add("Cast", [opening.x], "lora_A", to=_INT64)
    ids = chain.add("Reshape", [ids, sizes.by_width[_ONE]], "lora_A")
    index = chain.add("Reshape", [ADAPTER_INDEX, sizes.by_width[_ONE]], "lora_A")
    slots = chain.add("Add", [chain.add("Sub", [ids, ids], "lora_A"), index], "lora_A")
    return chain.add("GatherND", [branch.layout.down, chain.add("Concat", [slots, ids], "lora_A", axis=2)], "lora_A")


_PRODUCTS: Final[Mapping[Product, Callable[[Branch, Opening, Chain, Sizes], str]]] = {
    Product.RIGHT: _multiply,
    Product.TABLE: _look_up,
}
