"""What shape inference says of a value: how many axes it has, and whether the first is the batch."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


class Rows(Enum):
    """What the first axis of a value is: the batch, something else, or nobody knows."""

    BATCH = "the batch"
    OTHER = "something else"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Axes:
    """The axes of a value.

    Attributes:
        first: what the first is.
        count: how many there are; 0 where nobody knows.
    """

    first: Rows = Rows.UNKNOWN
    count: int = 0


def find_axes(model: "onnx.ModelProto") -> Mapping[str, Axes]:
    """Return the axes of each value whose shape is known.

    The batch is the first axis of the model's inputs: that of the same symbol, or, where it has none, of the same size.

    Args:
        model: the model; weights may be left out of it.
    """
    from onnx import shape_inference

    inferred = shape_inference.infer_shapes(model, data_prop=True)
    sizes: dict[str, list[str | int]] = {}
    pending = [inferred.graph]
    while pending:
        graph = pending.pop()
        for value in (*graph.value_info, *graph.output, *graph.input):
            if value.type.tensor_type.HasField("shape"):
                sizes[value.name] = [_size_of(dim) for dim in value.type.tensor_type.shape.dim]
        attributes = (attribute for node in graph.node for attribute in node.attribute)
        pending += [inner for each in attributes for inner in ([each.g] if each.HasField("g") else each.graphs)]
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [sizes.get(value.name, []) for value in model.graph.input if value.name not in held]
    batch = {axes[0] for axes in inputs if len(axes) > 1}
    others = {size for axes in inputs for size in axes[1:] if isinstance(size, str)} - batch
    return {name: Axes(_judge(axes, batch, others), len(axes)) for name, axes in sizes.items()}


def _size_of(dim: "onnx.TensorShapeProto.Dimension") -> str | int:
    return str(dim.dim_param) if not dim.HasField("dim_value") else int(dim.dim_value)


def _judge(axes: Sequence[str | int], batch: Set[str | int], others: Set[str | int]) -> Rows:
    if not axes or axes[0] == "":
        return Rows.UNKNOWN
    if axes[0] in batch:
        return Rows.BATCH
    return Rows.OTHER if axes[0] in others or isinstance(axes[0], int) else Rows.UNKNOWN
