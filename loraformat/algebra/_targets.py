"""Targets as matrices: the factors of a LoRA whatever its slot, made-up factors, and what can be said of kinds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor, Scaling, ScalingRule, Target
from loraformat.algebra._lowrank import Truncated
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.errors import refuse
from loraformat.kinds import KINDS, AdditiveKind, Delta, Nature
from loraformat.spans import InputFile

LORA: Final = "lora"
PAIRS: Final = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
"""The roles of A (rank, in, *kernel) and B (out, rank, 1 ...), by slot."""
FLOAT32: Final = BY_NAME["float32"]
FLOAT64: Final = BY_NAME["float64"]


@dataclass(frozen=True, slots=True, eq=False)
class MadeFactor:
    """A factor that is computed when it is read.

    Attributes:
        name: where it belongs, for messages.
        dtype: its number form.
        shape: its dimensions.
        make: computes its numbers, in that form and shape.
        files: open files that it is computed from.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]
    files: tuple[InputFile, ...] = ()

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def read(self) -> NDArray[Any]:
        """Return its numbers."""
        return self.make()


def hold(name: str, array: NDArray[Any], sources: Sequence[Factor] = ()) -> MadeFactor:
    """Return a factor of numbers that are in memory."""
    return MadeFactor(name, BY_NAME[array.dtype.name], array.shape, array.copy, files_of(sources))


def round_once(values: NDArray[np.float64], form: Dtype, where: str) -> NDArray[Any]:
    """Return `values` in a number form, rounded once.

    Raises:
        FindingError: LF503 a number that leaves its range.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(form.numpy())
    if not np.isfinite(rounded).all():
        raise refuse("LF503", where, f"a number beyond the range of {form.name}", "smaller scales or weights")
    return rounded


def files_of(factors: Sequence[Factor]) -> tuple[InputFile, ...]:
    """Return the open files that the factors are read from, each once."""
    files = [file for factor in factors for file in getattr(factor, "files", (getattr(factor, "file", None),))]
    return tuple({id(file): file for file in files if file is not None}.values())


def pair_roles(target: Target) -> tuple[str, str] | None:
    """Return the roles of A and B where the target is a LoRA that consists of these two, else None."""
    if target.kind != LORA:
        return None
    return next((pair for pair in PAIRS if set(pair) == set(target.factors)), None)


def pair_of(target: Target) -> tuple[Factor, Factor]:
    """Return A and B of a target that has `pair_roles`."""
    roles = pair_roles(target)
    assert roles is not None, "checked before"
    return target.factors[roles[0]], target.factors[roles[1]]


def read_pair(target: Target) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return B (out, rank), the scale folded in, and A (rank, in * kernel), both float64."""
    down, up = (factor.read().astype(np.float64) for factor in pair_of(target))
    return up.reshape(up.shape[0], -1) * target.scale, down.reshape(down.shape[0], -1)


def nature_of(target: Target) -> Nature | None:
    """Return the nature of the target's kind, None for a kind that this version lacks."""
    kind = KINDS.find(target.kind)
    return kind.nature if kind is not None else None


def shape_of(target: Target) -> tuple[int, ...]:
    """Return the canonical shape `(out, in, *kernel)` of the weight that an additive target changes."""
    return cast(AdditiveKind, KINDS.find(target.kind)).weight_shape(target)


def open_delta(target: Target) -> Delta:
    """Return the change of an additive target as a matrix `(out, in * kernel)` in float32, its scale in it."""
    kind = cast(AdditiveKind, KINDS.find(target.kind))
    factors: Mapping[str, NDArray[Any]] = {
        role: factor.read().astype(np.float32, copy=False) for role, factor in target.factors.items()
    }
    return kind.delta(target, factors, target.scale)


def rescale(target: Target, weight: float) -> Target:
    """Return the target with `weight` times its effect: its alpha or multiplier changes, its factors do not."""
    return replace(target, scaling=Scaling(target.scaling.rule, target.scaling.value * weight))


def with_factors(target: Target, truncated: Truncated) -> Target:
    """Return a LoRA of a cut change in float32, alpha equal to the rank, for the slot of `target`."""
    shape = shape_of(target)
    rank = truncated.rank
    roles = PAIRS[target.slot.value == "embedding"]
    axes = (1,) * (len(shape) - 2)
    down = np.ascontiguousarray(round_once(truncated.down, FLOAT32, target.name)).reshape(rank, *shape[1:])
    up = np.ascontiguousarray(round_once(truncated.up, FLOAT32, target.name)).reshape(shape[0], rank, *axes)
    sources = list(target.factors.values())
    factors = {
        role: hold(f"{target.name}.{role}", array, sources) for role, array in zip(roles, (down, up), strict=True)
    }
    return replace(
        target,
        kind=LORA,
        factors=MappingProxyType(factors),
        rank=rank,
        scaling=Scaling(ScalingRule.ALPHA_OVER_RANK, float(rank)),
    )
