"""The ways of putting changes together. Linear ones are exact in factors; the others work number by number.

`wᵢ` is the weight of adapter i, `Δᵢ` its change of a target, its own scale in it. A target that an adapter lacks is
`Δᵢ = 0` for the linear methods, and has no vote in the others. `docs/algebra.md` compares with PEFT and mergekit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

from loraformat.algebra._angles import measure_angle
from loraformat.algebra._dense import Sparsify, Tile, add, drop_random, elect, keep_largest
from loraformat.algebra._sums import Share, Term
from loraformat.algebra._targets import nature_of
from loraformat.kinds import Nature

Weigh: TypeAlias = Callable[[Sequence[float], Sequence[Term]], list[float]]
"""Takes the weights of all adapters and the terms of one target; returns a factor for each term."""

_PARALLEL: Final = 0.9995
"""Cosine beyond which an arc is taken for its chord, as mergekit does."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A method whose result is Σ cᵢΔᵢ.

    Attributes:
        formula: the result, on one line.
        weigh: returns the cᵢ.
        count: how many adapters it takes; 0 for any number.
        normalises: whether the weights are divided by their sum.
    """

    formula: str
    weigh: Weigh
    count: int = 0
    normalises: bool = False


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A method that works on the numbers of the changes; its result has no exact factors.

    Attributes:
        formula: the result, on one line.
        sparsify: what each change loses first.
        join: how what is left is put together.
    """

    formula: str
    sparsify: Sparsify
    join: Callable[[Sequence[Tile], Sequence[float]], Tile]


Method: TypeAlias = Linear | Elementwise


def _as_given(weights: Sequence[float], terms: Sequence[Term]) -> list[float]:
    return [term.weight for term in terms]


def _as_shares(weights: Sequence[float], terms: Sequence[Term]) -> list[float]:
    whole = math.fsum(weights)
    return [term.weight / whole for term in terms]


def _on_the_arc(weights: Sequence[float], terms: Sequence[Term]) -> list[float]:
    """Return sin((1−t)θ)/sin θ and sin(tθ)/sin θ, θ the angle between the changes; the chord where there is none."""
    chord = _as_shares(weights, terms)
    if len(terms) < 2 or nature_of(terms[0].target) is not Nature.ADDITIVE:
        return chord
    first, second, inner = measure_angle(terms[0].target, terms[1].target)
    cosine = inner / (first * second) if first * second else 1.0
    if abs(cosine) > _PARALLEL:
        return chord
    angle = math.acos(cosine)
    return [math.sin(share * angle) / math.sin(angle) for share in chord]


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "sum": Linear("Σ wᵢΔᵢ", _as_given),
        "task-arithmetic": Linear("Σ wᵢΔᵢ", _as_given),
        "mean": Linear("Σ wᵢΔᵢ / Σ wᵢ", _as_shares, normalises=True),
        "slerp": Linear("(sin((1−t)θ)·Δ₁ + sin(tθ)·Δ₂) / sin θ, t = w₂/(w₁+w₂)", _on_the_arc, 2, normalises=True),
        "magnitude-prune": Elementwise("Σ wᵢ·top(Δᵢ)", keep_largest, add),
        "ties": Elementwise("mean of the wᵢ·top(Δᵢ) that have the sign of their sum", keep_largest, elect),
        "dare": Elementwise("Σ wᵢ·drop(Δᵢ)/density", drop_random, add),
        "dare-ties": Elementwise("mean of the wᵢ·drop(Δᵢ)/density that have the sign of their sum", drop_random, elect),
    }
)


def pair_shares(method: Linear, weights: Sequence[float], terms: Sequence[Term]) -> list[Share]:
    """Return each target of the terms with its factor under a linear method."""
    return [(term.target, share) for term, share in zip(terms, method.weigh(weights, terms), strict=True)]
