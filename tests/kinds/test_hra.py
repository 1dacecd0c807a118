"""HRA against a product of reflections, one matrix each."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kind_examples import MATRICES, draw_factors, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import SlotKind
from loraformat.kinds.hra import KIND


@st.composite
def hra_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([*MATRICES, SlotKind.CONV]))
    kernel = (2, 3) if slot is SlotKind.CONV else ()
    inner = draw(st.integers(2, 4))
    width, orthogonal = inner * int(np.prod(kernel)), draw(st.booleans())
    rank = draw(st.integers(1, min(4, width)))
    out = draw(st.integers(1, 9).filter(lambda n: n not in (inner, width)))
    target = make_target(
        "hra", slot, draw_factors(draw, {"hra_u": (width, rank)}), rank, options={"apply_GS": orthogonal}
    )

    def formula(arrays: Any, base: Any) -> Any:
        vectors = arrays["hra_u"]
        if orthogonal:
            vectors = np.linalg.qr(vectors)[0]  # Of the same span step by step, whatever the signs.
        turned = base
        for vector in vectors.T:
            unit = vector / np.sqrt(vector @ vector)
            turned = turned @ (np.eye(width) - 2 * np.outer(unit, unit))
        return turned

    return mapped(draw, target, (out, inner, *kernel), formula, slack=3e-3)


class TestHra(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return hra_examples()
