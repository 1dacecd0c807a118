"""What follows for a model from weights that grow, part or appear: its configuration, and what must grow with them."""

from collections.abc import Mapping, Sequence
from typing import Final

from loraformat.bases import Site
from loraformat.plan.weights import PlannedWeight
from loraformat.problems import Problem
from loraformat.strict_json import JsonValue

_FLAGS: Final = {
    "attention_bias": frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}),
    "mlp_bias": frozenset({"gate_proj", "up_proj", "down_proj"}),
}
"""Fields by which transformers' models of the llama family give biases to their modules."""
_FIRST_LAYER: Final = "x_embedder"
"""What diffusers calls the first layer of a transformer, of as many inputs as its latents have channels."""
_MATRIX_AXES: Final = 2


def follow_weights(
    weights: Sequence[PlannedWeight], sites: Sequence[Site], *, untied: bool
) -> tuple[Mapping[str, JsonValue], list[Problem]]:
    """Return the fields of `config.json` that change with the weights, and what is wrong or to be said about it.

    Args:
        weights: of the plan.
        sites: the base's.
        untied: whether tied tables part.
    """
    new = [each for each in weights if each.new is not None and not each.is_dequantised and not each.is_added]
    changes: dict[str, JsonValue] = {"tie_word_embeddings": False} if untied else {}
    problems: list[Problem] = []
    grown = {weight.name: weight for weight in new if weight.nbytes and _rows(weight) > weight.shape[0]}
    if grown:
        problems += _check_grown(grown, weights, sites)
        changes["vocab_size"] = max(_rows(weight) for weight in grown.values())
    wider = [weight for weight in new if _columns(weight.shape) < _columns(weight.new.shape if weight.new else ())]
    for weight in wider:
        changes |= _follow_columns(weight)
        problems.append(_tell_columns(weight))
    biases = {weight.name.split(".")[-2] for weight in new if weight.new is not None and not weight.new.has_base}
    changes |= {flag: True for flag, modules in _FLAGS.items() if biases & modules}
    return changes, problems


def _rows(weight: PlannedWeight) -> int:
    return weight.new.shape[0] if weight.new is not None else weight.shape[0]


def _columns(shape: Sequence[int]) -> int:
    return shape[1] if len(shape) == _MATRIX_AXES else 0


def _follow_columns(weight: PlannedWeight) -> Mapping[str, JsonValue]:
    """Return the fields of a transformer's configuration that follow from the inputs of its first layer.

    Without `out_channels` a model of diffusers has as many outputs as inputs, which it no longer has.
    """
    if weight.new is None or weight.name.split(".")[-2:-1] != [_FIRST_LAYER]:
        return {}
    return {"in_channels": weight.new.shape[1], "out_channels": weight.shape[1]}


def _tell_columns(weight: PlannedWeight) -> Problem:
    after = _columns(weight.new.shape) if weight.new is not None else 0
    found = f"from {weight.shape[1]} to {after} inputs, the new ones zeros before the change is added"
    return Problem("LF136", weight.name, found, severity="note")


def _check_grown(
    grown: Mapping[str, PlannedWeight], weights: Sequence[PlannedWeight], sites: Sequence[Site]
) -> list[Problem]:
    """Return a problem for every table that must have as many rows as another that grows, and has not."""
    most = max(grown.values(), key=_rows)
    before, after = most.shape[0], _rows(most)
    tables = {
        site.weight.name: site.stored_shape()[0]
        for site in sites
        if site.grows and site.part is None and site.section is None and site.weight is not None
    }
    apart = {site.tied for site in sites if site.tied}
    tables |= {weight.name: _rows(weight) for weight in weights if weight.name in apart.union(tables)}
    short = [name for name, rows in sorted(tables.items()) if rows in {before, *map(_rows, grown.values())} - {after}]
    if short:
        found = f"{most.name!r} grows from {before} to {after} rows, and {', '.join(short)} does not"
        return [Problem("LF414", most.name, found, f"{after} rows in every table of the vocabulary")]
    return [Problem("LF413", most.name, f"the vocabulary grows from {before} to {after} tokens", severity="note")]
