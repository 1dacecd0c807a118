"""What a plan needs when its output is written anew: a new form for every tensor that is not copied as it is.

That is so when sizes change (a grown vocabulary, a new bias, an untied head), when another number form or the
safetensors format is asked for, and then for tensors that are no run of bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loraformat.bases import BaseModel
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.encodings import choose_encoding
from loraformat.errors import refuse
from loraformat.images import OutputTensor
from loraformat.output_forms import require_rewriter
from loraformat.plan.weights import NewForm, PlannedWeight, as_matrix, count_tile_rows
from loraformat.problems import Problem
from loraformat.strict_json import JsonValue

_NONE: Final[Mapping[str, JsonValue]] = {}


@dataclass(frozen=True, slots=True)
class Rewriting:
    """What is to be written anew.

    Attributes:
        weights: the plan's weights, and beside them the tensors that only change their form.
        config_changes: members of `config.json` and their new values.
        problems: what the output leaves out or changes.
    """

    weights: tuple[PlannedWeight, ...]
    config_changes: Mapping[str, JsonValue]
    problems: tuple[Problem, ...]


def plan_rewriting(
    base: BaseModel,
    weights: Sequence[PlannedWeight],
    dtype: str | None = None,
    *,
    anew: bool = False,
    config_changes: Mapping[str, JsonValue] = _NONE,
) -> Rewriting:
    """Plan an output that is written anew.

    Args:
        base: the opened base.
        weights: what the adapters change.
        dtype: number form of all floating-point tensors of the output; None keeps each one's own.
        anew: whether the user has asked for safetensors.
        config_changes: what follows from the changes already.

    Raises:
        LoraformatError: LF620 the base can only be copied, LF106 an unknown number form.
    """
    rewriter = require_rewriter(base)
    if not anew and rewriter.format != base.format:
        mend = "Add --to safetensors, and name the output so."
        raise refuse("LF620", base.path, f"the format {base.format!r}, of which only copies are written", "", mend)
    form = _find_form(dtype)
    changed = tuple(_give_form(weight, form) for weight in weights)
    taken = {weight.name for weight in weights}
    taken |= {each.name for weight in weights if weight.is_dequantised for each in weight.companions}
    _check_codes(base, weights, dtype)
    others = (_convert(tensor, form) for tensor in rewriter.output_tensors() if tensor.name not in taken)
    config = dict(config_changes) | ({"torch_dtype": form.name} if form is not None else {})
    problems = (*rewriter.problems, *rewriter.check_config(config))
    return Rewriting((*changed, *(other for other in others if other is not None)), config, problems)


def _check_codes(base: BaseModel, weights: Sequence[PlannedWeight], dtype: str | None) -> None:
    """Raise LF472 where another number form is asked for, and codes would not be read as numbers any more."""
    floats = {weight.key for weight in weights if weight.is_dequantised}
    coded = (site.weight for site in base.sites if site.weight is not None and site.weight.coding is not None)
    left = next((weight.name for weight in coded if weight.key not in floats), None) if dtype is not None else None
    if left is not None:
        raise refuse("LF472", left, "codes, which another number form does not concern", "floats")


def _find_form(name: str | None) -> Dtype | None:
    if name is None:
        return None
    form = BY_NAME.get(name)
    if form is None or choose_encoding(form) is None:
        known = ", ".join(each.name for each in BY_NAME.values() if choose_encoding(each) is not None)
        raise refuse("LF106", "--dtype", name, f"one of {known}", "Name one of these forms.")
    return form


def _give_form(weight: PlannedWeight, form: Dtype | None) -> PlannedWeight:
    """Return a weight with the number form that was asked for."""
    if form is None or weight.written_dtype == form.name:
        return weight
    encoding = choose_encoding(form)
    assert encoding is not None, "checked before"
    new = weight.new or NewForm(weight.name, form.name, weight.shape, encoding)
    return replace(weight, new=replace(new, dtype=form.name, encoding=encoding))


def _convert(tensor: OutputTensor, form: Dtype | None) -> PlannedWeight | None:
    """Return an untouched tensor as a weight without changes, None for one that is copied as it is."""
    source = tensor.source
    if source is None or not source.elements:
        return None
    wanted = form if form is not None and tensor.dtype.family == "float" else tensor.dtype
    own, encoding = choose_encoding(tensor.dtype), choose_encoding(wanted)
    if (wanted == tensor.dtype and tensor.is_copied) or own is None or encoding is None:
        return None
    matrix = as_matrix(tensor.shape)
    return PlannedWeight(
        key=tensor.name,
        name=tensor.name,
        file=source.extent.path.name,
        offset=source.extent.offset,
        nbytes=source.extent.length,
        dtype=tensor.dtype.name,
        shape=tensor.shape,
        matrix=matrix,
        encoding=own,
        tile_rows=count_tile_rows(matrix),
        changes=(),
        evidence="",
        new=NewForm(tensor.name, wanted.name, tensor.shape, encoding),
    )
