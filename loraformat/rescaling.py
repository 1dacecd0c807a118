"""The same change under another scale: what a conversion does where its target has no place for the old one.

In this order: nothing where the scales agree; a power of two where that is exact; float32 for the one tensor that is
multiplied; and its own form only with the user's leave, for it rounds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np

from loraformat.adapter import Factor, Scaling, Target
from loraformat.derived import derive
from loraformat.operations import Scale
from loraformat.problems import Problem

_MULTIPLIED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "lora_B.weight": ("lora_B.weight", "lora_B.bias"),
        "lora_embedding_B": ("lora_embedding_B",),
        "hada_w1_a": ("hada_w1_a",),
        "lokr_w1": ("lokr_w1",),
        "lokr_w1_a": ("lokr_w1_a",),
        "diff": ("diff",),
    }
)
"""A role of which the change is a linear function, to the roles that are multiplied with it."""
_WIDE: Final = "float32"
_NARROW: Final = frozenset({"float16", "bfloat16"})


@dataclass(frozen=True, slots=True)
class Rescaled:
    """A target under another scaling.

    Attributes:
        target: the target.
        problem: what was lost on the way, or None: a note for float32, an error for a form of its own.
    """

    target: Target
    problem: Problem | None = None


def rescale(target: Target, scaling: Scaling, forms: frozenset[str] = frozenset()) -> Rescaled:
    """Return a target that does the same under another scaling.

    Args:
        target: the target.
        scaling: how strongly its factors are to act from now on.
        forms: number forms that its new home has; empty for any.
    """
    moved = replace(target, scaling=scaling)
    if moved.scale == target.scale:
        return Rescaled(moved)
    if not moved.scale or not math.isfinite(target.scale / moved.scale):
        found = f"scale {target.scale:g}, which no factor turns into {moved.scale:g}"
        return Rescaled(target, Problem("LF313", target.name, found, "a scale other than 0"))
    ratio = target.scale / moved.scale
    first = next((role for role in _MULTIPLIED if role in target.factors), None)
    if first is None:
        found = f"scale {target.scale:g}, in a target of kind {target.kind!r} whose factors cannot take it"
        return Rescaled(target, Problem("LF313", target.name, found, f"scale {moved.scale:g}"))
    factors = dict(target.factors)
    worst: Problem | None = None
    for role in _MULTIPLIED[first]:
        if role in factors:
            factors[role], problem = _multiply(target.name, factors[role], ratio, forms)
            worst = problem if worst is None or (problem and problem.severity == "error") else worst
    return Rescaled(replace(moved, factors=factors), worst)


def _multiply(where: str, factor: Factor, ratio: float, forms: frozenset[str]) -> tuple[Factor, Problem | None]:
    own = factor.dtype.name
    if math.frexp(abs(ratio))[0] == 0.5 and _is_exact(factor, ratio):
        return derive(Scale(ratio, own), factor), None
    wide = own in _NARROW and (not forms or _WIDE in forms)
    form = _WIDE if wide else own
    scaled = derive(Scale(ratio, form), factor)
    found = f"{factor.name} times {ratio:.9g} as {form}, relative error {_measure_error(factor, scaled, ratio):.2g}"
    if wide:
        return scaled, Problem("LF320", where, found, severity="note")
    return scaled, Problem("LF313", where, found, "an exact scale")


def _is_exact(factor: Factor, ratio: float) -> bool:
    """Say whether a power of two leaves every number whole: none overflows, none loses bits below the smallest."""
    values = factor.read()
    with np.errstate(over="ignore", under="ignore"):
        scaled = (values.astype(np.float64) * ratio).astype(values.dtype)
    return bool(np.array_equal(scaled.astype(np.float64), values.astype(np.float64) * ratio))


def _measure_error(factor: Factor, scaled: Factor, ratio: float) -> float:
    """Return the largest difference from the exact product, relative to the largest number."""
    exact = factor.read().astype(np.float64) * ratio
    largest = float(np.max(np.abs(exact), initial=0.0))
    difference = float(np.max(np.abs(scaled.read().astype(np.float64) - exact), initial=0.0))
    return difference / largest if largest else 0.0
