"""Rules on the adapter alone: each returns problems and raises nothing."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from graphs import ArrayFactor, dyadic_factors, make_adapter, make_target
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds import KINDS
from loraformat.problems import Problem
from loraformat.rules import check_adapter, is_mergeable, refuse_kind

RNG = np.random.default_rng(5)
OUT, INNER, RANK = 6, 10, 3


def factors(dtype=np.float32):
    down, up = dyadic_factors(RNG, OUT, INNER, RANK)
    return down.astype(dtype), up.astype(dtype)


def codes(*targets, **options) -> list[tuple[str, str]]:
    return [(problem.code, problem.severity) for problem in check_adapter(make_adapter(*targets), **options)]


def test_a_sound_adapter() -> None:
    forms = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)
    assert codes(*(make_target(f"m.{place}", factors(form)) for place, form in enumerate(forms))) == []


def test_what_the_reader_found_comes_first() -> None:
    problem = Problem("LF304", "x", "y", severity="note")
    adapter = make_adapter(make_target("m.q", factors(), scale=0), problems=(problem,))
    assert [each.code for each in check_adapter(adapter)] == ["LF304", "LF208"]


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_is_finite(scale: float) -> None:
    assert codes(make_target("m.q", factors(), scale=scale)) == [("LF207", "error")]


def test_a_scale_of_zero_changes_nothing() -> None:
    for scale in (0.0, -0.0):
        target = make_target("m.q", factors(), scale=scale)
        assert codes(target) == [("LF208", "error")]
        assert codes(target, allow_zero=True) == []


def test_a_negative_scale_is_noted() -> None:
    target = make_target("m.q", factors(), scale=-4, rule=ScalingRule.ALPHA_OVER_RANK)
    (problem,) = check_adapter(make_adapter(target))
    assert (problem.code, problem.severity, problem.found) == ("LF216", "note", f"scale {-4 / RANK:g}")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_numbers_are_finite(value: float, dtype: np.typing.DTypeLike) -> None:
    down, up = factors(dtype)
    down[2, 7] = down[2, 9] = value
    up[0, 0] = value
    problems = check_adapter(make_adapter(make_target("m.q", (down, up))))
    assert [problem.code for problem in problems] == ["LF501", "LF501"]
    assert problems[0].where == "m.q: lora_A.weight"
    assert problems[0].found == "2 of 30 numbers, the first at (2, 7)"


def test_signalling_nan_is_told_without_a_warning() -> None:
    down, up = factors()
    down.view(np.uint32)[:] = 0x7F800001
    assert codes(make_target("m.q", (down, up))) == [("LF501", "error")]


def test_what_float32_cannot_hold_is_not_finite() -> None:
    down, up = factors(np.float64)
    down[0, 0] = 1e300
    assert codes(make_target("m.q", (down, up))) == [("LF501", "error")]


@pytest.mark.parametrize("side", [0, 1])
def test_a_factor_of_zeros(side: int) -> None:
    pair = factors()
    pair[side][:] = -0.0
    assert codes(make_target("m.q", pair)) == [("LF214", "warning")]


def test_one_number_makes_it_heard() -> None:
    down, up = factors()
    up[:] = 0
    up[3, 1] = 1e-30
    assert codes(make_target("m.q", (down, up))) == []


@pytest.mark.parametrize(("targets", "said"), [(1, 1), (8, 8), (9, 9), (40, 9)])
def test_an_untrained_adapter_is_a_few_problems(targets: int, said: int) -> None:
    """Every B is zero before training: forty times the same would hide the rest."""
    down, up = factors()
    silent = [make_target(f"m.{place:02}", (down, 0 * up), scale=-1) for place in range(targets)]
    broken = make_target("m.z", (down, up[:, :2]))
    problems = check_adapter(make_adapter(*silent, broken))
    zeros = [problem for problem in problems if problem.code == "LF214"]
    assert len(zeros) == said
    assert len([problem for problem in problems if problem.code == "LF216"]) == said
    assert all(problem.severity == "warning" for problem in zeros)
    if targets > said:
        assert zeros[-1].where == f"{targets - 8} more targets"
        assert f"{targets} of {targets + 1} targets" in zeros[-1].found
    assert [problem.where for problem in problems if problem.code == "LF203"] == ["m.z"]


def test_all_that_is_wrong_is_said() -> None:
    down, up = factors()
    wrong = [
        make_target("m.a", (down, up[:, :2])),
        make_target("m.b", (down, up), scale=0),
        make_target("m.c", (down * np.nan, up)),
        make_target("m.d", (down, up), kind="moonshine"),
        replace(make_target("m.e", (down, up)), rank=2),
        make_target("m.f", (down[:0], up[:, :0])),
        make_target("m.g", (np.ones((9, INNER), np.float32), np.ones((OUT, 9), np.float32))),
    ]
    assert codes(*wrong) == [
        ("LF203", "error"),
        ("LF208", "error"),
        ("LF501", "error"),
        ("LF209", "error"),
        ("LF205", "error"),
        ("LF204", "error"),
        ("LF206", "warning"),
    ]


def test_roles_and_slots() -> None:
    down, up = factors()
    alone = replace(make_target("m.a", (down, up)), factors={"lora_A.weight": ArrayFactor("m.a.lora_A.weight", down)})
    slot = replace(make_target("m.b", (down, up)), slot=SlotKind.PARAMETER)
    integers = make_target("m.c", (down.astype(np.int8), up.astype(np.int8)))
    assert [code for code, _ in codes(alone, slot, integers)] == ["LF201", "LF408", "LF210", "LF210"]


def test_kinds() -> None:
    assert is_mergeable("lora")
    assert not is_mergeable("moonshine")
    problem = refuse_kind("moonshine", "m.q", "tensors moon")
    assert (problem.code, problem.where) == ("LF209", "m.q")
    assert "'moonshine' (tensors moon)" in problem.found
    assert all(name in problem.expected for name in KINDS.names())


def test_scaling_rules_reach_the_rules() -> None:
    """alpha of 0 is zero under every rule."""
    target = make_target("m.q", factors())
    for rule in ScalingRule:
        assert codes(replace(target, scaling=Scaling(rule, 0.0))) == [("LF208", "error")]
