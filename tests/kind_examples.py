"""Targets of any kind for the law suites: random factors of given shapes, and what a formula makes of them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import Example, MapExample
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.strict_json import JsonValue

Arrays = dict[str, NDArray[Any]]
Shape = tuple[int, ...]
MATRICES = (SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED)
SCALES = st.sampled_from([1.0, 0.3, -2.0])
ONE = Scaling(ScalingRule.MULTIPLIER, 1.0)


def draw_sizes(draw: st.DrawFn, most: int = 9) -> tuple[int, int]:
    """Return two sizes that are not the same."""
    size = st.integers(1, most)
    return draw(st.tuples(size, size).filter(lambda sizes: sizes[0] != sizes[1]))


def draw_factors(draw: st.DrawFn, shapes: Mapping[str, Shape]) -> Arrays:
    """Return random factors, all in float32 or all in float64."""
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    form = draw(st.sampled_from([np.float32, np.float64]))
    return {role: dice.standard_normal(shape).astype(form) for role, shape in shapes.items()}


def make_target(
    kind: str,
    slot: SlotKind,
    arrays: Arrays,
    rank: int = 0,
    scaling: Scaling = ONE,
    options: Mapping[str, JsonValue] | None = None,
) -> Target:
    factors = {role: MemoryFactor(role, array) for role, array in arrays.items()}
    return Target("m.q", kind, slot, factors, rank, scaling, options=options or {})


def widen(arrays: Arrays) -> Arrays:
    """Return the floats in float64."""
    return {role: array.astype(np.float64) if array.dtype.kind == "f" else array for role, array in arrays.items()}


def added(
    target: Target,
    dense: Callable[[Arrays], NDArray[np.float64]],
    *,
    terms: int = 8,
    shape: Shape = (),
    bound: float | None = None,
) -> Example:
    """Return an example of an additive kind.

    Args:
        target: the target.
        dense: the formula, in float64.
        terms: how many products a number of the change is made of, beside the rank.
        shape: that of the base, where the factors do not tell it.
        bound: how large a sum on the way can get; None for a formula of which the absolute values tell.
    """
    arrays = {role: factor.read() for role, factor in target.factors.items()}
    wide = widen(arrays)
    change = dense(wide)
    if bound is None:
        most = dense({role: np.abs(array) if array.dtype.kind == "f" else array for role, array in wide.items()})
    else:
        most = np.full(change.shape, bound)
    return Example(target, arrays, change, most, terms, shape)


def mapped(
    draw: st.DrawFn,
    target: Target,
    shape: Shape,
    formula: Callable[[Arrays, NDArray[np.float64]], NDArray[np.float64]],
    *,
    told: bool = False,
    slack: float = 3e-4,
) -> MapExample:
    """Return an example of a kind that is a function of the base, whose weight has a shape; `told` by the factors."""
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    base = dice.standard_normal((shape[0], int(np.prod(shape[1:]))))
    arrays = {role: factor.read() for role, factor in target.factors.items()}
    result = formula(widen(arrays), base)
    size = slack * (1 + float(np.abs(result).max()))
    return MapExample(target, arrays, base, result, size, () if told else shape)
