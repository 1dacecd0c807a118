"""FourierFT: some Fourier coefficients of the change are trained, at places that a seed tells (arXiv 2405.03003).

`fourierft_spectrum` (n) are the coefficients at the first n places of a permutation of all out·in, row by row.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._deltas import SpectralDelta
from loraformat.kinds._factored import MATRICES, FactoredKind, count, name_options
from loraformat.kinds._torch_random import check_places, draw_permutation
from loraformat.problems import Problem


class Fourierft(FactoredKind):
    """The kind `fourierft`."""

    name = "fourierft"
    formula = "W + s·Re(ifft2(S))"
    source = "arXiv 2405.03003; PEFT FOURIERFT"
    layouts = (Layout(MATRICES, {"fourierft_spectrum": "n"}),)
    options = name_options(random_loc_seed=count(least=0))
    rank_axis = ""

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of more coefficients than the weight has numbers."""
        return check_places(target, change, self.axes(target)["n"])

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        spectrum = factors["fourierft_spectrum"].astype(np.float64) * scale
        out, inner = change.shape
        places = draw_permutation(out * inner, len(spectrum), int(self.option(target, "random_loc_seed")))
        rows, columns = np.divmod(places, inner)
        order = np.argsort(columns, kind="stable")
        return SpectralDelta((out, inner), rows[order], columns[order], spectrum[order])


KIND: Final = Fourierft()
