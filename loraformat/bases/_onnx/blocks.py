"""Blocks behind attention: layers around an activation, added to what they were computed from."""

from collections.abc import Mapping
from typing import Final, TypeAlias

from loraformat.bases._onnx.flow import QUANTISING, Flow, Slice, find_rows, reads_vector
from loraformat.bases._onnx.scopes import Visit

PASSING: Final = (
    frozenset({"Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Dropout", "Flatten"}) | QUANTISING
)
_ACTIVATIONS: Final = frozenset(
    {"Sigmoid", "Tanh", "Erf", "Relu", "Gelu", "Swish", "Elu", "Softplus", "HardSwish", "Mish"}
    | {f"com.microsoft.{name}" for name in ("Gelu", "BiasGelu", "FastGelu", "QuickGelu", "BiasSplitGelu")}
)
_IN_ACTIVATIONS: Final = (
    _ACTIVATIONS
    | frozenset(
        {"Add", "Sub", "Mul", "Div", "Pow", "Cast", "Identity", "Reshape", "Max", "Min", "Clip", "Dropout", "Split"}
        | {"SplitToSequence", "SequenceAt"}
    )
    | frozenset({"Slice", "Transpose", "Unsqueeze", "Squeeze", "Flatten"})
    | QUANTISING
)
NORMS: Final = frozenset({"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"}) | frozenset(
    f"com.microsoft.{name}"
    for name in (
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "EmbedLayerNormalization",
        "QEmbedLayerNormalization",
    )
)
_SKIPS: Final = frozenset({"com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization"})
_BIASED: Final = frozenset({"Cast", "Identity", "Reshape", "Dropout"}) | QUANTISING
_SUM: Final = 3
"""Which output of theirs is the sum that they take the norm of."""
Cuts: TypeAlias = dict[Visit, Mapping[str, tuple[int, int]]]
"""Of layers that put out queries, keys and values in one, or gates and what they gate, the rows of each."""
Block: TypeAlias = Mapping[str, Visit]
"""Roles of the layers of one block."""


def list_blocks(flow: Flow, cuts: Cuts) -> list[Block]:
    """Return blocks of two or three layers around an activation, each added to what it was computed from."""
    found = [(layer, _read_block(flow, layer, cuts)) for layer in flow.sites]
    return [block for layer, block in found if block and _is_residual(flow, block, layer)]


def _read_block(flow: Flow, down: Visit, cuts: Cuts) -> dict[str, Visit]:
    """Return the layers of a block by its last one; nothing where there is no such block.

    Where one layer makes both the gates and what they gate, the rows of each are noted in `cuts`.
    """
    whole = flow.read_back(down)
    if not whole.ops & _ACTIVATIONS or not whole.ops <= _IN_ACTIVATIONS or len(whole.layers) > 2:
        return {}
    halves = _split_gate(flow, down)
    if halves is None:
        return {"first": whole.layer, "second": down} if whole.layer is not None else {}
    gate, up = (each.layer for each in halves)
    assert gate is not None, "split so"
    assert up is not None, "split so"
    if gate is not up:
        return {"gate": gate, "up": up, "down": down}
    found = {name: find_rows(flow, gate, each) for name, each in zip(("gate", "up"), halves, strict=True)}
    rows = {name: each for name, each in found.items() if each is not None}
    cuts[gate] = rows if len(set(rows.values())) == len(found) else {}
    return {"gate_up": gate, "down": down}


def _split_gate(flow: Flow, down: Visit) -> tuple[Slice, Slice] | None:
    """Return the two factors that the last layer of a gated block reads: with the activation, without."""
    scope, name = flow.read(down)
    made_by = scope.producers.get(name)
    while isinstance(made_by, Visit) and made_by.op in _BIASED:
        scope, name = made_by.scope.find(made_by.node.input[0])
        made_by = scope.producers.get(name)
    if not isinstance(made_by, Visit) or made_by.op != "Mul":
        return None
    one, other = (flow.trace_back(made_by.scope, factor) for factor in made_by.node.input)
    if _is_active(one) == _is_active(other):
        return None
    gate, up = (one, other) if _is_active(one) else (other, one)
    if gate.layer is None or up.layer is None or (gate.layer is up.layer and not _is_cut(up)):
        return None
    return gate, up


def _is_active(factor: Slice) -> bool:
    return bool(factor.ops & _ACTIVATIONS)


def _is_cut(factor: Slice) -> bool:
    """Say whether a factor is a part of what a layer puts out: x · sigmoid(x) is of the whole, and an activation."""
    return bool(factor.ops & {"Split", "Slice", "SequenceAt"})


def _is_residual(flow: Flow, block: Block, down: Visit) -> bool:
    """Say whether what a block puts out is added to a value that its input was made of."""
    first = next(iter(block.values()))
    scope, name = flow.read(first)
    made_of = flow.trace_back(scope, name)
    sums = ((id(each.scope), each.node.output[_SUM]) for each in made_of.visits if each.op in _SKIPS and _sums(each))
    before = made_of.values | {(id(scope), name), *sums}
    current: Visit | None = down
    while current is not None:
        readers = list(flow.list_readers(current, _BIASED))
        if len(readers) != 1:
            return False
        reader, position = readers[0]
        if reader.op != "Add" and reader.op not in _SKIPS:
            return False
        other_scope, other = reader.scope.find(reader.node.input[1 - position]) if position < 2 else (scope, "")
        if (id(other_scope), other) in before:
            return True
        current = reader if reader.op == "Add" and reads_vector(reader) else None
    return False


def _sums(skip: Visit) -> bool:
    """Say whether a norm of a sum puts out the sum too."""
    return len(skip.node.output) > _SUM and bool(skip.node.output[_SUM])
