"""What every kind keeps. A kind's test class inherits the laws of its nature and gives the kind and some examples.

`KindLaws` are those of additive kinds; the oracle is the dense change, which the test class computes in float64 from
the paper's formula. `ReplacingKindLaws` are those of kinds that bring values; the oracle is the values themselves. What
holds for both stands in `CommonKindLaws`. No class has a `Test` prefix, so that it is collected only where it is
inherited.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.algebra.difference import compare_adapters
from loraformat.kinds import (
    KINDS,
    UNKNOWN,
    AdditiveKind,
    Change,
    Delta,
    Kind,
    MappingKind,
    Nature,
    ReplacingKind,
    SizedByBase,
    WeightMap,
    fits_shape,
)
from loraformat.problems import Problem

# One law runs for several classes, on purpose.
_law = settings(suppress_health_check=list(HealthCheck), max_examples=settings.default.max_examples // 4)
_few = settings(_law, max_examples=4)

TINY = 1e-37
"""Below the smallest normal float32, rounding is no longer relative."""


@dataclass(frozen=True, slots=True)
class Held:
    """A target with its numbers.

    Attributes:
        target: the target; its factors are `MemoryFactor`s.
        arrays: role to numbers.
    """

    target: Target
    arrays: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Example(Held):
    """A target of an additive kind, and what it must do.

    Attributes:
        dense: the change at scale 1, `(out, in * kernel)` in float64, by other means than the kind's.
        bound: the same from the factors' absolute values: how large the sums on the way can get.
        terms: how many products such a sum has beyond the rank.
        shape: the canonical shape that the base has, where the factors do not tell it.
    """

    dense: NDArray[np.float64]
    bound: NDArray[np.float64]
    terms: int = 4
    shape: tuple[int, ...] = ()

    def assert_close(self, found: NDArray[Any], expected: NDArray[Any], scale: float) -> None:
        """Allow for the rounding of sums of `rank` products, and nothing more."""
        eps = float(np.finfo(found.dtype).eps)
        assert found.shape == expected.shape
        bound = self.bound if found.shape == self.bound.shape else self.bound.T
        slack = eps * (self.target.rank + self.terms) * abs(scale) * bound + TINY
        assert (np.abs(found.astype(np.float64) - expected) <= slack).all()


def whole(delta: Delta, dtype: Any) -> NDArray[Any]:
    """Return all rows at once, written over numbers that must not show."""
    out = np.full(delta.shape, np.nan, dtype=dtype)
    delta.write_rows(0, delta.shape[0], out)
    return out


def main_change(kind: Kind, target: Target, parameter: str = "weight", shape: tuple[int, ...] = ()) -> Change:
    """Return what a target does to its weight, besides replacing it, or to the only parameter that it changes.

    `shape` is that of the base, where the factors do not tell it; the adapter changes nothing larger.
    """
    found = kind.changes(target)
    changes = [change for change in found if change.parameter == parameter] or list(found)
    change = next((change for change in changes if change.nature is not Nature.REPLACEMENT), changes[0])
    if not shape:
        assert UNKNOWN not in change.shape
        return change
    assert fits_shape(shape, change.shape)
    return replace(change, shape=shape, extent=shape[:2])


def floats(arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Return the form of the factors that are no indices."""
    return next(array.dtype for array in arrays.values() if array.dtype.kind == "f")


@cache
def draw_some(suite: type["CommonKindLaws"]) -> tuple["Held", ...]:
    """Return some examples of a suite, for laws that draw nothing else: drawing is what takes the time."""
    drawn: list[Held] = []

    @_law
    @given(held=suite().examples())
    def draw(held: Held) -> None:
        drawn.append(held)

    draw()
    return tuple(drawn)


def draw_slices(data: st.DataObject, size: int) -> slice:
    """Return some of `size` rows or columns, with a step."""
    start = data.draw(st.integers(0, size - 1))
    return slice(start, data.draw(st.integers(start + 1, size)), data.draw(st.integers(1, 3)))


class CommonKindLaws:
    """The laws of kinds of any nature."""

    kind: Kind
    unknown_role = "lora_of_next_year"

    def needs(self, target: Target) -> list[str]:
        """Return the roles without which the target says nothing, or half of it."""
        roles = next(roles for roles in self.kind.role_sets if target.slot in roles.slots)
        return list(roles.required)

    @abstractmethod
    def examples(self) -> st.SearchStrategy[Held]:
        """Return valid targets of every slot that the kind knows, never square, in float32 and float64."""

    def test_its_room_finds_it(self) -> None:
        assert KINDS.find(self.kind.name) is self.kind

    def test_it_says_what_it_does_and_where_that_stands(self) -> None:
        assert self.kind.formula
        assert self.kind.source

    @_few
    @given(st.data())
    def test_it_does_not_differ_from_itself(self, data: st.DataObject) -> None:
        adapter = Adapter((data.draw(self.examples()).target,))
        found = compare_adapters(adapter, adapter)
        assert {problem.code for problem in found.incomparable} <= {"LF702"}
        assert not any(item.difference for item in found.shared)

    def test_each_slot_has_one_role_set(self) -> None:
        slots = [slot for roles in self.kind.role_sets for slot in roles.slots]
        assert slots
        assert len(slots) == len(set(slots))
        assert all(roles.required or roles.optional for roles in self.kind.role_sets)

    def targets(self) -> list[Target]:
        """Return the targets of some examples."""
        return [held.target for held in draw_some(type(self))]

    def test_role_sets_cover_the_factors(self) -> None:
        for target in self.targets():
            roles = next(roles for roles in self.kind.role_sets if target.slot in roles.slots)
            assert set(roles.required) <= set(target.factors) <= {*roles.required, *roles.optional}

    def test_check_accepts_what_is_sound_without_reading_it(self) -> None:
        for target in self.targets():
            factors = {role: replace(factor, sealed=True) for role, factor in target.factors.items()}
            assert not [p for p in self.kind.check(replace(target, factors=factors)) if p.severity == "error"], target

    def test_check_names_a_role_that_it_does_not_have(self) -> None:
        stray = MemoryFactor("stray", np.ones((2, 3), np.float32))
        for target in self.targets():
            problems = self.kind.check(replace(target, factors={**target.factors, self.unknown_role: stray}))
            assert [problem.code for problem in problems if problem.severity == "error"] == ["LF202"], target
            assert self.unknown_role in problems[0].found

    def test_check_refuses_slots_that_it_has_no_roles_for(self) -> None:
        known = {slot for roles in self.kind.role_sets for slot in roles.slots}
        for target in self.targets():
            for slot in set(SlotKind) - known:
                assert [problem.code for problem in self.kind.check(replace(target, slot=slot))] == ["LF408"], target

    def test_check_refuses_numbers_that_are_not_floats(self) -> None:
        for target in self.targets():
            for role, sound in target.factors.items():
                wrong = (np.int8, np.int64, np.uint8) if sound.dtype.family == "float" else (np.float32, np.float16)
                for form in (*wrong, np.bool_, np.complex64):
                    factor = MemoryFactor(role, np.ones(sound.shape, form))
                    problems = self.kind.check(replace(target, factors={**target.factors, role: factor}))
                    assert [problem.code for problem in problems] == ["LF210"], (target, role, form)


class FactoredKindLaws(CommonKindLaws):
    """The laws of kinds that compute something from factors."""

    kind: AdditiveKind | MappingKind

    def test_each_target_has_roles_that_it_needs(self) -> None:
        assert all(map(self.needs, self.targets()))

    def test_check_names_a_role_that_is_missing(self) -> None:
        for target in self.targets():
            for gone in self.needs(target):
                problems = self.check_without(target, gone)
                assert [problem.code for problem in problems] == ["LF201"], (target, gone)

    def check_without(self, target: Target, gone: str) -> Sequence[Problem]:
        """Return the problems of a target without one of its factors."""
        left = {role: factor for role, factor in target.factors.items() if role != gone}
        return self.kind.check(replace(target, factors=left))

    def test_check_compares_the_stated_rank_with_the_factors(self) -> None:
        for target in self.targets():
            assert self.kind.rank(target.factors) == target.rank
            for wrong in {target.rank + 1, abs(target.rank - 1)}:
                assert [p.code for p in self.kind.check(replace(target, rank=wrong))] == ["LF205"], (target, wrong)

    def test_the_shape_that_the_base_has_is_accepted(self) -> None:
        for held in draw_some(type(self)):
            assert isinstance(held, Example | MapExample)
            if held.shape:
                assert isinstance(self.kind, SizedByBase)
                assert not self.kind.check_size(held.target, main_change(self.kind, held.target, shape=held.shape))


class KindLaws(FactoredKindLaws):
    """The laws of additive kinds."""

    kind: AdditiveKind

    @abstractmethod
    def examples(self) -> st.SearchStrategy[Example]:
        """Return valid targets as `CommonKindLaws` has it, with what they must do."""

    def make_delta(self, example: Example, scale: float) -> tuple[Delta, Any]:
        arrays = {role: array.copy() for role, array in example.arrays.items()}
        for array in arrays.values():
            array.setflags(write=False)
        change = main_change(self.kind, example.target, shape=example.shape)
        return self.kind.delta(example.target, change, arrays, scale), floats(arrays)

    def test_check_says_which_role_is_missing(self) -> None:
        for target in self.targets():
            assert all(gone in self.check_without(target, gone)[0].expected for gone in self.needs(target)), target

    def test_weight_shape_is_that_of_the_change(self) -> None:
        for example in draw_some(type(self)):
            assert isinstance(example, Example)
            shape = main_change(self.kind, example.target, shape=example.shape).shape
            delta, _ = self.make_delta(example, 1.0)
            assert (shape[0], int(np.prod(shape[1:]))) == delta.shape == example.dense.shape

    @_law
    @given(data=st.data(), scale=st.floats(-8, 8))
    def test_the_change_is_that_of_the_formula(self, data: st.DataObject, scale: float) -> None:
        example = data.draw(self.examples())
        delta, dtype = self.make_delta(example, scale)
        example.assert_close(whole(delta, dtype), scale * example.dense, scale)

    @_law
    @given(data=st.data())
    def test_rows_by_any_tiling_are_the_whole(self, data: st.DataObject) -> None:
        example = data.draw(self.examples())
        delta, dtype = self.make_delta(example, 1.5)
        rows, columns = delta.shape
        cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=4))})
        tiled = np.full((rows, columns), np.nan, dtype=dtype)
        for start, stop in data.draw(st.permutations(list(pairwise(cuts)))):
            delta.write_rows(start, stop, tiled[start:stop])
        example.assert_close(tiled, 1.5 * example.dense, 1.5)

    @_law
    @given(data=st.data())
    def test_the_transposed_change_is_the_transpose(self, data: st.DataObject) -> None:
        example = data.draw(self.examples())
        delta, dtype = self.make_delta(example, -0.75)
        turned = delta.transposed()
        assert turned.shape == delta.shape[::-1]
        example.assert_close(whole(turned, dtype), -0.75 * example.dense.T, 0.75)
        cut = data.draw(st.integers(0, turned.shape[0]))
        part = np.full((turned.shape[0] - cut, turned.shape[1]), np.nan, dtype=dtype)
        turned.write_rows(cut, turned.shape[0], part)
        np.testing.assert_allclose(part, whole(turned, dtype)[cut:], rtol=1e-5, atol=1e-5)
        assert turned.transposed().shape == delta.shape

    @_law
    @given(data=st.data())
    def test_a_part_is_a_part_of_the_whole(self, data: st.DataObject) -> None:
        example = data.draw(self.examples())
        delta, dtype = self.make_delta(example, 1.5)
        rows, columns = draw_slices(data, delta.shape[0]), draw_slices(data, delta.shape[1])
        expected = whole(delta, dtype)[rows, columns]
        np.testing.assert_allclose(whole(delta.part(rows, columns), dtype), expected, rtol=1e-4, atol=1e-4)

    @_law
    @given(data=st.data(), scale=st.floats(-8, 8))
    def test_it_is_linear_in_the_scale(self, data: st.DataObject, scale: float) -> None:
        example = data.draw(self.examples())
        one, dtype = self.make_delta(example, 1.0)
        scaled, _ = self.make_delta(example, scale)
        example.assert_close(whole(scaled, dtype), scale * whole(one, dtype).astype(np.float64), 2 * (abs(scale) + 1))
        nothing, _ = self.make_delta(example, 0.0)
        assert not whole(nothing, dtype).any()

    @_law
    @given(data=st.data())
    def test_zero_factors_change_nothing(self, data: st.DataObject) -> None:
        example = data.draw(self.examples())
        zeros = {
            role: np.zeros_like(array) if array.dtype.kind == "f" else array for role, array in example.arrays.items()
        }
        change = main_change(self.kind, example.target, shape=example.shape)
        assert not whole(self.kind.delta(example.target, change, zeros, 2.0), floats(zeros)).any()
        if not example.shape:
            assert self.kind.norm(example.target, zeros) == 0

    @_law
    @given(data=st.data())
    def test_the_norm_is_that_of_the_dense_change(self, data: st.DataObject) -> None:
        example = data.draw(self.examples())
        arrays = {role: array.astype(np.float64) for role, array in example.arrays.items()}
        if np.isnan(self.kind.norm(example.target, arrays)):
            assert example.shape  # Only the base knows over how much the norm goes.
            return
        expected = abs(example.target.scale) * float(np.linalg.norm(example.dense))
        # The norm comes from squares: where the change cancels to nothing, half of the digits are left.
        slack = 1e-7 * abs(example.target.scale) * float(np.linalg.norm(example.bound))
        assert self.kind.norm(example.target, arrays) == pytest.approx(expected, rel=1e-9, abs=slack)


class ReplacingKindLaws(CommonKindLaws):
    """The laws of kinds that bring the values themselves: nothing is computed, so that all holds to the bit."""

    kind: ReplacingKind

    def values(self, held: Held, parameter: str) -> Delta:
        arrays = {role: array.copy() for role, array in held.arrays.items()}
        for array in arrays.values():
            array.setflags(write=False)
        return self.kind.value(held.target, main_change(self.kind, held.target, parameter), arrays)

    def draw(self, data: st.DataObject) -> tuple[Held, str, NDArray[Any]]:
        """Return an example, one of its parameters, and the parameter's values as a matrix."""
        held = data.draw(self.examples())
        parameter = data.draw(st.sampled_from(sorted(held.arrays)))
        saved = held.arrays[parameter]
        return held, parameter, saved.reshape(len(saved), -1)

    def test_each_parameter_has_the_shape_that_was_saved(self) -> None:
        for held in draw_some(type(self)):
            parameters = {change.parameter: change.shape for change in self.kind.changes(held.target)}
            assert parameters == {role: array.shape for role, array in held.arrays.items()}
            for parameter, shape in parameters.items():
                assert self.values(held, parameter).shape == (shape[0], int(np.prod(shape[1:])))

    @_law
    @given(data=st.data())
    def test_the_values_are_the_saved_ones(self, data: st.DataObject) -> None:
        held, parameter, expected = self.draw(data)
        found = whole(self.values(held, parameter), expected.dtype)
        assert found.tobytes() == np.ascontiguousarray(expected).tobytes()

    @_law
    @given(data=st.data())
    def test_rows_by_any_tiling_are_the_whole(self, data: st.DataObject) -> None:
        held, parameter, expected = self.draw(data)
        values = self.values(held, parameter)
        cuts = sorted({0, len(expected), *data.draw(st.lists(st.integers(0, len(expected)), max_size=4))})
        tiled = np.full(expected.shape, np.nan, dtype=expected.dtype)
        for start, stop in data.draw(st.permutations(list(pairwise(cuts)))):
            values.write_rows(start, stop, tiled[start:stop])
        np.testing.assert_array_equal(tiled, expected)

    @_law
    @given(data=st.data())
    def test_the_transposed_values_are_the_transpose(self, data: st.DataObject) -> None:
        held, parameter, expected = self.draw(data)
        values = self.values(held, parameter)
        turned = values.transposed()
        assert turned.shape == values.shape[::-1]
        np.testing.assert_array_equal(whole(turned, expected.dtype), expected.T)
        cut = data.draw(st.integers(0, turned.shape[0]))
        part = np.full((turned.shape[0] - cut, turned.shape[1]), np.nan, dtype=expected.dtype)
        turned.write_rows(cut, turned.shape[0], part)
        np.testing.assert_array_equal(part, expected.T[cut:])
        np.testing.assert_array_equal(whole(turned.transposed(), expected.dtype), expected)

    def test_zeros_are_values_like_others(self) -> None:
        for target in self.targets():
            zeros = {role: MemoryFactor(role, np.zeros(factor.shape)) for role, factor in target.factors.items()}
            assert not self.kind.check(replace(target, factors=zeros))

    def test_check_refuses_a_target_without_tensors(self) -> None:
        """It would be carried out without a change, and nobody would know."""
        for target in self.targets():
            assert [problem.code for problem in self.kind.check(replace(target, factors={}))] == ["LF201"]

    @_law
    @given(data=st.data(), shape=st.sampled_from([(), (0,), (3, 0), (0, 3), (2, 0, 2), (1,) * 9]))
    def test_check_refuses_shapes_that_no_parameter_has(self, data: st.DataObject, shape: tuple[int, ...]) -> None:
        target = data.draw(self.examples()).target
        role = data.draw(st.sampled_from(sorted(target.factors)))
        factors = {**target.factors, role: MemoryFactor(role, np.ones(shape, np.float32))}
        assert [problem.code for problem in self.kind.check(replace(target, factors=factors))] == ["LF203"]

    @_law
    @given(data=st.data(), rank=st.integers(1, 99))
    def test_values_have_no_rank(self, data: st.DataObject, rank: int) -> None:
        target = data.draw(self.examples()).target
        assert target.rank == self.kind.rank(target.factors) == 0
        assert [problem.code for problem in self.kind.check(replace(target, rank=rank))] == ["LF205"]

    @_law
    @given(data=st.data(), rule=st.sampled_from(sorted(set(ScalingRule) - {ScalingRule.MULTIPLIER})))
    def test_no_rule_may_divide_by_it(self, data: st.DataObject, rule: ScalingRule) -> None:
        target = data.draw(self.examples()).target
        assert [problem.code for problem in self.kind.check(replace(target, scaling=Scaling(rule, 1.0)))] == ["LF122"]


@dataclass(frozen=True, slots=True)
class MapExample(Held):
    """A target of a kind that is a function of the base, a weight, and what becomes of it.

    Attributes:
        base: W `(out, in * kernel)`, float64.
        mapped: f(W) at the target's own scale, float64, by other means than the kind's.
        slack: how far float32 may be off, absolute.
        shape: the canonical shape that the base has, where the factors do not tell it.
    """

    base: NDArray[np.float64]
    mapped: NDArray[np.float64]
    slack: float
    shape: tuple[int, ...] = ()


def prepare(weight_map: WeightMap, base: NDArray[Any], step: int) -> WeightMap:
    """Return the map after it has seen all rows, some at a time, in memory that is used again."""

    def tiles() -> Any:
        memory = np.empty((step, base.shape[1]), base.dtype)
        for start in range(0, len(base), step):
            tile = memory[: min(step, len(base) - start)]
            tile[...] = base[start : start + step]
            yield start, tile

    return weight_map.prepare(tiles())


class MappingKindLaws(FactoredKindLaws):
    """The laws of kinds whose merged weight is a function of the base weight."""

    kind: MappingKind

    @abstractmethod
    def examples(self) -> st.SearchStrategy[MapExample]:
        """Return valid targets as `CommonKindLaws` has it, with what they must do."""

    def make_map(self, example: MapExample, dtype: Any) -> WeightMap:
        arrays = {
            role: array.astype(dtype) if array.dtype.kind == "f" else array.copy()
            for role, array in example.arrays.items()
        }
        for array in arrays.values():
            array.setflags(write=False)
        return self.kind.map(example.target, main_change(self.kind, example.target, shape=example.shape), arrays)

    def run(self, weight_map: WeightMap, base: NDArray[Any], step: int) -> NDArray[Any]:
        """Return f(W), `step` blocks of rows at a time, the last first."""
        step = max(1, step) * weight_map.row_block
        ready = prepare(weight_map, base, step)
        out = np.full_like(base, np.nan)
        for start in reversed(range(0, len(base), step)):
            stop = min(start + step, len(base))
            ready.write_rows(start, stop, base[start:stop], out[start:stop])
        return out

    @_law
    @given(data=st.data(), step=st.integers(1, 4))
    def test_the_weight_is_that_of_the_formula_for_any_tiling(self, data: st.DataObject, step: int) -> None:
        example = data.draw(self.examples())
        weight_map = self.make_map(example, np.float64)
        assert weight_map.shape == example.base.shape == example.mapped.shape
        found = self.run(weight_map, example.base, step)
        np.testing.assert_allclose(found, example.mapped, rtol=1e-9, atol=example.slack * 1e-6)

    @_few
    @given(data=st.data(), number=st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
    def test_a_base_with_a_number_that_is_none_is_no_accident(self, data: st.DataObject, number: float) -> None:
        example = data.draw(self.examples())
        base = example.base.astype(np.float32)
        base.flat[data.draw(st.integers(0, base.size - 1))] = number
        with np.errstate(all="ignore"):
            found = self.run(self.make_map(example, np.float32), base, len(base))
        assert found.shape == base.shape

    @_law
    @given(data=st.data(), step=st.integers(1, 4))
    def test_float32_is_close(self, data: st.DataObject, step: int) -> None:
        example = data.draw(self.examples())
        found = self.run(self.make_map(example, np.float32), example.base.astype(np.float32), step)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, example.mapped, rtol=1e-5, atol=example.slack)

    @_law
    @given(data=st.data(), step=st.integers(1, 4))
    def test_the_transposed_map_is_the_map_of_the_transpose(self, data: st.DataObject, step: int) -> None:
        example = data.draw(self.examples())
        turned = self.make_map(example, np.float64).transposed()
        assert turned.shape == example.base.shape[::-1]
        found = self.run(turned, np.ascontiguousarray(example.base.T), step)
        np.testing.assert_allclose(found, example.mapped.T, rtol=1e-9, atol=example.slack * 1e-6)

    def test_it_says_beforehand_which_rows_it_must_see_together(self) -> None:
        for example in draw_some(type(self)):
            assert isinstance(example, MapExample)
            change = main_change(self.kind, example.target, shape=example.shape)
            weight_map = self.make_map(example, np.float64)
            for turned, found in ((False, weight_map), (True, weight_map.transposed())):
                assert self.kind.count_rows_together(example.target, change, transposed=turned) == found.row_block >= 1
                assert found.shape[0] % found.row_block == 0
