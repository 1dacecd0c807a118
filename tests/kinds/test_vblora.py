"""VB-LoRA against softmax and sums written out, from logits and from what is saved of them."""

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, SCALES, Arrays, added, draw_factors, make_target
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds.vblora import KIND

BANK = "vblora_vector_bank"


def mix(arrays: Arrays, which: str, top: int) -> np.ndarray:
    role, bank = f"vblora_logits_{which}", arrays[BANK]
    if role in arrays:
        logits = arrays[role]
        places = np.argsort(logits, axis=-1)[..., ::-1][..., :top]
        strengths = np.exp(np.take_along_axis(logits, places, -1))
        strengths = strengths / strengths.sum(-1, keepdims=True)
    else:
        places, stored = arrays[f"{role}_topk_indices"], arrays[f"{role}_topk_weights"]
        strengths = np.concatenate([stored, 1 - stored.sum(-1, keepdims=True)], -1)
    made = np.zeros((*places.shape[:2], bank.shape[1]))
    for i, j, k in np.ndindex(places.shape):
        made[i, j] += strengths[i, j, k] * bank[places[i, j, k]]
    return made


@st.composite
def vblora_examples(draw: st.DrawFn) -> Example:
    across, down = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda n: n[0] != n[1]))
    size, rank, vectors, top = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 6)), 2
    shapes: dict[str, tuple[int, ...]] = {BANK: (vectors, size)}
    saved = draw(st.booleans())
    ends = ("_topk_weights", top - 1) if saved else ("", vectors)
    shapes |= {f"vblora_logits_A{ends[0]}": (rank, across, ends[1]), f"vblora_logits_B{ends[0]}": (down, rank, ends[1])}
    arrays = draw_factors(draw, shapes)
    if saved:
        dice = np.random.default_rng(draw(st.integers(0, 2**32)))
        for which, shape in (("A", (rank, across, top)), ("B", (down, rank, top))):
            indices = dice.integers(0, vectors, shape).astype(draw(st.sampled_from([np.uint8, np.int16, np.int64])))
            arrays[f"vblora_logits_{which}_topk_indices"] = indices
    scaling = Scaling(ScalingRule.MULTIPLIER, draw(SCALES))
    target = make_target("vblora", draw(st.sampled_from(MATRICES)), arrays, rank, scaling, {"topk": top})

    def dense(arrays: Arrays) -> np.ndarray:
        low, high = mix(arrays, "A", top), mix(arrays, "B", top)
        low = low.reshape(rank, -1)
        high = np.concatenate([block.T for block in high])
        return high @ low

    return added(target, dense, terms=32, bound=30.0 * (1 + float(np.abs(dense(arrays)).max())))


class TestVblora(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return vblora_examples()

    def needs(self, target: Target) -> list[str]:
        return sorted(target.factors)


@pytest.mark.parametrize(("top", "codes"), [(2, []), (3, ["LF203"]), (0, ["LF230"]), (True, ["LF230"])])
def test_as_many_indices_as_it_says(top: int, codes: list[str]) -> None:
    arrays: Arrays = {BANK: np.ones((5, 3))}
    for which, shape in (("A", (2, 4)), ("B", (6, 2))):
        arrays[f"vblora_logits_{which}_topk_indices"] = np.zeros((*shape, 2), np.uint8)
        arrays[f"vblora_logits_{which}_topk_weights"] = np.ones((*shape, 1))
    target = make_target("vblora", SlotKind.LINEAR, arrays, 2, options={"topk": top})
    assert [problem.code for problem in KIND.check(target)] == codes


def test_more_vectors_than_the_bank_has() -> None:
    arrays = {BANK: np.ones((5, 3)), "vblora_logits_A": np.ones((2, 4, 5)), "vblora_logits_B": np.ones((6, 2, 5))}
    target = make_target("vblora", SlotKind.LINEAR, arrays, 2, options={"topk": 6})
    assert [problem.code for problem in KIND.check(target)] == ["LF203"]
