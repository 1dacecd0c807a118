"""Attentions and blocks in order: one stack of layers, or a decoder that attends to an encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from loraformat.bases._onnx.attention import UnlikeError
from loraformat.bases._onnx.blocks import Block
from loraformat.bases._onnx.flow import Flow, Value, sizes
from loraformat.bases._onnx.scopes import Visit

ENCODER: Final = "encoder"
DECODER: Final = "decoder"


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """The layers around one place where a graph attends.

    Attributes:
        where: words for it.
        layers: nodes by roles; no `key` and `value` where a run is given them.
        crosses: whether keys and values are made of something else than queries.
        source: what keys are made of; None where a run is given them.
        head_size: the size of a head.
        is_unscaled: whether scores are not divided by the root of that.
        adds_table: whether numbers from a table with a column for each head are added to the scores.
    """

    where: str
    layers: Mapping[str, Visit]
    crosses: bool
    source: Value | None
    head_size: int
    is_unscaled: bool
    adds_table: bool

    @property
    def chain(self) -> set[Visit]:
        """The layers that hang on all that is before the attention in its stack."""
        return {self.layers["query"], self.layers["output"]} if self.crosses else set(self.layers.values())


Stacks: TypeAlias = Mapping[str, Sequence[Sequence[Attention]]]
"""By name, the layers of each stack, and the attentions of each layer."""


def order_stacks(flow: Flow, attentions: Sequence[Attention]) -> Stacks:
    """Return the attentions as layers of one stack without a name, or of a decoder, and of an encoder before it.

    In the layers of a decoder an attention to itself is followed by one to the encoder.
    """
    crossing = [each for each in attentions if each.crosses]
    if not crossing:
        return {"": [[each] for each in _order(flow, attentions)]}
    if len({each.source for each in crossing}) != 1:
        raise UnlikeError("a decoder that attends to different things")
    keys = _list_keys(crossing)
    before = [each for each in attentions if not each.crosses and keys & flow.list_after(each.layers["output"])]
    after = _order(flow, [each for each in attentions if each not in before])
    if [each.crosses for each in after] != [False, True] * len(crossing):
        raise UnlikeError("a decoder whose layers do not attend to themselves and then to an encoder")
    layers = [after[number : number + 2] for number in range(0, len(after), 2)]
    encoder = {ENCODER: [[each] for each in _order(flow, before)]} if before else {}
    return {**encoder, DECODER: layers}


def _list_keys(attentions: Sequence[Attention]) -> set[Visit]:
    """Return the layers that make keys and values."""
    return {visit for each in attentions for name, visit in each.layers.items() if name in ("key", "value")}


def _order(flow: Flow, attentions: Sequence[Attention]) -> list[Attention]:
    """Return the attentions of a stack from first to last; each must hang on all before it."""
    after = [flow.list_after(each.layers["output"]) for each in attentions]
    counted = [sum(each.chain <= others for others in after) for each in attentions]
    if sorted(counted) != list(range(len(attentions))):
        raise UnlikeError("the attentions do not follow one another")
    return [attention for _, attention in sorted(zip(counted, attentions, strict=True), key=lambda pair: pair[0])]


def pick_block(flow: Flow, blocks: Sequence[Block], stacks: Stacks, name: str, number: int) -> Block:
    """Return the block between the attentions of one layer and the next, on which all that follows hangs."""
    stack = stacks[name]
    layer, where = stack[number], f"attention {number}" + (f" of the {name}" if name else "")
    if number + 1 < len(stack):
        later, following = flow.list_after(stack[number + 1][0].layers["output"]), stack[number + 1][0].chain
    elif name == ENCODER:  # Then the decoder, which attends to what the block puts out.
        later = flow.list_after(stacks[DECODER][0][0].layers["output"])
        following = _list_keys([each for each in _flatten(stacks[DECODER]) if each.crosses])
    else:
        later, following = set(), set()
    after = flow.list_after(layer[0].layers["output"])
    own = [block for block in blocks if set(block.values()) <= after and not later & set(block.values())]
    if len(own) != 1:
        raise UnlikeError(f"{len(own)} blocks with an activation follow {where}, where one is expected")
    (block,) = own
    if not set(block.values()) <= flow.list_after(layer[-1].layers["output"]):
        raise UnlikeError(f"the block behind {where} does not follow all attentions of its layer")
    if not following <= flow.list_after(block["down"] if "down" in block else block["second"]):
        raise UnlikeError(f"what follows the block behind {where} does not hang on it")
    return block


def _flatten(stack: Sequence[Sequence[Attention]]) -> list[Attention]:
    return [each for layer in stack for each in layer]


def check_layers(flow: Flow, layers: Sequence[Mapping[str, Visit]]) -> None:
    """Refuse layers of which one is not like the first."""
    first = {name: sizes(flow.sites[visit]) for name, visit in layers[0].items()}
    for number, layer in enumerate(layers):
        if {name: sizes(flow.sites[visit]) for name, visit in layer.items()} != first:
            raise UnlikeError(f"layer {number} is not like layer 0")
