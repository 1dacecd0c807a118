"""Adapters for the tests of the algebra, and what they do, in float64 from the formula of the paper."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders import Factors, MemoryFactor
from graphs import make_adapter, make_target
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target

Dense = NDArray[np.float64]
SHAPES = {SlotKind.LINEAR: (7, 5), SlotKind.LINEAR_TRANSPOSED: (4, 9), SlotKind.EMBEDDING: (6, 11)}
KERNEL = (3, 2)


def factors(
    rng: np.random.Generator, out: int, inner: int, rank: int, *kernel: int, dtype: Any = np.float32
) -> Factors:
    """Return A `(rank, inner, *kernel)` and B `(out, rank, 1 ...)`."""
    down = rng.standard_normal((rank, inner, *kernel)).astype(dtype)
    return down, rng.standard_normal((out, rank, *(1 for _ in kernel))).astype(dtype)


def every_slot(rng: np.random.Generator, rank: int, scale: float, **fields: Any) -> Adapter:
    """Return an adapter with one target for each slot of a LoRA; names are those of the slots."""
    targets = [
        make_target(slot.value, factors(rng, out, inner, rank), slot, scale) for slot, (out, inner) in SHAPES.items()
    ]
    targets.append(make_target("conv", factors(rng, 5, 4, rank, *KERNEL), SlotKind.CONV, scale))
    return make_adapter(*targets, **fields)


def values(name: str, scale: float = 1.0, **arrays: NDArray[Any]) -> Target:
    """Return a target of values that replace."""
    held = {role: MemoryFactor(f"{name}.{role}", array) for role, array in arrays.items()}
    return Target(name, "replace", SlotKind.PARAMETER, held, 0, Scaling(ScalingRule.MULTIPLIER, scale))


def delta_of(target: Target) -> Dense:
    """Return s·B·A as `(out, in * kernel)`, written from the paper: no code of ours but the records."""
    down, up = (target.factors[role].read().astype(np.float64) for role in sorted(target.factors))
    rank = down.shape[0]
    rules = {
        ScalingRule.MULTIPLIER: 1.0,
        ScalingRule.ALPHA_OVER_RANK: 1 / rank,
        ScalingRule.ALPHA_OVER_SQRT_RANK: rank**-0.5,
    }
    scale = target.scaling.value * rules[target.scaling.rule]
    return scale * (up.reshape(up.shape[0], rank) @ down.reshape(rank, -1))


def deltas_of(adapter: Adapter) -> dict[str, Dense]:
    return {target.name: delta_of(target) for target in adapter.targets}


def weighted(*items: tuple[Adapter, float]) -> dict[str, Dense]:
    """Return Σ wᵢΔᵢ of every target, dense."""
    total: dict[str, Dense] = {}
    for adapter, weight in items:
        for name, delta in deltas_of(adapter).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


def distance(found: Dense, expected: Dense) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
