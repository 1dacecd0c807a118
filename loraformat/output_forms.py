"""What a plan's output is: a copy of the base with spans rewritten, or new files with its tensors."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loraformat.bases import (
    BaseModel,
    BiasableBase,
    CalibratedBase,
    CopyingBase,
    DequantisingBase,
    NewContents,
    OutputForm,
    Rewriter,
    SharedBase,
    Weight,
    list_tokenizer_files,
)
from loraformat.dtypes import BY_NAME
from loraformat.errors import refuse
from loraformat.images import FileImage, NewOutput, OutputTensor
from loraformat.loading import list_files
from loraformat.plan import Plan, WeightedAdapter
from loraformat.plan.weights import PlannedWeight
from loraformat.spans import InputFile, Span, StoredTensor


@dataclass(frozen=True, slots=True)
class Order:
    """One model to write.

    Attributes:
        plan: what to do.
        adapters: what it was made from, in its order.
        checkpoint: the torch checkpoint of the base, with float numbers of weights that the base has in a few bits.
    """

    plan: Plan
    adapters: Sequence[WeightedAdapter]
    checkpoint: BaseModel | None = None


def require_rewriter(base: BaseModel) -> Rewriter:
    """Return what describes the base as new files; LF620 for a base that can only be copied."""
    if base.rewriter is None:
        raise refuse("LF620", base.path, f"a base of the format {base.format!r}", "one that can be written anew")
    return base.rewriter


def require_shared(base: BaseModel) -> SharedBase:
    """Return a base whose data files a model beside it may refer to; LF444 for one without."""
    if not isinstance(base, SharedBase) or not base.list_shared():
        raise refuse(
            "LF444",
            base.path,
            f"{base.format}, no weights that another model can refer to",
            "an ONNX model, no symbolic link",
        )
    return base


def add_copies(plan: Plan, base: BaseModel) -> CopyingBase:
    """Return the base of a plan with the copies that its output has."""
    assert isinstance(base, CopyingBase), "only such a base names copies"
    return base.with_copies(plan.copies)


def add_biases(plan: Plan, base: BaseModel) -> BaseModel:
    """Return the base of a plan with the biases that its output has and it lacks."""
    if not plan.biases:
        return base
    assert isinstance(base, BiasableBase), "only such a base says what would read them"
    return base.with_biases(plan.biases)


def choose_form(plan: Plan, base: BaseModel) -> OutputForm:
    """Return what the output is."""
    if plan.is_sharing:
        return require_shared(base).sharing_form
    return require_rewriter(base) if plan.rewritten else base


def describe_output(
    order: Order, base: BaseModel, blank_bytes: int, is_taken: Callable[[Path], bool] = os.path.lexists
) -> list[FileImage]:
    """Return the files of an order's output, the one with the receipt last.

    Args:
        order: what is written.
        base: the opened base.
        blank_bytes: room for the receipt.
        is_taken: says whether the path of a data file is another file's.
    """
    plan = order.plan
    output = NewOutput(plan.output, blank_bytes, plan.sha256[:8], is_taken)
    if plan.copies:
        base = add_copies(plan, base)
    if plan.floats:
        assert isinstance(base, DequantisingBase), "only such a base tells float forms"
        base = base.with_floats(plan.floats)
    if plan.ranges:
        assert isinstance(base, CalibratedBase), "only such a base has ranges"
        base = base.with_ranges(plan.ranges)
    base = add_biases(plan, base)
    if plan.is_sharing:
        return require_shared(base).describe_sharing_images(output, list_touched(plan, base))
    if not plan.rewritten:
        return base.describe_images(output)
    rewriter = require_rewriter(base)
    tensors = _edit_tensors(rewriter.output_tensors(), plan)
    replaced = _find_tokenizer(order) if "vocab_size" in plan.config_changes else {}
    return rewriter.describe_rewritten(output, NewContents(tensors, plan.config_changes, replaced))


def _edit_tensors(tensors: Sequence[OutputTensor], plan: Plan) -> list[OutputTensor]:
    """Return the tensors of the output: those with a new form, old or new ones, are computed."""
    computed = {
        weight.new.name: OutputTensor(weight.new.name, BY_NAME[weight.new.dtype], weight.new.shape, None)
        for weight in plan.weights
        if weight.new is not None
    }
    form = plan.options.get("dtype")
    kept = [computed.pop(tensor.name, _take_form(tensor, form)) for tensor in tensors]
    return [*kept, *computed.values()]


def _take_form(tensor: OutputTensor, form: object) -> OutputTensor:
    """Return a tensor without numbers in the form that was asked for: nothing of it is to be computed."""
    is_empty_float = tensor.dtype.family == "float" and not tensor.nbytes
    return replace(tensor, dtype=BY_NAME[form]) if isinstance(form, str) and is_empty_float else tensor


def _find_tokenizer(order: Order) -> dict[str, InputFile]:
    """Return the tokenizer's files of the last adapter that has some: it has grown the vocabulary."""
    found: dict[str, InputFile] = {}
    for item in order.adapters:
        folder = Path(item.adapter.source)
        files = list_tokenizer_files(folder if folder.is_dir() else folder.parent)
        found = dict(files) or found
    return found


def list_touched(plan: Plan, base: BaseModel) -> list[Span]:
    """Return the spans of the base that a plan rewrites in place."""
    weights = index_weights(base)
    in_place = (weight for weight in plan.weights if weight.new is None)
    return [tensor.span for weight in in_place for tensor in list_written(weight, weights[weight.key]).values()]


def index_weights(base: BaseModel) -> Mapping[str, Weight]:
    """Return the weights that sites of a base use, by their keys."""
    return {site.weight.key: site.weight for site in base.sites if site.weight is not None}


def list_written(weight: PlannedWeight, source: Weight) -> Mapping[str, StoredTensor]:
    """Return the tensors of the base that change in place: under no role the weight's own, by role its companions."""
    written = {each.role for each in weight.companions if each.is_written}
    beside = source.coding.companions if source.coding is not None else {}
    return {"": source.tensor} | {
        role: tensor for role, tensor in beside.items() if role in written and isinstance(tensor, StoredTensor)
    }


def list_inputs(base: BaseModel, orders: Sequence[Order]) -> list[InputFile]:
    """Return every open file that orders are carried out from."""
    adapters = [item.adapter for order in orders for item in order.adapters]
    checkpoints = {id(order.checkpoint): order.checkpoint for order in orders if order.checkpoint is not None}
    beside = [file for checkpoint in checkpoints.values() for file in checkpoint.files]
    return [*base.files, *beside, *(file for adapter in adapters for file in list_files(adapter))]
