"""Options of a target that stand in tensors beside its factors: a bound, or the side that is multiplied."""

from collections.abc import Mapping
from typing import Final

from loraformat.adapter import Factor, Target
from loraformat.problems import Problem
from loraformat.schemes._beside import (
    ALPHA,
    FLOAT64,
    INT64,
    Module,
    as_number,
    form_of,
    make_number,
    parse_form,
    read_alpha,
    read_number,
    recall_form,
)
from loraformat.strict_json import JsonValue

ON_INPUT: Final = "on_input"
"""The role of LyCORIS' tensor that says which side (IA)³ multiplies: 1 for the inputs."""
SCALED: Final = "oft_R.scaled_oft"
"""The role of OneTrainer's tensor that says that its rotations were divided by a number that grows with their size."""
_SCALED_KIND: Final = "onetrainer_oft"
BOUNDED: Final = frozenset({"lycoris_oft", "lycoris_boft"})
"""Kinds for which alpha is no scale but a bound."""


def find_homeless_options(target: Target) -> list[Problem]:
    """Return the options of a target for which `write_options` has no place."""
    bound = {"constraint"} if target.kind in BOUNDED else set()
    scaled = {"scaled"} if target.kind == _SCALED_KIND else set()
    left = sorted(set(target.options) - {ON_INPUT} - bound - scaled)
    return [
        Problem("LF312", target.name, f"{name} {target.options[name]!r:.80}", "an option that it can state")
        for name in left
    ]


def read_options(kind: str, module: Module) -> dict[str, JsonValue]:
    """Return the options of a target that stand in tensors beside its factors; raises as `read_alpha`."""
    if kind in BOUNDED:
        alpha = read_alpha(module)
        return {"constraint": alpha} if alpha else {}
    if kind == _SCALED_KIND:
        return {"scaled": True} if read_number(module, SCALED) else {}
    side = read_number(module, ON_INPUT)
    return {} if side is None else {ON_INPUT: bool(side)}


def remember_options(sidecars: Mapping[str, Mapping[str, Factor]]) -> dict[str, JsonValue]:
    """Return the forms of tensors that hold options, target to form, where `write_options` writes another."""
    forms = {
        name: form_of(beside[role])
        for name, beside in sidecars.items()
        for role in (ON_INPUT, SCALED)
        if role in beside
    }
    odd: dict[str, JsonValue] = {name: form for name, form in forms.items() if form != "int64[]"}
    return {"side_forms": odd} if odd else {}


def write_options(target: Target, remembered: Mapping[str, JsonValue]) -> dict[str, Factor]:
    """Return the tensors that hold a target's options; none is rounded."""
    bound = as_number(target.options.get("constraint"))
    if target.kind in BOUNDED and bound is not None:
        form = recall_form(remembered, target.name)
        return {ALPHA: make_number(target.name, ALPHA, bound, form, FLOAT64)}
    role = SCALED if target.kind == _SCALED_KIND else ON_INPUT
    stated = target.options.get("scaled" if role == SCALED else ON_INPUT)
    if stated is None or (role == SCALED and not stated):
        return {}
    forms = remembered.get("side_forms")
    form = parse_form(forms.get(target.name) if isinstance(forms, Mapping) else None, INT64)
    return {role: make_number(target.name, role, float(stated is True), form, INT64)}
