"""LoRA: W + s·B·A (Hu et al., arXiv 2106.09685).

    linear      A (rank, in)             B (out, rank)           W (out, in)
    conv        A (rank, in, *kernel)    B (out, rank, 1 ...)    W (out, in, *kernel)
    embedding   A (rank, vocabulary)     B (dim, rank)           W (vocabulary, dim): the change is (B·A)ᵀ

An embedding is thus a linear map with `in` = vocabulary and `out` = dim, stored transposed.

Beside the factors there may be a bias of B, which adds s·b to the module's bias (PEFT's `lora_bias`), and a weight or a
bias of the base that was saved as a whole: it replaces the base's before the change is added (PEFT's resized embeddings
and trained biases).
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor, SlotKind, Target
from loraformat.kinds import FLOATS, Change, Delta, Nature, RoleSet, check_roles, refuse_options
from loraformat.kinds._factored import BASE_BIAS, MATRICES
from loraformat.kinds._matrices import LowRankDelta, Values
from loraformat.problems import Problem

_BIAS: Final = "lora_B.bias"
_BASE_WEIGHT: Final = "base_layer.weight"
_LINEAR: Final = RoleSet(
    (SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.CONV),
    ("lora_A.weight", "lora_B.weight"),
    (_BIAS, _BASE_WEIGHT, BASE_BIAS),
)
_EMBEDDING: Final = RoleSet((SlotKind.EMBEDDING,), ("lora_embedding_A", "lora_embedding_B"), (_BASE_WEIGHT,))
_DOWN: Final = ("lora_A.weight", "lora_embedding_A")
_UP: Final = ("lora_B.weight", "lora_embedding_B")
_CONV_AXES: Final = (3, 4, 5)


class Lora:
    """The kind `lora`."""

    name = "lora"
    nature = Nature.ADDITIVE
    formula = "W + s·B·A"
    source = "arXiv 2106.09685"
    role_sets = (_LINEAR, _EMBEDDING)

    def check(self, target: Target) -> list[Problem]:
        """Return problems of slot, roles, partners, number forms, dimensions and rank."""
        problems = [*refuse_options(target), *check_roles(target, self.role_sets)]
        if problems:
            return problems
        down, up = _checked_pair(target.factors)
        problems = [
            Problem("LF210", f"{target.name}: {factor.name}", factor.dtype.name, "a floating-point form")
            for factor in target.factors.values()
            if factor.dtype.name not in FLOATS
        ]
        problems = problems or _check_shapes(target, down, up)
        grave = any(problem.severity == "error" for problem in problems)
        return problems if grave else [*problems, *_check_beside(target, down, up)]

    def rank(self, factors: Mapping[str, Factor]) -> int:
        """Return the first dimension of A."""
        down, _ = _pair(factors)
        return down.shape[0] if down is not None and down.shape else 0

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return the change of the weight, and what else there is: a base's own values, a change of the bias."""
        shape = self.weight_shape(target)
        own, bias = SlotKind.PARAMETER, shape[:1]
        rows = [
            ("weight", _stored_shape(target, shape), Nature.REPLACEMENT, (_BASE_WEIGHT,), own),
            ("bias", bias, Nature.REPLACEMENT, (BASE_BIAS,), own),
            ("weight", shape, Nature.ADDITIVE, _roles_of(target.factors), target.slot),
            ("bias", bias, Nature.ADDITIVE, (_BIAS,), own),
        ]
        return tuple(Change(*row) for row in rows if all(role in target.factors for role in row[3]))

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in, *kernel)`; for an embedding `(dim, vocabulary)`."""
        down, up = _checked_pair(target.factors)
        return up.shape[0], *down.shape[1:]

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return s·B·A as `(out, in * kernel)`, or s·b as `(out, 1)`; s is folded into B in float64, rounded once."""
        if change.parameter == "bias":
            bias = factors[_BIAS].reshape(-1, 1)
            return Values((bias.astype(np.float64) * scale).astype(bias.dtype))
        down, up = _checked_pair(factors)
        right = down.reshape(down.shape[0], -1)
        left = (up.reshape(up.shape[0], -1).astype(np.float64) * scale).astype(right.dtype)
        return LowRankDelta(np.ascontiguousarray(left), np.ascontiguousarray(right))

    def value(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> Delta:
        """Return the base's own values: the first dimension and the rest."""
        (saved,) = (factors[role] for role in change.roles)
        return Values(np.ascontiguousarray(saved.reshape(saved.shape[0], -1)))

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


def _roles_of(factors: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names that A and B have here."""
    return next(role for role in _DOWN if role in factors), next(role for role in _UP if role in factors)


def _stored_shape(target: Target, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a weight that was saved whole, as PyTorch has it."""
    saved = target.factors.get(_BASE_WEIGHT)
    return saved.shape if saved is not None else shape


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


def _check_beside(target: Target, down: Factor, up: Factor) -> list[Problem]:
    """Return problems of biases and saved weights beside the factors."""
    out, width = up.shape[0], down.shape[1:]
    either = {(out, *width), (*width, out)}  # The base's shape has the last word, when it is replaced.
    own = either if target.slot in MATRICES else {(*width, out) if target.slot is SlotKind.EMBEDDING else (out, *width)}
    expected: dict[str, set[tuple[int, ...]]] = {_BIAS: {(out,)}, BASE_BIAS: {(out,)}, _BASE_WEIGHT: own}
    return [
        Problem("LF203", f"{target.name}: {role}", f"shape {target.factors[role].shape}", " or ".join(map(str, shapes)))
        for role, shapes in expected.items()
        if role in target.factors and target.factors[role].shape not in shapes
    ]


KIND: Final = Lora()
