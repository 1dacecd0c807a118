"""RoAd: pairs of outputs, turned one after the other."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, draw_factors, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import SlotKind
from loraformat.kinds.road import KIND

NUMBERS = {"road_1": 1, "road_2": 2, "road_4": 4}


def turn(variant: str, group: int, arrays: Any, base: Any) -> Any:
    """Return the rows of base, turned pair by pair."""
    theta, alpha = arrays["road_theta"], arrays["road_alpha"]
    half, out = group // 2, np.empty_like(base)
    for start in range(0, len(base), group):
        for i in range(half):
            one, other = start + i, start + half + i
            if variant == "road_1":
                first = second = (start // 2 + i, start // 2 + i)
            elif variant == "road_2":
                first, second = (one, one), (other, other)
            else:
                first, second = ((2 * start + each, 2 * start + group + each) for each in (i, half + i))
            out[one] = alpha[first[0]] * np.cos(theta[first[0]]) * base[one]
            out[one] -= alpha[first[1]] * np.sin(theta[first[1]]) * base[other]
            out[other] = alpha[second[0]] * np.cos(theta[second[0]]) * base[other]
            out[other] += alpha[second[1]] * np.sin(theta[second[1]]) * base[one]
    return out


@st.composite
def road_examples(draw: st.DrawFn) -> MapExample:
    variant, group, groups = (
        draw(st.sampled_from(sorted(NUMBERS))),
        2 * draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )
    out = group * groups
    numbers = out * NUMBERS[variant] // 2
    arrays = draw_factors(draw, {"road_theta": (numbers,), "road_alpha": (numbers,)})
    inner = draw(st.integers(1, 9).filter(lambda n: n != out))
    options = {"variant": variant, "group_size": group}
    target = make_target("road", draw(st.sampled_from(MATRICES)), arrays, options=options)
    return mapped(draw, target, (out, inner), lambda arrays, base: turn(variant, group, arrays, base))


class TestRoad(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return road_examples()


def test_the_bias_is_turned_as_the_rows_are() -> None:
    dice = np.random.default_rng(0)
    arrays = {"road_theta": dice.standard_normal(6), "road_alpha": dice.standard_normal(6)}
    target = make_target("road", SlotKind.LINEAR, arrays, options={"variant": "road_2", "group_size": 6})
    _, bias = KIND.changes(target)
    assert (bias.parameter, bias.shape, bias.is_optional) == ("bias", (6,), True)
    base, out = dice.standard_normal((6, 1)), np.empty((6, 1))
    KIND.map(target, bias, arrays).write_rows(0, 6, base, out)
    np.testing.assert_allclose(out, turn("road_2", 6, arrays, base), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ({"variant": "road_2", "group_size": 4}, ["LF203"]),
        ({"variant": "road_3", "group_size": 6}, ["LF230"]),
        ({"variant": "road_2", "group_size": 3}, ["LF230"]),
        ({"variant": "road_2"}, ["LF230"]),
        ({"variant": "road_2", "group_size": 6}, []),
    ],
    ids=str,
)
def test_numbers_make_whole_groups(options: dict[str, Any], codes: list[str]) -> None:
    arrays = {"road_theta": np.ones(6), "road_alpha": np.ones(6)}
    assert [p.code for p in KIND.check(make_target("road", SlotKind.LINEAR, arrays, options=options))] == codes
