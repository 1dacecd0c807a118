"""FRoD: a weight from its own directions, a sparse matrix and shared factors."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, draw_factors, draw_sizes, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws, main_change
from loraformat.adapter import SlotKind
from loraformat.kinds.frod import KIND


@st.composite
def frod_examples(draw: st.DrawFn) -> MapExample:
    (out, inner), number = draw_sizes(draw), draw(st.integers(1, 4))
    shapes = {"frod_lambda_l": (inner,), "frod_lambda_s_values": (number,), "frod_V": (inner, inner)}
    arrays = draw_factors(draw, shapes)
    dice = np.random.default_rng(draw(st.integers(0, 99)))
    arrays["frod_V"] = (arrays["frod_V"] / 4 + 2 * np.eye(inner)).astype(arrays["frod_V"].dtype)
    arrays |= {"frod_s_indices": dice.integers(0, inner, (2, number)), "frod_s_size": np.array([inner, inner])}
    target = make_target("frod", draw(st.sampled_from(MATRICES)), arrays)

    def formula(arrays: Any, base: Any) -> Any:
        directions = base @ np.linalg.inv(arrays["frod_V"]).T
        result = np.zeros_like(base)
        for column in range(inner):
            one = directions[:, column] / np.sqrt(np.sum(directions[:, column] ** 2))
            result += arrays["frod_lambda_l"][column] * np.outer(one, arrays["frod_V"][:, column])
            for value, (row, other) in zip(arrays["frod_lambda_s_values"], arrays["frod_s_indices"].T, strict=True):
                result += (row == column) * value * np.outer(one, arrays["frod_V"][:, other])
        return result

    return mapped(draw, target, (out, inner), formula, slack=3e-2)


class TestFrod(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return frod_examples()


def make(**arrays: Any) -> Any:
    whole = {
        "frod_V": np.eye(3),
        "frod_lambda_l": np.ones(3),
        "frod_lambda_s_values": np.ones(1),
        "frod_s_indices": np.array([[0], [2]]),
        "frod_s_size": np.array([3, 3]),
    }
    return make_target("frod", SlotKind.LINEAR, whole | arrays)


@pytest.mark.parametrize(
    ("arrays", "codes"),
    [
        ({}, []),
        ({"frod_s_indices": np.array([[0], [3]])}, ["LF405"]),
        ({"frod_s_indices": np.array([[-1], [2]])}, ["LF405"]),
        ({"frod_s_size": np.array([3, 4])}, ["LF405"]),
    ],
)
def test_places_lie_in_the_matrix_between(arrays: Any, codes: list[str]) -> None:
    target = make(**arrays)
    assert not KIND.check(target)
    assert [problem.code for problem in KIND.check_size(target, main_change(KIND, target, shape=(5, 3)))] == codes


def test_a_shared_factor_without_an_inverse() -> None:
    target = make(frod_V=np.diag([1.0, 2.0, 0.0]))
    arrays = {role: factor.read() for role, factor in target.factors.items()}
    change = replace(main_change(KIND, target, shape=(2, 3)))
    found = KIND.map(target, change, arrays).prepare([(0, np.array([[3.0, 0, 7], [4, 2, 7]]))])
    assert found.result is not None
    np.testing.assert_allclose(found.result, [[0.6, 0, 0], [0.8, 2, 0]], atol=1e-12)
