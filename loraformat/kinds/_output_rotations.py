"""The rotations of LyCORIS' orthogonal fine-tuning, and what its two kinds have in common."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import REST, UNKNOWN, Nature
from loraformat.kinds._axes import Axes
from loraformat.kinds._factored import FactoredKind, Option, number
from loraformat.problems import Problem

BLOCKS: Final = "oft_blocks"
RESCALE: Final = "rescale"
_EPSILON: Final = 1e-8


class OutputRotation(FactoredKind):
    """A kind that rotates the outputs of a weight in blocks.

    The option `constraint` is what the files call alpha: where it is above 0, the norm of all Q together is brought
    down to constraint · out.
    """

    nature = Nature.FUNCTION_OF_BASE
    options: ClassVar[Mapping[str, Option]] = {"constraint": number(0.0)}
    rank_axis = ""
    is_scaled = False
    is_flat = True

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem when the blocks and what follows them have not the same outputs."""
        out = axes["blocks"] * axes["size"]
        if axes.sizes.get("out", out) == out:
            return []
        found = f"{axes['blocks']} blocks of {axes['size']}, {RESCALE} of {axes['out']}"
        return [Problem("LF203", target.name, found, f"{RESCALE} of {out}")]

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in, *kernel)`, of which the factors tell the first."""
        axes = self.axes(target)
        kernel = (REST,) if target.slot is SlotKind.CONV else ()
        return axes["blocks"] * axes["size"], UNKNOWN, *kernel

    def rotations(self, target: Target, factors: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Return R = (I + Q)·(I − Q)⁻¹ of every block, Q = B − Bᵀ, in the form of the blocks."""
        blocks = factors[BLOCKS].astype(np.float64)
        skew = blocks - blocks.swapaxes(-1, -2)
        limit = self.option(target, "constraint") * self.weight_shape(target)[0]
        length = float(np.linalg.norm(skew)) + _EPSILON
        if 0 < limit < length:
            skew *= limit / length
        one = np.eye(blocks.shape[-1])
        # (I + Q)(I − Q)⁻¹ = ((I − Q)⁻ᵀ (I + Q)ᵀ)ᵀ
        turned = np.linalg.solve((one - skew).swapaxes(-1, -2), (one + skew).swapaxes(-1, -2))
        rotations: NDArray[Any] = np.ascontiguousarray(turned.swapaxes(-1, -2)).astype(factors[BLOCKS].dtype)
        return rotations

    def rescaling(self, factors: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
        """Return what every output is multiplied by in the end, `(out, 1)`, or None."""
        return factors[RESCALE].reshape(-1, 1) if RESCALE in factors else None
