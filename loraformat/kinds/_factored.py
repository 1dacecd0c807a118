"""What kinds that are made of factors have in common: checks that follow from their axes and options."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor, ScalingRule, SlotKind, Target
from loraformat.frozen_mapping import FrozenMapping
from loraformat.kinds import FLOATS, REST, UNKNOWN, Change, Delta, Nature, RoleSet
from loraformat.kinds._axes import Axes, Layout, bind_axes, check_factors, count_rank, merge_role_sets
from loraformat.kinds._matrices import Values
from loraformat.problems import Problem
from loraformat.strict_json import JsonValue

MATRICES: Final = (SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED)
_BESIDE: Final = (*MATRICES, SlotKind.CONV)
"""Slots of modules that may have a bias."""
BASE_BIAS: Final = "base_layer.bias"
"""The role of a bias that was trained beside the factors."""
_TILE_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class Option:
    """A setting that a target may have in `options`.

    Attributes:
        holds: whether a value will do.
        expected: what will, in words.
        default: its value where it is not given; `...` where it must be.
    """

    holds: Callable[[JsonValue], bool]
    expected: str
    default: Any = ...


def count(default: Any = ..., *, least: int = 1) -> Option:
    """Return an option that is a whole number."""
    expected = f"a whole number of at least {least}"
    return Option(lambda value: type(value) is int and value >= least, expected, default)


def number(default: Any = ...) -> Option:
    """Return an option that is a finite number."""

    def holds(value: JsonValue) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    return Option(holds, "a number", default)


def flag(default: Any = ...) -> Option:
    """Return an option that is true or false."""
    return Option(lambda value: isinstance(value, bool), "true or false", default)


def one_of(*values: str) -> Option:
    """Return an option that is one of some words, the first by default."""
    return Option(lambda value: value in values, f"one of {', '.join(values)}", values[0])


def name_options(**options: Option) -> Mapping[str, Option]:
    """Return options by name."""
    return FrozenMapping(options)


class FactoredKind:
    """What a kind is apart from its arithmetic.

    Attributes:
        layouts: the ways in which its factors are made, by their axes.
        options: its settings.
        is_scaled: whether its formula has a scale; otherwise the target's must be 1.
        rank_axis: the axis that is its rank; empty for a kind without one.
        is_flat: whether factors for a matrix may as well be those of a kernel.
        is_beside_bias: whether a trained bias may stand beside the factors: where these change nothing but the weight.
    """

    name: ClassVar[str]
    nature: ClassVar[Nature] = Nature.ADDITIVE
    formula: ClassVar[str]
    source: ClassVar[str]
    layouts: ClassVar[tuple[Layout, ...]]
    options: ClassVar[Mapping[str, Option]] = FrozenMapping()
    is_scaled: ClassVar[bool] = True
    rank_axis: ClassVar[str] = "rank"
    is_flat: ClassVar[bool] = False
    is_beside_bias: ClassVar[bool] = True

    @property
    def role_sets(self) -> tuple[RoleSet, ...]:
        """Which factors belong to which slot."""
        merged = merge_role_sets(self.layouts)
        if not self.is_beside_bias:
            return merged
        return tuple(
            replace(each, optional=(*each.optional, BASE_BIAS)) if set(each.slots) & set(_BESIDE) else each
            for each in merged
        )

    def check(self, target: Target) -> list[Problem]:
        """Return problems of slot, roles, number forms, axes, options, rank, scale, and what the kind adds."""
        own = self._leave_bias(target)
        problems = check_factors(own, self.layouts) or self._check_options(target)
        if problems:
            return problems
        found = self._check_rank(target) or self._check_scale(target)
        return found or self.check_more(own, self.axes(own)) or self._check_bias(target)

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return what else is wrong with a target whose factors agree with one another."""
        return []

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return what is wrong with sizes that the base told."""
        return []

    def rank(self, factors: Mapping[str, Factor]) -> int:
        """Return the size of the axis that is the rank; 0 for none."""
        return count_rank(factors, self.layouts, self.rank_axis) if self.rank_axis else 0

    def axes(self, target: Target) -> Axes:
        """Return the sizes of a checked target."""
        return bind_axes(target, self.layouts)

    def option(self, target: Target, name: str) -> Any:
        """Return an option of a checked target, or its default."""
        return target.options.get(name, self.options[name].default)

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return the change of the weight, computed from all factors, and the bias that was trained beside them."""
        flat = self.is_flat and target.slot is SlotKind.LINEAR
        own = self._leave_bias(target)
        weight = Change("weight", self.weight_shape(own), self.nature, tuple(own.factors), target.slot, is_flat=flat)
        if own is target:
            return (weight,)
        bias = target.factors[BASE_BIAS].shape
        return weight, Change("bias", bias, Nature.REPLACEMENT, (BASE_BIAS,), SlotKind.PARAMETER)

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in, *kernel)`, as far as the factors tell it."""
        axes = self.axes(target)
        kernel = axes.kernel if axes.kernel is not None else ((REST,) if target.slot is SlotKind.CONV else ())
        return axes.sizes.get("out", UNKNOWN), axes.sizes.get("in", UNKNOWN), *kernel

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as a matrix `(out, in * kernel)`; additive kinds have it."""
        raise NotImplementedError(f"the kind {self.name} adds nothing")

    def value(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> Delta:
        """Return the bias that was trained beside the factors."""
        return Values(np.ascontiguousarray(factors[BASE_BIAS].reshape(-1, 1)))

    def norm(self, target: Target, factors: Mapping[str, NDArray[Any]]) -> float:
        """Return the norm of the weight's change, from some rows at a time; NaN where only the base has its shape."""
        change = next(change for change in self.changes(target) if change.nature is Nature.ADDITIVE)
        if UNKNOWN in change.shape or REST in change.shape:
            return math.nan
        return sum_rows(self.delta(target, change, factors, target.scale))

    def _leave_bias(self, target: Target) -> Target:
        """Return the target without a bias that was trained beside its factors."""
        if BASE_BIAS not in target.factors or not self.is_beside_bias or target.slot not in _BESIDE:
            return target
        return replace(target, factors={role: each for role, each in target.factors.items() if role != BASE_BIAS})

    def _check_bias(self, target: Target) -> list[Problem]:
        """Return what is wrong with a bias beside factors that are sound."""
        own = self._leave_bias(target)
        if own is target:
            return []
        where, bias, out = f"{target.name}: {BASE_BIAS}", target.factors[BASE_BIAS], self.weight_shape(own)[0]
        if bias.dtype.name not in FLOATS:
            return [Problem("LF210", where, bias.dtype.name, "a floating-point form")]
        if len(bias.shape) == 1 and bias.elements and out in (UNKNOWN, bias.shape[0]):
            return []
        return [Problem("LF203", where, f"shape {bias.shape}", f"({'out' if out == UNKNOWN else out},)")]

    def _check_options(self, target: Target) -> list[Problem]:
        known = ", ".join(self.options) or "none"
        problems = [
            Problem("LF230", f"{target.name}: options", f"the option {name!r}", f"one of: {known}")
            for name in target.options
            if name not in self.options
        ]
        for name, option in self.options.items():
            if name not in target.options and option.default is ...:
                problems.append(Problem("LF230", f"{target.name}: options", f"no {name!r}", option.expected))
            elif name in target.options and not option.holds(target.options[name]):
                found = f"{name!r} is {target.options[name]!r:.80}"
                problems.append(Problem("LF230", f"{target.name}: options", found, option.expected))
        return problems

    def _check_rank(self, target: Target) -> list[Problem]:
        rank = self.rank(target.factors)
        if target.rank == rank:
            return []
        return [Problem("LF205", target.name, f"rank {target.rank} stated", f"rank {rank}")]

    def _check_scale(self, target: Target) -> list[Problem]:
        if not target.rank and target.scaling.rule is not ScalingRule.MULTIPLIER:
            found = f"the rule {target.scaling.rule.value!r}, which divides by a rank"
            return [Problem("LF122", target.name, found, f"the rule {ScalingRule.MULTIPLIER.value!r}")]
        if self.is_scaled or target.scale == 1:
            return []
        return [Problem("LF231", target.name, f"scale {target.scale:g}", f"scale 1: {self.name} has none")]


def sum_rows(delta: Delta) -> float:
    """Return the Frobenius norm of a change, formed some rows at a time."""
    rows, columns = delta.shape
    squares, room = 0.0, np.empty((min(rows, _TILE_ROWS), columns), np.float64)
    for start in range(0, rows, _TILE_ROWS):
        tile = room[: min(_TILE_ROWS, rows - start)]
        delta.write_rows(start, start + len(tile), tile)
        squares += float(np.vdot(tile, tile))
    return math.sqrt(squares)


def check_width(target: Target, change: Change, width: int) -> list[Problem]:
    """Return a problem when the weight has another number of columns than the factors act on."""
    columns = math.prod(change.shape[1:])
    if columns == width:
        return []
    found = f"a weight of {change.shape}, {columns} columns"
    return [Problem("LF405", target.name, found, f"{width} columns for its factors")]
