"""The change of every module, computed in float64 from the source and from what was written, and compared.

Equal factors under an equal scale make equal changes; all others are multiplied out, some rows at a time. The formulas
are written out here once more, apart from those of the kinds: a proof must not share its mistakes with what it proves.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target

_ROWS: Final = 1024
Numbers = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far source and output are apart in one module.

    Attributes:
        target: the module.
        largest: largest absolute difference of its change.
        relative: the same, by the largest number of the change.
    """

    target: str
    largest: float
    relative: float


@dataclass(frozen=True, slots=True)
class Proof:
    """The outcome.

    Attributes:
        modules: how many were compared.
        differences: those that differ at all, the worst first.
        missing: modules that one side has alone.
    """

    modules: int
    differences: tuple[Difference, ...]
    missing: tuple[str, ...]

    @property
    def relative(self) -> float:
        """The largest relative difference."""
        return max((each.relative for each in self.differences), default=0.0)

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        worst = self.differences[0] if self.differences else None
        return {
            "modules": self.modules,
            "differing": len(self.differences),
            "largest_relative": self.relative,
            "worst": worst.target if worst else None,
            "missing": list(self.missing),
        }


def prove(source: Sequence[Target], output: Sequence[Target]) -> Proof:
    """Compare the changes of two lists of targets under the same names."""
    left, right = ({target.name: target for target in targets} for targets in (source, output))
    differences = []
    for name in sorted(set(left) & set(right)):
        largest, size = _compare(left[name], right[name])
        if largest:
            differences.append(Difference(name, largest, largest / size if size else math.inf))
    ordered = sorted(differences, key=lambda each: -each.relative)
    sides = ((left, right), (right, left))
    alone = (target for one, other in sides for name, target in one.items() if name not in other)
    lacking = sorted(target.name for target in alone if _acts(target))
    return Proof(len(set(left) & set(right)), tuple(ordered), tuple(lacking))


def _acts(target: Target) -> bool:
    """Say whether a target changes anything: a part that was not trained has rows of zeros, or is left out."""
    return any(size for _, piece in _pieces(target) for size in [float(np.max(np.abs(piece), initial=0.0))])


def _compare(one: Target, other: Target) -> tuple[float, float]:
    """Return the largest difference, and the largest number; infinite where the two have not the same form."""
    if _is_same(one, other):
        return 0.0, 0.0
    if _options_of(one) != _options_of(other):
        return math.inf, 1.0
    largest = size = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for (label, left), (again, right) in zip(_pieces(one), _pieces(other), strict=False):
            if label != again or left.shape != right.shape:
                return math.inf, 1.0
            size = max(size, float(np.max(np.abs(left), initial=0.0, where=np.isfinite(left))))
            largest = max(largest, _measure(left, right))
    return largest, size


def _options_of(target: Target) -> dict[str, Any]:
    """Return the options but those that say which rows have factors: that is seen in the change."""
    return {name: value for name, value in target.options.items() if name not in _OF_SLICES}


def _measure(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Return the largest difference; NaN is equal to NaN, and an infinity to itself, and to nothing else."""
    gap = np.abs(left - right)
    odd = ~np.isfinite(gap)
    if odd.any() and not np.array_equal(left[odd], right[odd], equal_nan=True):
        return math.inf
    return float(np.max(gap, initial=0.0, where=~odd))


def _is_same(one: Target, other: Target) -> bool:
    """Say whether two targets have the same scale and factors, bit by bit: then nothing has to be multiplied out."""
    if (one.scale, one.options) != (other.scale, other.options) or set(one.factors) != set(other.factors):
        return False
    pairs = [(factor, other.factors[role]) for role, factor in one.factors.items()]
    if any((left.dtype, left.shape) != (right.dtype, right.shape) for left, right in pairs):
        return False
    return all(left.read().tobytes() == right.read().tobytes() for left, right in pairs)


def _pieces(target: Target) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield the change piece by piece, each with a label; numbers that are no change are pieces of their own."""
    factors = {role: factor.read().astype(np.float64) for role, factor in target.factors.items()}
    rest = dict(factors)
    for needed, rows in _FORMULAS:
        if all(role in factors for role in needed):
            yield from rows(target, factors)
            for role in (*needed, *_OPTIONAL):
                rest.pop(role, None)
    if "lora_B.bias" in factors:
        yield "bias", factors["lora_B.bias"] * target.scale
    if set(rest) - _MAGNITUDES:
        yield "scale", np.array([target.scale])
    for role in sorted(rest):
        yield role, rest[role]


def _low_rank(target: Target, factors: Numbers) -> Iterator[tuple[str, NDArray[np.float64]]]:
    down, up = factors["lora_A.weight"], factors["lora_B.weight"]
    middle = factors.get("lora_mid.weight")
    if middle is not None:
        down = np.einsum("rs...,si->ri...", middle, down.reshape(down.shape[0], -1))
    right, left = down.reshape(down.shape[0], -1), up.reshape(up.shape[0], -1)
    if "enable_lora" in target.options:
        left = _spread(target, left)
    for start in range(0, left.shape[0], _ROWS):
        yield "weight", target.scale * (left[start : start + _ROWS] @ right)


def _spread(target: Target, up: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return B `(out, slices * rank)` of one that has the rows of the adapted slices alone."""
    options: Mapping[str, Any] = target.options
    enabled, groups, rank = options["enable_lora"], options.get("groups", 1), up.shape[1]
    sizes = options.get("sizes") or [len(up) // sum(enabled)] * len(enabled)
    slice_of_row = np.tile(np.repeat(np.arange(len(sizes)), [size // groups for size in sizes]), groups)
    wide = np.zeros((len(slice_of_row), sum(enabled) * rank))
    first = column = 0
    for number, size in enumerate(sizes):
        if enabled[number]:
            wide[slice_of_row == number, column : column + rank] = up[first : first + size]
            first, column = first + size, column + rank
    return wide


def _embedding(target: Target, factors: Numbers) -> Iterator[tuple[str, NDArray[np.float64]]]:
    right, left = factors["lora_embedding_A"], factors["lora_embedding_B"]
    for start in range(0, left.shape[0], _ROWS):
        yield "weight", target.scale * (left[start : start + _ROWS] @ right)


def _hadamard(target: Target, factors: Numbers) -> Iterator[tuple[str, NDArray[np.float64]]]:
    if "hada_t1" in factors:
        return
    for start in range(0, factors["hada_w1_a"].shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        first = factors["hada_w1_a"][rows] @ factors["hada_w1_b"]
        yield "weight", target.scale * first * (factors["hada_w2_a"][rows] @ factors["hada_w2_b"])


_FORMULAS: Final[tuple[tuple[tuple[str, ...], Callable[..., Iterator[tuple[str, NDArray[np.float64]]]]], ...]] = (
    (("lora_A.weight", "lora_B.weight"), _low_rank),
    (("lora_embedding_A", "lora_embedding_B"), _embedding),
    (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _hadamard),
)
_MAGNITUDES: Final = frozenset({"lora_magnitude_vector", "dora_scale", "m"})
"""Roles of DoRA, which no scale multiplies."""
_OF_SLICES: Final = frozenset({"enable_lora", "sizes", "groups"})
_OPTIONAL: Final = ("lora_mid.weight", "lora_B.bias")
