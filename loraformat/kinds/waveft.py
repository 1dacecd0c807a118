"""WaveFT: some wavelet coefficients of the change are trained, at places that a seed tells (arXiv 2505.12532).

    waveft_spectrum (n): the numbers at the first n places of a permutation of all out·in

With `use_idwt`, PEFT's default, they are coefficients of one step of a wavelet transform of the family
`wavelet_family`; otherwise they are numbers of the change itself.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._deltas import sort_sparse
from loraformat.kinds._factored import MATRICES, FactoredKind, count, flag, name_options, one_of
from loraformat.kinds._torch_random import check_places, draw_permutation
from loraformat.kinds._wavelets import WAVELETS, make_filters, place_waves
from loraformat.problems import Problem


class Waveft(FactoredKind):
    """The kind `waveft`."""

    name = "waveft"
    formula = "W + s·idwt(S), S zero but for n numbers"
    source = "arXiv 2505.12532; PEFT WAVEFT"
    layouts = (Layout(MATRICES, {"waveft_spectrum": "n"}),)
    options = name_options(
        random_loc_seed=count(least=0),
        use_idwt=flag(),
        wavelet_family=one_of(*WAVELETS),
    )
    rank_axis = ""

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of more numbers than the weight has."""
        return check_places(target, change, self.axes(target)["n"])

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`."""
        spectrum = factors["waveft_spectrum"]
        values = spectrum.astype(np.float64) * scale
        out, inner = change.shape
        places = draw_permutation(out * inner, len(values), int(self.option(target, "random_loc_seed")))
        rows, columns = np.divmod(places, inner)
        if not self.option(target, "use_idwt"):
            return sort_sparse((out, inner), rows, columns, values.astype(spectrum.dtype))
        filters = make_filters(self.option(target, "wavelet_family"))
        return place_waves((out, inner), (rows, columns), values, filters)


KIND: Final = Waveft()
