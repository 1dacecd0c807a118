"""GraLoRA: the weight in k·k blocks, each with factors of its own (Jung et al., arXiv 2505.20355).

    gralora_A (k, in / k, rank)    gralora_B (k, rank, out / k)

Block (i, j) of the change is the product of the i-th k-th of the ranks of A[j] and the j-th k-th of those of B[i].
Beside them there may be LoRA factors for the whole, `gralora_A_general.weight` and `gralora_B_general.weight`. The
scale is alpha over both ranks together.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._matrices import scale_product
from loraformat.problems import Problem

_GENERAL: Final = ("gralora_A_general.weight", "gralora_B_general.weight")


class Gralora(FactoredKind):
    """The kind `gralora`."""

    name = "gralora"
    formula = "W + s·(blocks B_ij·A_ij + B·A)"
    source = "arXiv 2505.20355; PEFT GRALORA"
    layouts = (
        Layout(MATRICES, {"gralora_A": "k across inner", "gralora_B": "k inner down"}),
        Layout(
            MATRICES,
            {
                "gralora_A": "k across inner",
                "gralora_B": "k inner down",
                _GENERAL[0]: "hybrid in",
                _GENERAL[1]: "out hybrid",
            },
        ),
    )
    rank_axis = ""

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return problems of ranks that blocks cannot share, and of general factors of another size."""
        if axes["inner"] % axes["k"]:
            return [Problem("LF203", target.name, f"rank {axes['inner']}", f"a multiple of {axes['k']}")]
        whole = axes["k"] * axes["down"], axes["k"] * axes["across"]
        general = axes.sizes.get("out", whole[0]), axes.sizes.get("in", whole[1])
        if general == whole:
            return []
        return [Problem("LF203", target.name, f"general factors for {general}", f"factors for {whole}")]

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in)`."""
        axes = self.axes(target)
        return axes["k"] * axes["down"], axes["k"] * axes["across"]

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`, of rank k·rank plus that of the general factors."""
        down, up = factors["gralora_A"], factors["gralora_B"]
        k, across, rank = down.shape
        share = rank // k
        left = np.zeros((k, up.shape[2], k, k, share), up.dtype)
        right = np.zeros((k, k, share, k, across), down.dtype)
        for i in range(k):  # Of the output's block i: the share that input j has of B[i], and output i of A[j].
            left[i, :, i] = up[i].reshape(k, share, -1).transpose(2, 0, 1)
            for j in range(k):
                right[i, j, :, j] = down[j].reshape(across, k, share)[:, i].T
        columns = [left.reshape(change.shape[0], -1)]
        rows = [right.reshape(-1, change.shape[1])]
        if _GENERAL[0] in factors:
            columns.append(factors[_GENERAL[1]])
            rows.append(factors[_GENERAL[0]])
        return scale_product(np.concatenate(columns, axis=1), np.concatenate(rows), scale)


KIND: Final = Gralora()
