"""LoKr: the Kronecker product of two small matrices, each whole or a product (LyCORIS, arXiv 2309.14859).

    w1   (a, b), or w1_a (a, rank)·w1_b (rank, b)
    w2   (c, d, *kernel), or w2_a (c, rank)·w2_b (rank, d * kernel), or with a core t2 (rank, rank, *kernel)
         w2_a (rank, c), w2_b (rank, d): Σ t2[i, j, k]·w2_a[i, o]·w2_b[j, c]

The weight is (a·c, b·d, *kernel). PEFT multiplies the three axes of a one-dimensional kernel as if w1 had one before
its two, and then counts the result anew as (out, in, kernel): an adapter trained so says `kron_axes` "leading".
"""

import math
from collections.abc import Mapping
from itertools import product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import REST, UNKNOWN, Change, Delta
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._deltas import KroneckerDelta
from loraformat.kinds._factored import MATRICES, FactoredKind, check_width, name_options, one_of
from loraformat.kinds._matrices import Values
from loraformat.problems import Problem

_LEFT: Final = ({"lokr_w1": "a b"}, {"lokr_w1_b": "rank b", "lokr_w1_a": "a rank"})
_RIGHT: Final = ({"lokr_w2": "c d"}, {"lokr_w2_b": "rank d", "lokr_w2_a": "c rank"})
_RIGHT_CONV: Final = (
    {"lokr_w2": "c d *kernel"},
    {"lokr_w2_b": "rank columns", "lokr_w2_a": "c rank"},
    {"lokr_w2_b": "rank d", "lokr_w2_a": "rank c", "lokr_t2": "rank rank *kernel"},
)


class Lokr(FactoredKind):
    """The kind `lokr`; the option `kron_axes` is `trailing`, or `leading` as PEFT has it for Conv1d."""

    name = "lokr"
    formula = "W + s·(w1 ⊗ w2)"
    source = "arXiv 2309.14859; PEFT LOKR, LyCORIS"
    layouts = (
        *(Layout(MATRICES, {**left, **right}) for left, right in product(_LEFT, _RIGHT)),
        *(Layout((SlotKind.CONV,), {**left, **right}) for left, right in product(_LEFT, _RIGHT_CONV)),
    )
    is_flat = True
    options = name_options(kron_axes=one_of("trailing", "leading"))

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of axes that are counted in PEFT's way where there is none."""
        whole = target.factors.get("lokr_w2")
        if self.option(target, "kron_axes") == "trailing" or (whole is not None and len(whole.shape) == 3):
            return []
        found = "kron_axes 'leading' without a lokr_w2 of three axes"
        return [Problem("LF230", f"{target.name}: options", found, "kron_axes 'trailing'")]

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in)`; of a kernel only the number of its elements is known."""
        axes = self.axes(target)
        inner = axes["b"] * axes["d"] if "d" in axes.sizes else UNKNOWN
        return (axes["a"] * axes["c"], inner, *((REST,) if target.slot is SlotKind.CONV else ()))

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of a weight with other columns than the factors."""
        axes = self.axes(target)
        return check_width(target, change, axes["b"] * _count_columns(axes))

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the Kronecker product as `(out, in * kernel)`."""
        left = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
        right = _multiply_right(factors)
        scaled = (left.astype(np.float64) * scale).astype(left.dtype)
        if self.option(target, "kron_axes") == "leading":
            return Values(np.kron(scaled, right).reshape(len(left) * len(right), -1))
        return KroneckerDelta(np.ascontiguousarray(scaled), np.ascontiguousarray(right.reshape(len(right), -1)))

    def norm(self, target: Target, factors: Mapping[str, NDArray[Any]]) -> float:
        """Return |s|·‖w1‖·‖w2‖, which is the norm of a Kronecker product."""
        left = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
        return abs(target.scale) * float(np.linalg.norm(left)) * float(np.linalg.norm(_multiply_right(factors)))


def _count_columns(axes: Axes) -> int:
    """Return the columns of w2 as a matrix."""
    return axes.sizes.get("columns") or axes["d"] * math.prod(axes.kernel or ())


def _multiply_right(factors: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return w2 `(c, d, *kernel)`, or `(c, d * kernel)`."""
    if "lokr_w2" in factors:
        return factors["lokr_w2"]
    left, right = factors["lokr_w2_a"], factors["lokr_w2_b"]
    if "lokr_t2" in factors:
        return np.asarray(np.einsum("ij...,io,jc->oc...", factors["lokr_t2"], left, right))
    return np.asarray(left @ right)


KIND: Final = Lokr()
