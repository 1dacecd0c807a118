"""PVeRA: VeRA whose middle is drawn in training, from a mean and a variance; merged, it is the mean.

Of `pvera_A` (2·rank, widest) and `pvera_lambda_d` (2·rank) the first half makes the mean, the second the variance.
"""

from collections.abc import Mapping
from typing import Any, Final

from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._matrices import scale_product
from loraformat.kinds._shared_factors import check_shared, check_shared_width
from loraformat.problems import Problem


class Pvera(FactoredKind):
    """The kind `pvera`."""

    name = "pvera"
    formula = "W + (λ_b∘B)·(λ_d∘A) with the first halves of λ_d and A"
    source = "PEFT PVERA"
    layouts = (
        Layout(
            MATRICES,
            {
                "pvera_lambda_b": "out",
                "pvera_B": "tallest rank",
                "pvera_lambda_d": "both",
                "pvera_A": "both widest",
            },
        ),
    )

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of halves that are none, and of shared factors that are too small."""
        if axes["both"] != 2 * axes["rank"]:
            found = f"pvera_A {target.factors['pvera_A'].shape}, pvera_B {target.factors['pvera_B'].shape}"
            return [Problem("LF203", target.name, found, f"{2 * axes['rank']} rows in pvera_A, twice the rank")]
        return check_shared(target, axes)

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of a weight that is wider than the shared factors."""
        return check_shared_width(target, change, self.axes(target))

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        out, inner = change.shape
        rank = factors["pvera_B"].shape[1]
        up = factors["pvera_B"][:out] * factors["pvera_lambda_b"][:, None]
        down = factors["pvera_A"][:rank, :inner] * factors["pvera_lambda_d"][:rank, None]
        return scale_product(up, down, scale)


KIND: Final = Pvera()
