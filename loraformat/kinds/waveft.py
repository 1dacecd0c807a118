"""WaveFT without a wavelet: some numbers of the change are trained, at places that a seed tells (arXiv 2505.12532).

    waveft_spectrum (n): the numbers at the first n places of a permutation of all out·in

With `use_idwt`, PEFT's default, they are wavelet coefficients: not supported.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._deltas import sort_sparse
from loraformat.kinds._factored import MATRICES, FactoredKind, Option, count, name_options
from loraformat.kinds._torch_random import check_places, draw_permutation
from loraformat.problems import Problem


class Waveft(FactoredKind):
    """The kind `waveft`."""

    name = "waveft"
    formula = "W + s·S, S zero but for n numbers"
    source = "arXiv 2505.12532; PEFT WAVEFT with use_idwt=False"
    layouts = (Layout(MATRICES, {"waveft_spectrum": "n"}),)
    options = name_options(
        random_loc_seed=count(least=0),
        use_idwt=Option(lambda value: value is False, "false: wavelets are not supported"),
    )
    rank_axis = ""

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of more numbers than the weight has."""
        return check_places(target, change, self.axes(target)["n"])

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        spectrum = factors["waveft_spectrum"]
        values = (spectrum.astype(np.float64) * scale).astype(spectrum.dtype)
        out, inner = change.shape
        places = draw_permutation(out * inner, len(values), int(self.option(target, "random_loc_seed")))
        rows, columns = np.divmod(places, inner)
        return sort_sparse((out, inner), rows, columns, values)


KIND: Final = Waveft()
