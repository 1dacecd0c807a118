"""The rows of a module in another order: what a spelling's `order` says, as an operation and its way back."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from loraformat.adapter import Factor, Target
from loraformat.base_facts import BaseFacts
from loraformat.conversion._fusing import row_roles
from loraformat.derived import Operation, derive
from loraformat.problems import Problem
from loraformat.row_orders import GroupHeads, Permute, SwapHalves
from loraformat.spellings import Order

Rule = Callable[[Target, Factor, Order, BaseFacts, bool], "Operation | None"]
"""From the target, the factor, the order, the base, and whether to undo it, to the operation; None for nothing to do.

Raises LookupError with the name of the count that the base must tell.
"""


def _swap_halves(target: Target, factor: Factor, order: Order, facts: BaseFacts, undo: bool) -> Operation | None:
    return SwapHalves(_row_axis(factor))


def _swap_two(target: Target, factor: Factor, order: Order, facts: BaseFacts, undo: bool) -> Operation | None:
    """Swap where the module puts out a shift and a scale alone, twice as many rows as it has inputs."""
    down = target.factors.get("lora_A.weight")
    doubled = down is not None and len(down.shape) > 1 and factor.shape[_row_axis(factor)] == 2 * down.shape[1]
    return SwapHalves(_row_axis(factor)) if doubled else None


def _interleave(target: Target, factor: Factor, order: Order, facts: BaseFacts, undo: bool) -> Operation | None:
    """Half-split rotary rows, as transformers has them, to interleaved ones, as Meta's models have them."""
    heads = facts.count(order.heads)
    if heads is None:
        raise LookupError(order.heads)
    axis = _row_axis(factor)
    half = factor.shape[axis] // heads // 2
    operation = Permute((heads, 2, half), (0, 2, 1), axis)
    return operation.undo() if undo else operation


def _group(target: Target, factor: Factor, order: Order, facts: BaseFacts, undo: bool) -> Operation | None:
    """Rows of q, k and v to groups by key-value heads, as Megatron has them."""
    counts = {name: facts.count(name) for name in ("heads", "kv_heads", "head_dim")}
    known = [count for count in counts.values() if count is not None]
    if len(known) < len(counts):
        raise LookupError(", ".join(name for name, count in counts.items() if count is None))
    operation = GroupHeads(known[0], known[1], known[2])
    return operation.undo() if undo else operation


def _alternate(target: Target, factor: Factor, order: Order, facts: BaseFacts, undo: bool) -> Operation | None:
    """Rows of two parts, one below the other, to rows that take turns."""
    axis = _row_axis(factor)
    operation = Permute((2, factor.shape[axis] // 2), (1, 0), axis)
    return operation.undo() if undo else operation


RULES: Final[Mapping[str, Rule]] = {
    "halves-swapped": _swap_halves,
    "halves-swapped-where-there-are-two": _swap_two,
    "rotary-interleaved": _interleave,
    "grouped-by-kv-heads": _group,
    "alternating": _alternate,
}


def reorder(target: Target, order: Order | None, facts: BaseFacts, *, undo: bool) -> tuple[Target, Problem | None]:
    """Return the target with its rows in an order, or with that order undone."""
    if order is None:
        return target, None
    factors = dict(target.factors)
    try:
        for role in row_roles(target):
            operation = RULES[order.rule](target, factors[role], order, facts, undo)
            if operation is not None:
                factors[role] = derive(operation, factors[role])
    except LookupError as error:
        found = f"rows ordered by {order.rule}"
        return target, Problem("LF311", target.name, found, f"the base's count of {error.args[0]}")
    except ValueError as error:
        return target, Problem("LF315", target.name, str(error), "rows that the order divides")
    return replace(target, factors=factors), None


def _row_axis(factor: Factor) -> int:
    """Return the axis of the outputs; a magnitude of a convolution has them second."""
    return 1 if len(factor.shape) == 4 and factor.shape[0] == 1 else 0
