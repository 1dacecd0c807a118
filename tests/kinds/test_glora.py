"""PEFT's GLoRA: each path as a product, as numbers of the rows, as one number, or missing."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import MATRICES, Arrays, draw_factors, draw_sizes, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import SlotKind, Target
from loraformat.kinds import BESIDE
from loraformat.kinds.glora import KIND


def path_shapes(which: str, form: str, out: int, inner: int, rank: int) -> dict[str, tuple[int, ...]]:
    return {
        "product": {f"glora_{which}.Xd": (out, rank), f"glora_{which}.Xu": (rank, inner)},
        "rows": {f"glora_{which}.X": (out, 1)},
        "one": {f"glora_{which}.X": (1,)},
        "zeros": {f"glora_{which}.zeros": (out, inner)},
    }[form]


def value(arrays: Arrays, which: str) -> Any:
    if f"glora_{which}.Xd" in arrays:
        return arrays[f"glora_{which}.Xd"] @ arrays[f"glora_{which}.Xu"]
    return arrays.get(f"glora_{which}.X", np.zeros(1))


@st.composite
def glora_examples(draw: st.DrawFn) -> MapExample:
    out, inner = draw_sizes(draw)
    forms = st.sampled_from(["product", "rows", "one"])
    shapes = path_shapes("A", draw(forms), out, inner, draw(st.integers(1, 3)))
    shapes |= path_shapes("B", draw(st.sampled_from(["product", "rows", "one", "zeros"])), out, inner, 2)
    target = make_target("glora", draw(st.sampled_from(MATRICES)), draw_factors(draw, shapes))

    def formula(arrays: Any, base: Any) -> Any:
        return base + base * value(arrays, "A") + value(arrays, "B") * np.ones_like(base)

    return mapped(draw, target, (out, inner), formula, slack=1e-3)


class TestGlora(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return glora_examples()

    def needs(self, target: Target) -> list[str]:
        return sorted(target.factors)


def test_the_bias_has_paths_of_its_own() -> None:
    arrays = {"glora_D.X": np.array([1.0, 2.0]), "glora_E.X": np.array([0.5])}
    arrays |= {f"glora_{which}.zeros": np.zeros((2, 3)) for which in "AB"}
    target = make_target("glora", SlotKind.LINEAR, arrays)
    assert not KIND.check(target)
    (bias,) = KIND.changes(target)
    assert (bias.parameter, bias.shape, bias.is_optional) == ("bias", (2,), True)
    out = np.empty((2, 1))
    KIND.map(target, bias, arrays).write_rows(0, 2, np.array([[3.0], [4.0]]), out)
    np.testing.assert_array_equal(out, [[3 + 3 + 0.5], [4 + 8 + 0.5]])


@dataclass(frozen=True)
class Rows:
    matrix: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self.matrix[start:stop]


@pytest.mark.parametrize("form", ["X", "product"])
def test_the_bias_is_computed_from_the_weight_as_well(form: str) -> None:
    dice = np.random.default_rng(3)
    base, bias = dice.standard_normal((300, 4)), dice.standard_normal((300, 1))
    column, row = dice.standard_normal((4, 2)), dice.standard_normal((2, 1))
    path = {"glora_C.X": column @ row} if form == "X" else {"glora_C.Xd": column, "glora_C.Xu": row}
    arrays = {"glora_A.X": np.ones(1), "glora_B.X": np.ones(1), "glora_D.X": np.array([0.5]), **path}
    target = make_target("glora", SlotKind.LINEAR, arrays)
    _, change = KIND.changes(target)
    assert (change.parameter, change.beside, change.is_optional) == ("bias", "weight", False)
    out = np.empty((300, 1))
    change = replace(change, shape=(300,))
    KIND.map(target, change, {role: arrays[role] for role in change.roles} | {BESIDE: Rows(base)}).write_rows(
        0, 300, bias, out
    )
    np.testing.assert_allclose(out, bias * 1.5 + base @ column @ row, rtol=1e-12)


@pytest.mark.parametrize(
    ("roles", "codes"),
    [
        ({"glora_A.X": (3, 1), "glora_B.X": (1,), "glora_C.zeros": (4, 1)}, []),
        ({"glora_A.X": (3, 1), "glora_B.X": (1,), "glora_C.X": (4, 1)}, []),
        ({"glora_A.X": (3, 1), "glora_B.X": (1,), "glora_C.Xd": (4, 2), "glora_C.Xu": (2, 1)}, []),
        ({"glora_A.X": (3, 1), "glora_B.X": (1,), "glora_C.Xd": (4, 2)}, ["LF201"]),
        ({"glora_A.X": (3, 1)}, ["LF201"]),
        ({"glora_A.X": (3, 1), "glora_B.Xd": (3, 2)}, ["LF201"]),
        ({"glora_A.X": (3, 1), "glora_A.zeros": (3, 4)}, ["LF201"]),
        ({"glora_A.X": (3, 1), "glora_B.X": (5, 1)}, ["LF203"]),
        ({}, ["LF201"]),
    ],
    ids=str,
)
def test_what_paths_may_be(roles: dict[str, tuple[int, ...]], codes: list[str]) -> None:
    target = make_target("glora", SlotKind.LINEAR, {role: np.ones(shape) for role, shape in roles.items()})
    assert [problem.code for problem in KIND.check(target)] == codes
