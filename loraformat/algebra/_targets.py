"""Targets as matrices: the factors of a LoRA whatever its slot, made-up factors, and what can be said of kinds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.algebra._lowrank import Truncated
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.errors import refuse
from loraformat.frozen_mapping import FrozenMapping
from loraformat.kinds import KINDS, AdditiveKind, Change, Delta, Nature
from loraformat.spans import InputFile

LORA: Final = "lora"
PAIRS: Final = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
"""The roles of A (rank, in, *kernel) and B (out, rank, 1 ...), by slot."""
LORA_SLOTS: Final = frozenset(SlotKind) - {SlotKind.PARAMETER}
BIAS: Final = "lora_B.bias"
"""What a LoRA may add to the module's bias, times the scale: (out,)."""
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
    """Return the roles of A and B where the target is a LoRA of these, and at most a bias; else None."""
    if target.kind != LORA:
        return None
    return next((pair for pair in PAIRS if set(pair) == set(target.factors) - {BIAS}), None)


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
    """Return how a target composes with others; None for a kind that this version lacks.

    One that brings values of the base's own beside a change that is added composes as a function of the base does.
    """
    kind = KINDS.find(target.kind)
    if kind is None:
        return None
    if kind.nature is Nature.FUNCTION_OF_BASE or any(problem.severity == "error" for problem in kind.check(target)):
        return kind.nature
    natures = {change.nature for change in kind.changes(target)}
    return natures.pop() if len(natures) == 1 else Nature.FUNCTION_OF_BASE


def list_changes(target: Target) -> tuple[Change, ...]:
    """Return what a target of a known kind changes."""
    return cast(AdditiveKind, KINDS.find(target.kind)).changes(target)


def weight_change(target: Target) -> Change:
    """Return the change of the weight, of canonical shape `(out, in, *kernel)`; the first one where there is none."""
    changes = list_changes(target)
    return next((change for change in changes if change.parameter == "weight"), changes[0])


def is_weight_alone(target: Target) -> bool:
    """Say whether an additive target changes a weight that a LoRA could change, and nothing beside it."""
    alone = [change.parameter for change in list_changes(target)] == ["weight"]
    return alone and tells_size(target) and target.slot in LORA_SLOTS


def tells_size(target: Target) -> bool:
    """Say whether a target tells the sizes of what it changes; of others only the base's weights do."""
    return all(size > 0 for change in list_changes(target) for size in change.shape)


def open_delta(target: Target, change: Change | None = None) -> Delta:
    """Return an additive change, the weight's if not given, as a matrix `(out, in * kernel)` in float32, scaled."""
    wanted = change or weight_change(target)
    factors: Mapping[str, NDArray[Any]] = {role: _read_wide(target.factors[role]) for role in wanted.roles}
    return cast(AdditiveKind, KINDS.find(target.kind)).delta(target, wanted, factors, target.scale)


def _read_wide(factor: Factor) -> NDArray[Any]:
    """Return numbers as float32, whole ones (indices) as they are."""
    values = factor.read()
    return values.astype(np.float32, copy=False) if factor.dtype.family == "float" else values


def rescale(target: Target, weight: float) -> Target:
    """Return the target with `weight` times its effect: its alpha or multiplier changes, its factors do not."""
    return replace(target, scaling=Scaling(target.scaling.rule, target.scaling.value * weight))


def with_factors(target: Target, truncated: Truncated, form: Dtype, bias: Factor | None = None) -> Target:
    """Return a LoRA of a cut change, rounded once to `form`, alpha equal to the rank, for the slot of `target`."""
    shape, rank = weight_change(target).shape, truncated.rank
    roles = PAIRS[target.slot is SlotKind.EMBEDDING]
    shapes = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
    sources = list(target.factors.values())
    factors: dict[str, Factor] = {}
    for role, matrix, size in zip(roles, (truncated.down, truncated.up), shapes, strict=True):
        array = round_once(np.ascontiguousarray(matrix).reshape(size), form, f"{target.name}.{role}")
        factors[role] = hold(f"{target.name}.{role}", array, sources)
    return replace(
        target,
        kind=LORA,
        factors=FrozenMapping(factors | ({} if bias is None else {BIAS: bias})),
        rank=rank,
        scaling=Scaling(ScalingRule.ALPHA_OVER_RANK, float(rank)),
        options=FrozenMapping(),
    )
