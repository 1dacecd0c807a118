"""Merges into state dicts in memory: arrays of numpy or torch in, arrays of the same library out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from loraformat.apply.accounting import finish_receipt
from loraformat.arguments import (
    AdapterArguments,
    StateOptions,
    check_options,
    read_effort,
    read_hints,
    require_adapters,
    weigh_adapters,
)
from loraformat.arrays import read_config
from loraformat.bases._held_state import PLACE, HeldState
from loraformat.dtypes import BY_NAME
from loraformat.engine.held_weights import HeldWeight, Place, compute_weights
from loraformat.limits import RETAINED_REFUSE, RETAINED_WARN
from loraformat.output_forms import Order
from loraformat.plan import Plan
from loraformat.plan.weights import NewForm
from loraformat.planning import build_plan
from loraformat.planning.wishes import SettledWishes
from loraformat.receipt import Receipt
from loraformat.spans import Span
from loraformat.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class MergedState:
    """A state dict with adapters merged into it.

    Attributes:
        tensors: all of its values in their order. What a merge changes is a new array of the same library and on the
            same device; everything else is the very object that was handed over.
        receipt: what was done.
        config_changes: members of the model's configuration that the tensors now ask for, such as a grown
            `vocab_size`; None for one that goes.
    """

    tensors: dict[str, Any]
    receipt: Receipt
    config_changes: Mapping[str, JsonValue]

    def __repr__(self) -> str:
        """Say what it is in one line."""
        return f"<MergedState: {len(self.tensors)} tensors; {self.receipt!r}>"


def merge_state_dict(
    state_dict: Mapping[str, Any], adapters: AdapterArguments, **options: Unpack[StateOptions]
) -> MergedState:
    """Merge adapters into a state dict in memory; nothing that is handed over is written to.

    The merged numbers are bit for bit those that `merge` writes into a file of the same state dict.

    Args:
        state_dict: names to arrays of numpy (bfloat16 and float8 as ml_dtypes has them), tensors of torch on any
            device, or what numpy takes for an array. Tied tensors are known by their memory, and stay tied.
        adapters: as in `merge`.
        options: `arguments.StateOptions` says what there is.

    Returns:
        The tensors, for `model.load_state_dict`, and a receipt.

    Raises:
        LoraformatError: what `merge` raises; LF831 no state dict, LF106 a tensor whose numbers cannot be had.
    """
    check_options("merge_state_dict", options, StateOptions)
    base = HeldState(state_dict, read_config(options.get("config")))
    weighted = weigh_adapters(adapters, options, base)
    require_adapters(weighted, base)
    hints = read_hints(options)
    wishes = {name: value for name, value in options.items() if name in SettledWishes.__annotations__}
    plan = build_plan(base, weighted, PLACE, hints=hints, **cast(SettledWishes, wishes))
    found = compute_weights(Order(plan, weighted, hints.checkpoint), base, read_effort(options))
    least = options.get("min_retained", RETAINED_REFUSE), options.get("warn_retained", RETAINED_WARN)
    receipt = finish_receipt(plan, base, [weight.sums for weight in found], *least, room_bytes=0)
    return MergedState(_put_together(state_dict, base, plan, found), receipt, plan.config_changes)


def _put_together(given: Mapping[str, Any], base: HeldState, plan: Plan, found: list[HeldWeight]) -> dict[str, Any]:
    """Return the values of the output in their order, those that are new last."""
    after = base.with_floats(plan.floats) if plan.floats else base
    kept = {tensor.name for tensor in after.rewriter.output_tensors()} | (given.keys() - base.arrays.keys())
    buffers = {place: buffer for weight in found for place, buffer in weight.buffers.items()}
    forms = {weight.new.name: weight.new for weight in plan.weights if weight.new is not None}
    spans = {tensor.name: tensor.span for tensor in base.list_tensors() if tensor.is_contiguous}
    names = {span: name for name, span in reversed(spans.items())}  # Of tied tensors the first.
    made = {place: _make_array(place, data, forms, base, names) for place, data in buffers.items()}
    stands = {name: made.get(name, made.get(spans.get(name, ""), value)) for name, value in given.items()}
    return {name: value for name, value in stands.items() if name in kept or name in made} | {
        name: made[name] for name in forms if name not in given
    }


def _make_array(
    place: Place, data: NDArray[np.uint8], forms: Mapping[str, NewForm], base: HeldState, names: Mapping[Span, str]
) -> Any:
    """Return what has been computed as an array like the one in whose place it stands, or the first beside it."""
    if isinstance(place, Span):
        held = base.arrays[names[place]]
        return held.make_like(data, held.dtype, held.shape)
    beside = place.rpartition(".")[0]
    near = (held for name, held in base.arrays.items() if name == place or name.rpartition(".")[0] == beside)
    held = next(near, next(iter(base.arrays.values())))
    return held.make_like(data, BY_NAME[forms[place].dtype], forms[place].shape)
