"""DoRA of a LoHa: m·(W + Δ) / ‖W + Δ‖, Δ as in `loha` (LyCORIS with weight_decompose)."""

from typing import Final

from loraformat.kinds._decomposed import Decomposed, decompose
from loraformat.kinds.loha import KIND as LOHA


class DoraLoha(Decomposed):
    """The kind `dora_loha`."""

    name = "dora_loha"
    formula = "m·(W + Δ) / ‖W + Δ‖, Δ = s·(w1_a·w1_b)∘(w2_a·w2_b)"
    source = "LyCORIS 4.1, module loha with weight_decompose"
    layouts = decompose(LOHA.layouts)
    inner = LOHA


KIND: Final = DoraLoha()
