"""VeRA: random factors that all targets share, and two vectors that are trained (Kopiczko et al., arXiv 2310.11454).

Of `vera_A` (rank, widest) and `vera_B` (tallest, rank) a target takes as many columns and rows as it has, the first.
Where they were not saved (PEFT: `save_projection=False`) they are drawn again from the seed, A before B.
"""

from collections.abc import Mapping
from typing import Any, Final

from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES
from loraformat.kinds._matrices import scale_product
from loraformat.kinds._shared_factors import SharedFactors

_VECTORS: Final = {"vera_lambda_b": "out", "vera_lambda_d": "rank"}


class Vera(SharedFactors):
    """The kind `vera`."""

    name = "vera"
    formula = "W + (λ_b∘B)·(λ_d∘A)"
    source = "arXiv 2310.11454; PEFT VERA"
    layouts = (
        Layout(MATRICES, {**_VECTORS, "vera_A": "rank widest", "vera_B": "tallest rank"}),
        Layout(MATRICES, _VECTORS),
    )
    down, up = "vera_A", "vera_B"

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        out, inner = change.shape
        shared_down, shared_up = self.share(target, change, factors)
        up = shared_up[:out] * factors["vera_lambda_b"][:, None]
        down = shared_down[:, :inner] * factors["vera_lambda_d"][:, None]
        return scale_product(up, down, scale)


KIND: Final = Vera()
