"""VeRA: random factors that all targets share, and two vectors that are trained (Kopiczko et al., arXiv 2310.11454).

Of `vera_A` (rank, widest) and `vera_B` (tallest, rank) a target takes as many columns and rows as it has, the first.
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


class Vera(FactoredKind):
    """The kind `vera`."""

    name = "vera"
    formula = "W + (λ_b∘B)·(λ_d∘A)"
    source = "arXiv 2310.11454; PEFT VERA"
    layouts = (
        Layout(
            MATRICES,
            {
                "vera_lambda_b": "out",
                "vera_lambda_d": "rank",
                "vera_A": "rank widest",
                "vera_B": "tallest rank",
            },
        ),
    )

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of shared factors that are too small."""
        return check_shared(target, axes)

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of a weight that is wider than the shared factors."""
        return check_shared_width(target, change, self.axes(target))

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        out, inner = change.shape
        up = factors["vera_B"][:out] * factors["vera_lambda_b"][:, None]
        down = factors["vera_A"][:, :inner] * factors["vera_lambda_d"][:, None]
        return scale_product(up, down, scale)


KIND: Final = Vera()
