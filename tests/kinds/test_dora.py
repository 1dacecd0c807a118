"""DoRA against the paper's formula, and its magnitudes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, Arrays, draw_factors, draw_sizes, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds import Nature
from loraformat.kinds.dora import KIND

KERNELS = [(3,), (1, 1), (2, 3), (1, 2, 2)]


@st.composite
def dora_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([*MATRICES, SlotKind.CONV, SlotKind.EMBEDDING]))
    kernel = draw(st.sampled_from(KERNELS)) if slot is SlotKind.CONV else ()
    (out, inner), rank = draw_sizes(draw), draw(st.integers(1, 4))
    table = slot is SlotKind.EMBEDDING
    down, up = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
    ones = tuple(1 for _ in kernel)
    magnitude = (1, out, *ones) if kernel else (out,)
    shapes = {down: (rank, inner, *kernel), up: (out, rank, *ones), "lora_magnitude_vector": magnitude}
    scaling = Scaling(draw(st.sampled_from(ScalingRule)), draw(st.sampled_from([1.0, 0.3, -2.0])))
    target = make_target("dora", slot, draw_factors(draw, shapes), rank, scaling)

    def formula(arrays: Arrays, base: Any) -> Any:
        change = np.einsum("or,ri->oi", arrays[up].reshape(out, rank), arrays[down].reshape(rank, -1))
        moved = base + target.scale * change
        lengths = np.array([np.sqrt(sum(number**2 for number in row)) for row in moved])
        return moved * (arrays["lora_magnitude_vector"].reshape(-1) / lengths)[:, None]

    return mapped(draw, target, (out, inner, *kernel), formula, told=True, slack=1e-2)


class TestDora(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return dora_examples()


def test_a_bias_that_was_saved_beside_it_replaces_the_base_s() -> None:
    arrays = {"lora_A.weight": np.ones((1, 3)), "lora_B.weight": np.ones((2, 1)), "lora_magnitude_vector": np.ones(2)}
    target = make_target("dora", SlotKind.LINEAR, {**arrays, "base_layer.bias": np.array([4.0, 5.0])}, 1)
    assert not KIND.check(target)
    weight, bias = KIND.changes(target)
    assert (weight.nature, bias.nature, bias.shape) == (Nature.FUNCTION_OF_BASE, Nature.REPLACEMENT, (2,))
    assert "base_layer.bias" not in weight.roles
    out = np.empty((2, 1))
    KIND.value(target, bias, {"base_layer.bias": np.array([4.0, 5.0])}).write_rows(0, 2, out)
    np.testing.assert_array_equal(out, [[4.0], [5.0]])


@pytest.mark.parametrize("magnitude", [(3,), (1, 2), (2, 1), ()], ids=str)
def test_magnitudes_of_another_shape(magnitude: tuple[int, ...]) -> None:
    arrays = {"lora_A.weight": np.ones((1, 3)), "lora_B.weight": np.ones((2, 1))}
    target = make_target("dora", SlotKind.LINEAR, {**arrays, "lora_magnitude_vector": np.ones(magnitude)}, 1)
    assert [problem.code for problem in KIND.check(target)] == ["LF203"]


def test_columns_have_lengths_with_the_same_numbers_turned() -> None:
    """LyCORIS can norm inputs; the map does it with a pass over the base, and adds what it is told to the norm."""
    from laws.kind_laws import prepare
    from loraformat.kinds._maps import NormMap
    from loraformat.kinds._matrices import LowRankDelta

    dice = np.random.default_rng(0)
    left, right, base = dice.standard_normal((4, 2)), dice.standard_normal((2, 3)), dice.standard_normal((4, 3))
    magnitudes = np.array([1.0, 2.0, 3.0])
    by_columns = NormMap(LowRankDelta(left, right), magnitudes, is_by_rows=False, epsilon=0.5)
    out = np.empty((4, 3))
    prepare(by_columns, base, 3).write_rows(0, 4, base, out)
    moved = base + left @ right
    np.testing.assert_allclose(out, moved * magnitudes / (np.linalg.norm(moved, axis=0) + 0.5), rtol=1e-12)
