"""PVeRA: VeRA whose middle is drawn in training, from a mean and a variance; merged, it is the mean.

Of `pvera_A` (2·rank, widest) and `pvera_lambda_d` (2·rank) the first half makes the mean, the second the variance.
Where they were not saved, `pvera_A` and `pvera_B` are drawn again from the seed, as `vera` has it.
"""

from collections.abc import Mapping
from typing import Any, Final

from numpy.typing import NDArray

from loraformat.adapter import Factor, Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import MATRICES
from loraformat.kinds._matrices import scale_product
from loraformat.kinds._shared_factors import SharedFactors
from loraformat.problems import Problem

_VECTORS: Final = {"pvera_lambda_b": "out", "pvera_lambda_d": "both"}


class Pvera(SharedFactors):
    """The kind `pvera`."""

    name = "pvera"
    formula = "W + (λ_b∘B)·(λ_d∘A) with the first halves of λ_d and A"
    source = "PEFT PVERA"
    layouts = (
        Layout(MATRICES, {**_VECTORS, "pvera_B": "tallest rank", "pvera_A": "both widest"}),
        Layout(MATRICES, _VECTORS),
    )
    down, up = "pvera_A", "pvera_B"

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of halves that are none, and of shared factors that are too small."""
        if axes["both"] != 2 * self.rank(target.factors):
            found = ", ".join(f"{role} {factor.shape}" for role, factor in target.factors.items())
            return [Problem("LF203", target.name, found, "twice the rank in pvera_lambda_d and pvera_A")]
        return super().check_more(target, axes)

    def rank(self, factors: Mapping[str, Factor]) -> int:
        """Return the columns of B, else half of λ_d."""
        halves = factors["pvera_lambda_d"].shape[0] // 2 if "pvera_lambda_d" in factors else 0
        return super().rank(factors) or halves

    def count_ranks(self, target: Target) -> tuple[int, int]:
        """Return the rows of A, a mean and a variance for each column of B, and these columns."""
        return 2 * target.rank, target.rank

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        out, inner = change.shape
        shared_down, shared_up = self.share(target, change, factors)
        up = shared_up[:out] * factors["pvera_lambda_b"][:, None]
        down = shared_down[: target.rank, :inner] * factors["pvera_lambda_d"][: target.rank, None]
        return scale_product(up, down, scale)


KIND: Final = Pvera()
