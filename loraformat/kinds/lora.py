"""LoRA: W + s·B·A (Hu et al., arXiv 2106.09685).

    linear      A (rank, in)             B (out, rank)           W (out, in)
    conv        A (rank, in, *kernel)    B (out, rank, 1 ...)    W (out, in, *kernel)
    embedding   A (rank, vocabulary)     B (dim, rank)           W (vocabulary, dim): the change is (B·A)ᵀ

An embedding is thus a linear map with `in` = vocabulary and `out` = dim, stored transposed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor, SlotKind, Target
from loraformat.kinds import FLOATS, Delta, Nature, RoleSet, check_roles
from loraformat.problems import Problem

_LINEAR: Final = RoleSet(
    (SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.CONV), ("lora_A.weight", "lora_B.weight")
)
_EMBEDDING: Final = RoleSet((SlotKind.EMBEDDING,), ("lora_embedding_A", "lora_embedding_B"))
_DOWN: Final = ("lora_A.weight", "lora_embedding_A")
_UP: Final = ("lora_B.weight", "lora_embedding_B")
_CONV_AXES: Final = (3, 4, 5)


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """The matrix `left @ right`, formed only row by row.

    Attributes:
        left: (rows, rank), the scale folded in.
        right: (rank, columns).
    """

    left: NDArray[Any]
    right: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return self.left.shape[0], self.right.shape[1]

    def transposed(self) -> "LowRankDelta":
        """Return the transposed change."""
        return LowRankDelta(np.ascontiguousarray(self.right.T), np.ascontiguousarray(self.left.T))

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)`."""
        np.matmul(self.left[start:stop], self.right, out=out)


class Lora:
    """The kind `lora`."""

    name = "lora"
    nature = Nature.ADDITIVE
    formula = "W + s·B·A"
    source = "arXiv 2106.09685"
    role_sets = (_LINEAR, _EMBEDDING)

    def check(self, target: Target) -> list[Problem]:
        """Return problems of slot, roles, partners, number forms, dimensions and rank."""
        problems = check_roles(target, self.role_sets)
        if problems:
            return problems
        down, up = _checked_pair(target.factors)
        problems = [
            Problem("LF210", f"{target.name}: {factor.name}", factor.dtype.name, "a floating-point form")
            for factor in (down, up)
            if factor.dtype.name not in FLOATS
        ]
        return problems or _check_shapes(target, down, up)

    def rank(self, factors: Mapping[str, Factor]) -> int:
        """Return the first dimension of A."""
        down, _ = _pair(factors)
        return down.shape[0] if down is not None and down.shape else 0

    def parameters(self, target: Target) -> Mapping[str, tuple[int, ...]]:
        """Return the weight alone."""
        return {"weight": self.weight_shape(target)}

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in, *kernel)`; for an embedding `(dim, vocabulary)`."""
        down, up = _checked_pair(target.factors)
        return up.shape[0], *down.shape[1:]

    def delta(self, target: Target, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return s·B·A as `(out, in * kernel)`; the scale is folded into B in float64, rounded once."""
        down, up = _checked_pair(factors)
        right = down.reshape(down.shape[0], -1)
        left = (up.reshape(up.shape[0], -1).astype(np.float64) * scale).astype(right.dtype)
        return LowRankDelta(np.ascontiguousarray(left), np.ascontiguousarray(right))

    def norm(self, target: Target, factors: Mapping[str, NDArray[Any]]) -> float:
        """Return |s|·‖B·A‖ from the two small Gram matrices: ‖BA‖² = tr((BᵀB)(AAᵀ))."""
        down, up = _checked_pair(factors)
        right = down.reshape(down.shape[0], -1).astype(np.float64)
        left = up.reshape(up.shape[0], -1).astype(np.float64)
        squared = float(np.sum((left.T @ left) * (right @ right.T)))
        return abs(target.scale) * math.sqrt(max(squared, 0.0))


def _pair(factors: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return A and B, whichever names they have here, None for a missing one."""
    down = next((factors[role] for role in _DOWN if role in factors), None)
    up = next((factors[role] for role in _UP if role in factors), None)
    return down, up


def _checked_pair(factors: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return A and B of a target that `check` has found complete."""
    down, up = _pair(factors)
    if down is None or up is None:
        raise ValueError("a factor is missing: check the target first")
    return down, up


def _check_shapes(target: Target, down: Factor, up: Factor) -> list[Problem]:
    where, shapes = target.name, f"A {down.shape}, B {up.shape}"
    if 0 in down.shape[:1] or 0 in up.shape[1:2] or not down.shape or not up.shape:
        return [Problem("LF204", where, shapes, "a rank of at least 1")]
    conv = target.slot is SlotKind.CONV
    if len(down.shape) != len(up.shape) or len(down.shape) not in (_CONV_AXES if conv else (2,)):
        return [Problem("LF203", where, shapes, "A (rank, in, *kernel) and B (out, rank, 1 ...)")]
    if down.shape[0] != up.shape[1]:
        grouped = conv and down.shape[0] % up.shape[1] == 0
        mend = "A LoRA of a grouped convolution changes weights that the kernel does not have." if grouped else ""
        code = "LF209" if grouped else "LF203"
        return [Problem(code, where, shapes, "one rank, the first of A and the second of B", mend)]
    if 0 in down.shape or 0 in up.shape:
        return [Problem("LF203", where, shapes, "sizes of at least 1")]
    if any(size != 1 for size in up.shape[2:]):
        return [Problem("LF203", where, shapes, "B with a kernel of ones")]
    if target.rank != down.shape[0]:
        return [Problem("LF205", where, f"rank {target.rank} stated, {shapes}", f"rank {down.shape[0]}")]
    width = math.prod(down.shape[1:])
    if target.rank > min(up.shape[0], width):
        found = f"rank {target.rank} for a change of {up.shape[0]} by {width}"
        return [Problem("LF206", where, found, severity="warning")]
    return []


KIND: Final = Lora()
