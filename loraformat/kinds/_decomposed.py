"""Weight decomposition of a change that is no LoRA, as LyCORIS has it for its algorithms (`weight_decompose`).

lora_magnitude_vector    (out,), of a convolution (1, out, 1 ...): lengths of outputs
dora_scale               (1, in, 1 ...): lengths of inputs, over all outputs and places of the kernel
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor, SlotKind, Target
from loraformat.kinds import Change, Nature
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import FactoredKind
from loraformat.kinds._maps import NormMap
from loraformat.problems import Problem

_OUTPUTS: Final = "lora_magnitude_vector"
_INPUTS: Final = "dora_scale"
_EPSILON: Final = float(np.finfo(np.float32).eps)


def decompose(layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    """Return each layout with the lengths of outputs, and with those of inputs."""
    made = []
    for layout in layouts:
        conv = SlotKind.CONV in layout.slots
        lengths = {_OUTPUTS: "1 out *1", _INPUTS: "1 in *1"} if conv else {_OUTPUTS: "out", _INPUTS: "1 in"}
        made += [Layout(layout.slots, {**layout.required, role: axes}) for role, axes in lengths.items()]
    return tuple(made)


class Decomposed(FactoredKind):
    """A kind that brings W + Δ to given lengths.

    Attributes:
        inner: the kind of Δ.
    """

    nature = Nature.FUNCTION_OF_BASE
    inner: ClassVar[FactoredKind]

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return what the kind of Δ says."""
        plain = _without_lengths(target)
        return self.inner.check_more(plain, self.inner.axes(plain))

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return what the kind of Δ says of the base's sizes, and whether the lengths are of them."""
        problems = self.inner.check_size(_without_lengths(target), change)
        role, side = (_INPUTS, 1) if _INPUTS in target.factors else (_OUTPUTS, 0)
        if problems or target.factors[role].elements == change.shape[side]:
            return problems
        found = f"a weight of {change.shape}, {role} of {target.factors[role].shape}"
        return [Problem("LF405", target.name, found, "lengths of all outputs, or of all inputs")]

    def rank(self, factors: Mapping[str, Factor]) -> int:
        """Return the rank of Δ."""
        return self.inner.rank(factors)

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return the shape of Δ, as far as its factors tell it."""
        return self.inner.weight_shape(_without_lengths(target))

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> NormMap:
        """Return f for the matrix `(out, in * kernel)`."""
        delta = self.inner.delta(_without_lengths(target), change, factors, target.scale)
        if _OUTPUTS in factors:
            return NormMap(delta, factors[_OUTPUTS].reshape(-1), epsilon=_EPSILON)
        lengths, places = factors[_INPUTS].reshape(-1), math.prod(change.shape[2:])
        return NormMap(delta, lengths, is_by_rows=False, epsilon=_EPSILON, spread=places)

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1, as norms of columns come from a pass before; or how many rows are of one input."""
        return math.prod(change.shape[2:]) if transposed and _INPUTS in target.factors else 1


def _without_lengths(target: Target) -> Target:
    kept = {role: factor for role, factor in target.factors.items() if role not in (_OUTPUTS, _INPUTS)}
    return replace(target, factors=kept)
