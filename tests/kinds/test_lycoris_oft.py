"""LyCORIS' diag-OFT against a loop over blocks with an explicit inverse, in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import MapExample, MappingKindLaws, prepare
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds.lycoris_oft import KIND
from loraformat.strict_json import JsonValue


def make_target(
    slot: SlotKind, scale: float = 1.0, options: dict[str, JsonValue] | None = None, **arrays: Any
) -> Target:
    factors = {role: MemoryFactor(role, array) for role, array in arrays.items()}
    return Target("m.q", KIND.name, slot, factors, 0, Scaling(ScalingRule.MULTIPLIER, scale), options=options or {})


def make_mapped(base: NDArray[Any], blocks: NDArray[Any], rescale: NDArray[Any] | None, constraint: float) -> Any:
    skew = blocks - blocks.transpose(0, 2, 1)
    limit, length = constraint * len(base), np.sqrt((skew**2).sum()) + 1e-8
    if constraint > 0 and length > limit:
        skew = skew * limit / length
    mapped = []
    for number, one in enumerate(skew):
        size = len(one)
        rotation = (np.eye(size) + one) @ np.linalg.inv(np.eye(size) - one)
        mapped.append(rotation.T @ base[number * size : (number + 1) * size])
    whole = np.concatenate(mapped)
    return whole if rescale is None else whole * rescale.reshape(-1, 1)


@st.composite
def oft_examples(draw: st.DrawFn) -> MapExample:
    slot = draw(st.sampled_from([SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.CONV]))
    kernel = draw(st.sampled_from([(3,), (1, 1), (3, 2)])) if slot is SlotKind.CONV else ()
    count, size, inner = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    out, columns = count * size, inner * int(np.prod(kernel))
    assume(out != columns)
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    base, blocks = dice.standard_normal((out, columns)), dice.standard_normal((count, size, size))
    arrays = {"oft_blocks": blocks}
    if draw(st.booleans()):
        arrays["rescale"] = 1 + dice.random((out, 1, *(1 for _ in kernel)))
    constraint = draw(st.sampled_from([0.0, 0.05, 1e-3]))
    options: dict[str, JsonValue] = {"constraint": constraint} if constraint else {}
    target = make_target(slot, options=options, **arrays)
    shape = (out, inner, *kernel)
    return MapExample(target, arrays, base, make_mapped(base, blocks, arrays.get("rescale"), constraint), 1e-4, shape)


class TestLycorisOft(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return oft_examples()


def codes(target: Target) -> list[str]:
    return [problem.code for problem in KIND.check(target)]


def test_lengths_of_columns_stay() -> None:
    """A rotation."""
    dice = np.random.default_rng(0)
    blocks, base = dice.standard_normal((3, 4, 4)), dice.standard_normal((12, 5))
    target = make_target(SlotKind.LINEAR, oft_blocks=blocks)
    (change,) = KIND.changes(target)
    settled = replace(change, shape=(12, 5))
    weight_map = prepare(KIND.map(target, settled, {"oft_blocks": blocks}), base, 4)
    out = np.empty_like(base)
    weight_map.write_rows(0, 12, base, out)
    np.testing.assert_allclose(np.linalg.norm(out, axis=0), np.linalg.norm(base, axis=0))
    assert np.abs(out - base).max() > 0.1


@pytest.mark.parametrize(
    ("arrays", "code"),
    [
        ({"oft_blocks": (3, 4, 5)}, "LF203"),
        ({"oft_blocks": (2, 3, 4, 4)}, "LF203"),
        ({"oft_blocks": (3, 4, 4), "rescale": (11, 1)}, "LF203"),
        ({"rescale": (12, 1)}, "LF201"),
    ],
    ids=str,
)
def test_blocks_that_are_none(arrays: dict[str, tuple[int, ...]], code: str) -> None:
    assert codes(make_target(SlotKind.LINEAR, **{role: np.ones(shape) for role, shape in arrays.items()})) == [code]


def test_it_has_no_scale() -> None:
    """What these files call alpha is a bound, not a rank's alpha."""
    assert codes(make_target(SlotKind.LINEAR, 0.5, oft_blocks=np.ones((3, 4, 4)))) == ["LF231"]
    assert codes(make_target(SlotKind.LINEAR, options={"constraint": "off"}, oft_blocks=np.ones((3, 4, 4)))) == [
        "LF230"
    ]
