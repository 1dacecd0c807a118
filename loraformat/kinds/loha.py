"""LoHa: the product, number by number, of two low-rank changes (Hyeon-Woo et al., arXiv 2108.06098; LyCORIS).

plain     w_a (out, rank)    w_b (rank, in * kernel)                             w_a·w_b
    Tucker    w_a (rank, out)    w_b (rank, in)    t (rank, rank, *kernel)           Σ t[i, j, k]·w_a[i, o]·w_b[j, c]

PEFT gives the core of a one-dimensional kernel a second axis of size one.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import REST, Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._deltas import HadamardDelta
from loraformat.kinds._factored import MATRICES, FactoredKind, check_width
from loraformat.kinds._matrices import LowRankDelta, scale_product
from loraformat.problems import Problem

_PLAIN: Final = {
    "hada_w1_b": "rank in",
    "hada_w1_a": "out rank",
    "hada_w2_b": "rank in",
    "hada_w2_a": "out rank",
}
_FLAT: Final = {role: axes.replace("in", "columns") for role, axes in _PLAIN.items()}
_TUCKER: Final = {
    "hada_w1_b": "rank in",
    "hada_w1_a": "rank out",
    "hada_t1": "rank rank *kernel",
    "hada_w2_b": "rank in",
    "hada_w2_a": "rank out",
    "hada_t2": "rank rank *kernel",
}


class Loha(FactoredKind):
    """The kind `loha`."""

    name = "loha"
    formula = "W + s·(w1_a·w1_b)∘(w2_a·w2_b)"
    source = "arXiv 2108.06098; PEFT LOHA, LyCORIS"
    layouts = (Layout(MATRICES, _PLAIN), Layout((SlotKind.CONV,), _FLAT), Layout((SlotKind.CONV,), _TUCKER))

    is_flat = True

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in)`; of a kernel only the number of its elements is known."""
        out, inner, *kernel = super().weight_shape(target)
        return (out, inner, REST) if kernel else (out, inner)

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of a weight with other columns than the factors."""
        axes = self.axes(target)
        width = axes.sizes.get("columns") or axes["in"] * math.prod(axes.kernel or ())
        return check_width(target, change, width)

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the product of both changes as `(out, in * kernel)`."""
        return HadamardDelta(_multiply(factors, "1", scale), _multiply(factors, "2", 1.0))

    def norm(self, target: Target, factors: Mapping[str, NDArray[Any]]) -> float:
        """Return |s|·‖(AB)∘(CD)‖ from Gram matrices of the pairs of ranks, without forming the change."""
        one, other = _multiply(factors, "1", 1.0), _multiply(factors, "2", 1.0)
        left = np.einsum("oi,oj->oij", one.left, other.left).reshape(len(one.left), -1)
        right = np.einsum("ic,jc->ijc", one.right, other.right).reshape(-1, one.right.shape[1])
        squared = float(np.sum((left.T @ left) * (right @ right.T)))
        return abs(target.scale) * math.sqrt(max(squared, 0.0))


def _multiply(factors: Mapping[str, NDArray[Any]], which: str, scale: float) -> LowRankDelta:
    """Return one of the two changes, a core worked into its right factor."""
    left, right = factors[f"hada_w{which}_a"], factors[f"hada_w{which}_b"]
    core = factors.get(f"hada_t{which}")
    if core is None:
        return scale_product(left, right, scale)
    return scale_product(left.T, np.einsum("ij...,jc->ic...", core, right), scale)


KIND: Final = Loha()
