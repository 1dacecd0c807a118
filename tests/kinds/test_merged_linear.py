"""LoRA of slices against products slice by slice, written to their rows one by one."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from laws.kind_laws import Example, KindLaws, whole
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds.merged_linear import KIND
from loraformat.strict_json import JsonValue

ROLES = ("lora_A.weight", "lora_B.weight")


def make_target(down: NDArray[Any], up: NDArray[Any], slot: SlotKind = SlotKind.LINEAR, **options: JsonValue) -> Target:
    factors = {role: MemoryFactor(role, array) for role, array in zip(ROLES, (down, up), strict=True)}
    scaling = Scaling(ScalingRule.ALPHA_OVER_RANK, 3.0)
    return Target("m.qkv", "merged_linear", slot, factors, up.shape[1], scaling, options=options)


def list_rows(sizes: list[int], groups: int) -> list[list[int]]:
    """Return the rows of each slice, counted out as the matrix is laid down."""
    rows: list[list[int]] = [[] for _ in sizes]
    row = 0
    for _ in range(groups):
        for number, size in enumerate(sizes):
            for _ in range(size // groups):
                rows[number].append(row)
                row += 1
    return rows


def make_dense(down: NDArray[Any], up: NDArray[Any], enabled: list[bool], sizes: list[int], groups: int) -> Any:
    dense = np.zeros((sum(sizes), down.shape[1]))
    rank, taken, place = up.shape[1], 0, 0
    for number, rows in enumerate(list_rows(sizes, groups)):
        if enabled[number]:
            factor = down[place * rank : (place + 1) * rank].astype(np.float64)
            for row in rows:
                dense[row] = up[taken].astype(np.float64) @ factor
                taken += 1
            place += 1
    return dense


@st.composite
def slice_examples(draw: st.DrawFn) -> Example:
    groups = draw(st.integers(1, 3))
    enabled = draw(st.lists(st.booleans(), min_size=1, max_size=4).filter(any))
    equal = draw(st.booleans())
    first = groups * draw(st.integers(1, 3))
    sizes = [first if equal else groups * draw(st.integers(1, 3)) for _ in enabled]
    rank, inner = draw(st.integers(1, 3)), draw(st.integers(1, 7).filter(lambda size: size != sum(sizes)))
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    down = dice.standard_normal((rank * sum(enabled), inner)).astype(dtype)
    adapted = sum(size for size, each in zip(sizes, enabled, strict=True) if each)
    up = dice.standard_normal((adapted, rank)).astype(dtype)
    options: dict[str, JsonValue] = {"enable_lora": list(enabled), "groups": groups}
    if not equal or draw(st.booleans()):
        options["sizes"] = list(sizes)
    slot = draw(st.sampled_from([SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED]))
    target = make_target(down, up, slot, **options)
    arrays = {role: factor.read() for role, factor in target.factors.items()}
    dense, bound = (make_dense(f(down), f(up), enabled, sizes, groups) for f in (np.array, np.abs))
    return Example(target, arrays, dense, bound)


class TestMergedLinear(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return slice_examples()


def codes(target: Target) -> list[str]:
    return [problem.code for problem in KIND.check(target)]


def test_loralib_query_and_value() -> None:
    """r = 1, enable_lora = [True, False, True]: the key's rows stay, each slice has its own A."""
    down, up = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0], [10.0], [100.0], [1000.0]])
    target = make_target(down, up, enable_lora=[True, False, True])
    delta = KIND.delta(target, KIND.changes(target)[0], dict(zip(ROLES, (down, up), strict=True)), 1.0)
    expected = [[1, 2], [10, 20], [0, 0], [0, 0], [300, 400], [3000, 4000]]
    np.testing.assert_array_equal(whole(delta, np.float64), expected)


def test_query_groups_that_are_interleaved() -> None:
    """Four query heads and two of key and value in two groups, heads of one row: q q k v q q k v."""
    down, up = np.eye(3), np.arange(1.0, 9)[:, None]
    target = make_target(down, up, enable_lora=[True] * 3, sizes=[4, 2, 2], groups=2)
    delta = whole(KIND.delta(target, KIND.changes(target)[0], dict(zip(ROLES, (down, up), strict=True)), 1.0), float)
    assert delta.argmax(axis=1).tolist() == [0, 0, 1, 2, 0, 0, 1, 2]
    assert delta.max(axis=1).tolist() == [1, 2, 5, 7, 3, 4, 6, 8]


@pytest.mark.parametrize(
    ("down", "up", "options", "code"),
    [
        ((2, 5), (4, 1), {}, "LF230"),
        ((2, 5), (4, 1), {"enable_lora": [1, 1]}, "LF230"),
        ((2, 5), (4, 1), {"enable_lora": [False]}, "LF230"),
        ((2, 5), (4, 1), {"enable_lora": [True, True], "sizes": [2, -2]}, "LF230"),
        ((2, 5), (4, 1), {"enable_lora": [True, True], "groups": 0}, "LF230"),
        ((2, 5), (4, 1), {"enable_lora": [True, True], "slices": 2}, "LF230"),
        ((2, 5), (4, 1), {"enable_lora": [True]}, "LF203"),
        ((2, 5), (5, 1), {"enable_lora": [True, True]}, "LF203"),
        ((2, 5), (4, 1), {"enable_lora": [True, True], "sizes": [3, 2]}, "LF203"),
        ((2, 5), (4, 1), {"enable_lora": [True, True], "sizes": [4]}, "LF203"),
        ((2, 5), (4, 1), {"enable_lora": [True, True], "groups": 4}, "LF203"),
        ((2, 5, 1), (4, 1), {"enable_lora": [True, True]}, "LF203"),
        ((2, 5), (4, 0), {"enable_lora": [True, True]}, "LF204"),
    ],
    ids=str,
)
def test_slices_that_are_not_there(
    down: tuple[int, ...], up: tuple[int, ...], options: dict[str, JsonValue], code: str
) -> None:
    assert codes(make_target(np.ones(down, np.float32), np.ones(up, np.float32), **options)) == [code]


def test_a_wrong_rank_is_not_divided_by() -> None:
    target = make_target(np.ones((4, 5)), np.ones((4, 2)), enable_lora=[True, True])
    assert not codes(target)
    assert codes(replace(target, rank=4)) == ["LF205"]
