"""Supertuning: numbers at places of the flattened weight, and a LoRA beside them."""

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import SCALES, Arrays, added, draw_factors, draw_sizes, make_target
from laws.kind_laws import Example, KindLaws, main_change
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds.supertuning import KIND

PAIR = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")


@st.composite
def supertuning_examples(draw: st.DrawFn) -> Example:
    (out, inner), number, rank = draw_sizes(draw), draw(st.integers(1, 20)), draw(st.integers(0, 3))
    shapes: dict[str, tuple[int, ...]] = {"supertuning_values": (number,)}
    if rank:
        shapes |= {PAIR[0]: (rank, inner), PAIR[1]: (out, rank)}
    arrays = draw_factors(draw, shapes)
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrays["supertuning_indices"] = dice.integers(0, out * inner, number).astype(np.int32)
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    options = {"lora_scale": 0.7} if rank else {}
    target = make_target("supertuning", SlotKind.LINEAR, arrays, rank, scaling, options)

    def dense(arrays: Arrays) -> np.ndarray:
        flat = np.zeros(out * inner)
        for place, value in zip(arrays["supertuning_indices"], arrays["supertuning_values"], strict=True):
            flat[place] += value
        low_rank = 0.7 * arrays[PAIR[1]] @ arrays[PAIR[0]] if rank else 0
        return flat.reshape(out, inner) + low_rank

    return added(target, dense, terms=32, shape=() if rank else (out, inner))


class TestSupertuning(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return supertuning_examples()

    def needs(self, target: Target) -> list[str]:
        return sorted(target.factors)


@pytest.mark.parametrize("place", [-1, 12])
def test_places_outside_the_weight(place: int) -> None:
    arrays = {"supertuning_values": np.ones(1), "supertuning_indices": np.array([place], np.int32)}
    target = make_target("supertuning", SlotKind.LINEAR, arrays)
    assert [p.code for p in KIND.check_size(target, main_change(KIND, target, shape=(3, 4)))] == ["LF405"]
