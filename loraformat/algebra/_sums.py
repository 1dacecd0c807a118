"""Sums of changes: side by side in one pair of factors, exactly; or of values that replace, by their weighted mean.

    Σ cᵢ BᵢAᵢ = m · [±B₁ | (c₂/m)·B₂ | ...] · [A₁; A₂; ...]

A passes as it is. The multiplier m is the |cᵢ| that leaves most of B untouched: what differs from it by its sign or a
power of two alone is folded in without rounding, the rest is rounded once.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor, Scaling, ScalingRule, Target
from loraformat.algebra._targets import (
    BIAS,
    FLOAT32,
    FLOAT64,
    MadeFactor,
    files_of,
    pair_of,
    pair_roles,
    rescale,
    round_once,
)
from loraformat.dtypes import Dtype
from loraformat.frozen_mapping import FrozenMapping

_HALF: Final = 16
DIFFERENCE: Final = "diff"
"""The kind of differences that were saved as a whole: their sums are differences too."""
VALUES: Final = "replace"
"""The kind of whole parameters that replace the base's; those of other such kinds may be rows that indices name."""


class Term(NamedTuple):
    """One adapter's part in a target.

    Attributes:
        position: place of the adapter in the list.
        weight: what the user gave the adapter.
        target: its target, whose own scale is not in `weight`.
    """

    position: int
    weight: float
    target: Target


Share: TypeAlias = tuple[Target, float]
"""A target and the factor on its change, beside the target's own scale."""


def concatenate(shares: Sequence[Share]) -> Target:
    """Return the sum of LoRAs of one slot and shape as one LoRA whose rank is the sum of the ranks.

    Nothing is read: the new factors read the old ones when they are read.
    """
    first = shares[0][0]
    roles = pair_roles(first)
    assert roles is not None, "checked before"
    scales = [target.scale * weight for target, weight in shares]
    unit = choose_unit(scales, [target.rank for target, _ in shares])
    ratios = [scale / unit for scale in scales]
    downs, ups = zip(*(pair_of(target) for target, _ in shares), strict=True)
    rank = sum(target.rank for target, _ in shares)
    down_form = join_forms([factor.dtype for factor in downs])
    up_form = join_forms([factor.dtype for factor in ups])
    if any(abs(ratio) != 1 for ratio in ratios):
        up_form = FLOAT64 if FLOAT64 in (up_form, down_form) else FLOAT32
    down = MadeFactor(
        f"{first.name}.{roles[0]}",
        down_form,
        (rank, *downs[0].shape[1:]),
        partial(_stack, downs, [1.0] * len(downs), 0, down_form),
        files_of(downs),
    )
    up = MadeFactor(
        f"{first.name}.{roles[1]}",
        up_form,
        (ups[0].shape[0], rank, *ups[0].shape[2:]),
        partial(_stack, ups, ratios, 1, up_form),
        files_of(ups),
    )
    factors: dict[str, Factor] = {roles[0]: down, roles[1]: up}
    bias = add_biases(shares, unit)
    if bias is not None:
        factors[BIAS] = bias
    return replace(first, factors=FrozenMapping(factors), rank=rank, scaling=Scaling(ScalingRule.MULTIPLIER, unit))


def add_biases(shares: Sequence[Share], unit: float) -> MadeFactor | None:
    """Return Σ cᵢbᵢ / unit of what LoRAs add to the bias; None where none does."""
    return _add_role(shares, BIAS, unit) if any(BIAS in target.factors for target, _ in shares) else None


def add_differences(shares: Sequence[Share]) -> Target:
    """Return Σ cᵢDᵢ of differences that were saved as a whole; what some lack is summed over the rest."""
    first = shares[0][0]
    roles = sorted({role for target, _ in shares for role in target.factors})
    factors = FrozenMapping({role: _add_role(shares, role, 1.0) for role in roles})
    return replace(first, factors=factors, scaling=Scaling(ScalingRule.MULTIPLIER, 1.0))


def _add_role(shares: Sequence[Share], role: str, unit: float) -> MadeFactor:
    """Return Σ cᵢxᵢ / unit of one role where targets have it, rounded once to float32 or wider."""
    parts = [(t.factors[role], t.scale * weight / unit) for t, weight in shares if role in t.factors]
    held, ratios = zip(*parts, strict=True)
    form = FLOAT64 if join_forms([factor.dtype for factor in held]) == FLOAT64 else FLOAT32
    name = f"{shares[0][0].name}.{role}"

    def total() -> NDArray[Any]:
        whole = np.zeros(held[0].shape)
        for factor, ratio in zip(held, ratios, strict=True):
            whole += factor.read().astype(np.float64) * ratio
        return round_once(whole, form, name)

    return MadeFactor(name, form, held[0].shape, total, files_of(held))


def choose_unit(scales: Sequence[float], ranks: Sequence[int]) -> float:
    """Return the multiplier: of the |scales| that most of the rank shares up to powers of two, the commonest."""
    numbers: Counter[float] = Counter()
    mantissas: Counter[float] = Counter()
    for scale, rank in zip(scales, ranks, strict=True):
        if scale:
            numbers[abs(scale)] += rank
            mantissas[abs(math.frexp(scale)[0])] += rank
    if not numbers:
        return 1.0
    return max(numbers, key=lambda number: (mantissas[math.frexp(number)[0]], numbers[number], number))


def join_forms(forms: Sequence[Dtype]) -> Dtype:
    """Return the number form that holds the numbers of all: their own where they agree, else float32 or float64."""
    if len(set(forms)) == 1:
        return forms[0]
    return FLOAT64 if FLOAT64 in forms else FLOAT32


def _stack(factors: Sequence[Factor], ratios: Sequence[float], axis: int, form: Dtype) -> NDArray[Any]:
    """Return the factors side by side, each times its ratio; the product is taken in float64 and rounded once."""
    return np.concatenate([_fold(factor, ratio, form) for factor, ratio in zip(factors, ratios, strict=True)], axis)


def _fold(factor: Factor, ratio: float, form: Dtype) -> NDArray[Any]:
    array = factor.read()
    if abs(ratio) == 1:
        array = array.astype(form.numpy(), copy=False)
        return array if ratio > 0 else -array
    return round_once(array.astype(np.float64) * ratio, form, factor.name)


def blend_values(shares: Sequence[Share]) -> Target:
    """Return Σ λᵢ(Vᵢ − W) of values that replace as one: λ = Σ λᵢ and V = Σ λᵢVᵢ / λ, rounded once to float32.

    One alone keeps its values and takes the weight into its λ. The λ must not add up to 0.
    """
    first, weight = shares[0]
    if len(shares) == 1:
        return rescale(first, weight)
    parts = [target.scale * factor for target, factor in shares]
    whole = math.fsum(parts)
    factors = {
        role: _blend(f"{first.name}.{role}", [target.factors[role] for target, _ in shares], parts, whole)
        for role in first.factors
    }
    return replace(first, factors=FrozenMapping(factors), scaling=Scaling(ScalingRule.MULTIPLIER, whole))


def _blend(name: str, values: Sequence[Factor], parts: Sequence[float], whole: float) -> MadeFactor:
    form = join_forms([factor.dtype for factor in values])
    if form.bits <= _HALF:
        form = FLOAT32

    def mix() -> NDArray[Any]:
        start = values[0].read().astype(np.float64)
        mixed = start.copy()
        for factor, part in zip(values[1:], parts[1:], strict=True):  # V₁ + Σ λᵢ/λ·(Vᵢ − V₁): equal values stay
            mixed += (part / whole) * (factor.read().astype(np.float64) - start)
        return round_once(mixed, form, name)

    return MadeFactor(name, form, values[0].shape, mix, files_of(values))
