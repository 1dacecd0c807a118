"""Uni-LoRA: a LoRA whose numbers are all taken from one short vector that targets share (Li et al., arXiv 2506.00799).

    unilora_theta_d      (numbers)
    unilora_indices_A    (rank, in)     which number stands in each place of A
    unilora_scales_A     (rank, in)     what it is multiplied by there
    unilora_indices_B    (out, rank)    the same of B
    unilora_scales_B     (out, rank)

PEFT saves indices and scales with `save_indices`; otherwise they follow from the order of the base's modules.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import UNKNOWN, Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind, check_width
from loraformat.kinds._matrices import scale_product
from loraformat.problems import Problem

_VECTOR: Final = "unilora_theta_d"
_INDICES: Final = frozenset({"unilora_indices_A", "unilora_indices_B"})


class Unilora(FactoredKind):
    """The kind `unilora`."""

    name = "unilora"
    formula = "W + s·(t[b]∘q)·(t[a]∘p)"
    source = "arXiv 2506.00799; PEFT UNILORA with save_indices"
    layouts = (
        Layout(
            MATRICES,
            {
                _VECTOR: "numbers",
                "unilora_indices_A": "rank in",
                "unilora_scales_A": "rank in",
                "unilora_indices_B": "out rank",
                "unilora_scales_B": "out rank",
            },
            whole=_INDICES,
        ),
    )

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in)`, the second left to the base: then indices are looked at before anything is computed."""
        return self.axes(target)["out"], UNKNOWN

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return problems of another width, or of indices beyond the vector; reads them."""
        axes = self.axes(target)
        problems = check_width(target, change, axes["in"])
        for role in sorted(_INDICES):
            indices = target.factors[role].read()
            if int(indices.min()) < 0 or int(indices.max()) >= axes["numbers"]:
                found = f"{role} from {indices.min()} to {indices.max()}"
                problems.append(Problem("LF405", target.name, found, f"places in a vector of {axes['numbers']}"))
        return problems

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        vector = factors[_VECTOR]
        down, up = (
            vector[factors[f"unilora_indices_{side}"].astype(np.intp)] * factors[f"unilora_scales_{side}"]
            for side in "AB"
        )
        return scale_product(up, down, scale)


KIND: Final = Unilora()
