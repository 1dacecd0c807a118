"""VB-LoRA: factors put together from a bank of vectors that all targets share (Li et al., arXiv 2405.15179).

    vblora_vector_bank (vectors, b)
    vblora_logits_A (rank, in / b, vectors)    vblora_logits_B (out / b, rank, vectors)

Each stretch of b numbers is the mean of the `topk` vectors with the largest logits, weighted by their softmax. Where
only these were saved, `..._topk_indices` (…, topk) and `..._topk_weights` (…, topk − 1) say which and how much; the
last weight is what is left to 1.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import MATRICES, FactoredKind, count, name_options
from loraformat.kinds._matrices import scale_product
from loraformat.problems import Problem

_BANK: Final = "vblora_vector_bank"
_INDICES: Final = frozenset({"vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"})


class Vblora(FactoredKind):
    """The kind `vblora`."""

    name = "vblora"
    formula = "W + B·A, both from weighted vectors of the bank"
    source = "arXiv 2405.15179; PEFT VBLORA"
    layouts = (
        Layout(
            MATRICES,
            {
                _BANK: "vectors size",
                "vblora_logits_A": "rank across vectors",
                "vblora_logits_B": "down rank vectors",
            },
        ),
        Layout(
            MATRICES,
            {
                _BANK: "vectors size",
                "vblora_logits_A_topk_indices": "rank across top",
                "vblora_logits_A_topk_weights": "rank across less",
                "vblora_logits_B_topk_indices": "down rank top",
                "vblora_logits_B_topk_weights": "down rank less",
            },
            whole=_INDICES,
        ),
    )
    options = name_options(topk=count())

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of weights that are not one fewer than the indices."""
        top = int(self.option(target, "topk"))
        if axes.sizes.get("top", top) != top or axes.sizes.get("less", top - 1) != top - 1 or top > axes["vectors"]:
            found = f"topk {top} of {axes['vectors']} vectors"
            return [Problem("LF203", target.name, found, "as many indices, and one weight fewer")]
        return []

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in)`."""
        axes = self.axes(target)
        return axes["down"] * axes["size"], axes["across"] * axes["size"]

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        top = int(self.option(target, "topk"))
        down, up = (_mix(factors, f"vblora_logits_{which}", top) for which in "AB")
        right = down.reshape(len(down), -1)
        left = up.transpose(0, 2, 1).reshape(-1, up.shape[1])
        return scale_product(left, right, scale)


def _mix(factors: Mapping[str, NDArray[Any]], role: str, top: int) -> NDArray[Any]:
    """Return the weighted vectors `(first, second, b)`."""
    bank = factors[_BANK]
    if f"{role}_topk_indices" in factors:
        places = factors[f"{role}_topk_indices"].astype(np.intp)
        stored = factors[f"{role}_topk_weights"].astype(np.float64)
        weights = np.concatenate([stored, 1 - stored.sum(axis=-1, keepdims=True)], axis=-1)
    else:
        logits = factors[role].astype(np.float64)
        places = np.argsort(-logits, axis=-1, kind="stable")[..., :top]
        chosen = np.take_along_axis(logits, places, axis=-1)
        weights = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
    return np.asarray(np.einsum("...k,...kb->...b", weights, bank[places]), bank.dtype)


KIND: Final = Vblora()
