"""DoRA of a LoKr: m·(W + Δ) / ‖W + Δ‖, Δ as in `lokr` (LyCORIS with weight_decompose)."""

from typing import Final

from loraformat.kinds._decomposed import Decomposed, decompose
from loraformat.kinds.lokr import KIND as LOKR


class DoraLokr(Decomposed):
    """The kind `dora_lokr`; `kron_axes` as in `lokr`."""

    name = "dora_lokr"
    formula = "m·(W + Δ) / ‖W + Δ‖, Δ = s·(w1 ⊗ w2)"
    source = "LyCORIS 4.1, module lokr with weight_decompose"
    layouts = decompose(LOKR.layouts)
    options = LOKR.options
    inner = LOKR


KIND: Final = DoraLokr()
