"""Dense differences: the numbers are those of the file, times s, whole or streamed, and what shapes are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

import loraformat
from builders import MemoryFactor, write_tensors
from laws.kind_laws import Example, KindLaws, whole
from loraformat.adapter import Adapter, PartialFactor, Scaling, ScalingRule, SlotKind, Target
from loraformat.containers.safetensors import CONTAINER
from loraformat.kinds import Nature
from loraformat.kinds.diff import KIND

SHAPES: dict[SlotKind, list[tuple[int, ...]]] = {
    SlotKind.LINEAR: [(2, 5), (7, 3), (1, 4)],
    SlotKind.CONV: [(2, 3, 4), (3, 2, 1, 1), (4, 3, 2, 5), (2, 3, 1, 2, 4)],
    SlotKind.PARAMETER: [(7,), (2, 5), (3, 2, 4), (2,) * 8],
}


def make_target(slot: SlotKind, scale: float = 1.0, **arrays: NDArray[Any]) -> Target:
    factors = {role: MemoryFactor(role, array) for role, array in arrays.items()}
    return Target("m.q", "diff", slot, factors, 0, Scaling(ScalingRule.MULTIPLIER, scale))


@st.composite
def differences(draw: st.DrawFn) -> Example:
    slot = draw(st.sampled_from(sorted(SHAPES)))
    shape = draw(st.sampled_from(SHAPES[slot]))
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    role = draw(st.sampled_from(["diff", "w_norm"])) if slot is SlotKind.PARAMETER else "diff"
    arrays = {role: dice.standard_normal(shape).astype(dtype)}
    if draw(st.booleans()):
        bias = "b_norm" if role == "w_norm" else "diff_b"
        arrays[bias] = dice.standard_normal(shape[0]).astype(dtype)
    target = make_target(slot, draw(st.sampled_from([1.0, 0.3, -2.0])), **arrays)
    dense = arrays[role].astype(np.float64).reshape(shape[0], -1)
    return Example(target, arrays, dense, np.abs(dense))


class TestDiff(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return differences()

    def test_check_names_a_role_that_is_missing(self) -> None:
        """None is needed by itself; without any there is nothing to do."""
        assert codes(make_target(SlotKind.LINEAR)) == ["LF201"]

    def test_each_target_has_roles_that_it_needs(self) -> None:
        assert all(roles.optional for roles in KIND.role_sets)


def codes(target: Target) -> list[str]:
    return [problem.code for problem in KIND.check(target)]


def test_weight_and_bias_are_two_changes() -> None:
    dice = np.random.default_rng(0)
    arrays = {"diff": dice.standard_normal((4, 3)), "diff_b": dice.standard_normal(4)}
    target = make_target(SlotKind.LINEAR, **arrays)
    changes = {change.parameter: change for change in KIND.changes(target)}
    assert {name: (change.shape, change.slot) for name, change in changes.items()} == {
        "weight": ((4, 3), SlotKind.LINEAR),
        "bias": ((4,), SlotKind.PARAMETER),
    }
    assert {change.nature for change in changes.values()} == {Nature.ADDITIVE}
    bias = KIND.delta(target, changes["bias"], arrays, 2.0)
    np.testing.assert_array_equal(whole(bias, np.float64), 2 * arrays["diff_b"][:, None])


@pytest.mark.parametrize(
    ("slot", "arrays"),
    [
        (SlotKind.LINEAR, {"diff": (4,)}),
        (SlotKind.LINEAR, {"diff": (4, 3, 1)}),
        (SlotKind.CONV, {"diff": (4, 3)}),
        (SlotKind.LINEAR, {"diff": (4, 0)}),
        (SlotKind.LINEAR, {"diff": (4, 3), "diff_b": (3,)}),
        (SlotKind.LINEAR, {"diff_b": (4, 1)}),
        (SlotKind.PARAMETER, {"w_norm": (4,), "diff": (4,)}),
        (SlotKind.PARAMETER, {"w_norm": (4,), "b_norm": (5,)}),
        (SlotKind.PARAMETER, {"w_norm": (1,) * 9}),
    ],
    ids=str,
)
def test_shapes_that_no_module_has(slot: SlotKind, arrays: dict[str, tuple[int, ...]]) -> None:
    assert codes(make_target(slot, **{role: np.ones(shape, np.float32) for role, shape in arrays.items()})) == ["LF203"]


def test_it_has_no_rank_to_divide_by() -> None:
    target = make_target(SlotKind.LINEAR, diff=np.ones((4, 3)))
    scaling = Scaling(ScalingRule.ALPHA_OVER_RANK, 1.0)
    assert codes(Target("m.q", "diff", SlotKind.LINEAR, target.factors, 0, scaling)) == ["LF122"]


@pytest.mark.parametrize("form", [np.float32, np.float16])
def test_a_stream_is_the_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    """Row by row, column by column where it is turned, any part of it, whatever is read at a time."""
    monkeypatch.setattr("loraformat.kinds._streams.STREAM_BYTES", 40)
    saved = np.random.default_rng(0).standard_normal((11, 7)).astype(form)
    opened = CONTAINER.open(write_tensors(tmp_path / "d.safetensors", {"m.diff": saved}))
    target = Target(
        "m", "diff", SlotKind.LINEAR, {"diff": opened.tensors["m.diff"]}, 0, Scaling(ScalingRule.MULTIPLIER, 1)
    )
    assert isinstance(target.factors["diff"], PartialFactor)
    for scale in (1.0, 0.3):
        expected = (saved.astype(np.float64) * scale).astype(np.float32)
        stream = KIND.delta(target, KIND.changes(target)[0], target.factors, scale)
        np.testing.assert_array_equal(whole(stream, np.float32), expected)
        turned = stream.transposed()
        np.testing.assert_array_equal(whole(turned, np.float32), expected.T)
        rows, columns = slice(1, 10, 3), slice(2, 7, 2)
        np.testing.assert_array_equal(whole(stream.part(rows, columns), np.float32), expected[rows, columns])
        np.testing.assert_array_equal(whole(turned.part(columns, rows), np.float32), expected.T[columns, rows])
        np.testing.assert_array_equal(
            whole(turned.part(columns, rows).transposed(), np.float32), expected[rows, columns]
        )
        backwards = np.empty((7, 11), np.float32)
        for start in (5, 3, 0):
            turned.write_rows(start, min(start + 3, 7), backwards[start : start + 3])
        np.testing.assert_array_equal(backwards, expected.T)


def test_its_norm_is_that_of_the_stream(tmp_path: Path) -> None:
    saved = np.random.default_rng(1).standard_normal((3000, 5)).astype(np.float32)
    opened = CONTAINER.open(write_tensors(tmp_path / "d.safetensors", {"m.diff": saved}))
    scaling = Scaling(ScalingRule.MULTIPLIER, -0.5)
    target = Target("m", "diff", SlotKind.LINEAR, dict(zip(["diff"], opened.tensors.values(), strict=True)), 0, scaling)
    assert KIND.norm(target, target.factors) == pytest.approx(0.5 * np.linalg.norm(saved.astype(np.float64)))


def test_a_difference_larger_than_the_memory_budget_is_merged(tmp_path: Path) -> None:
    """24 MB of numbers under a budget of 23 MB: held whole, with its working copies, it would be refused (LF607)."""
    dice = np.random.default_rng(2)
    base, change = (dice.standard_normal((3000, 2000)).astype(np.float32) for _ in range(2))
    path = write_tensors(tmp_path / "base.safetensors", {"m.q.weight": base})
    opened = CONTAINER.open(write_tensors(tmp_path / "d.safetensors", {"m.q.diff": change}))
    scaling = Scaling(ScalingRule.MULTIPLIER, 0.5)
    factors = {"diff": opened.tensors["m.q.diff"]}
    adapter = Adapter((Target("m.q", "diff", SlotKind.LINEAR, factors, 0, scaling),))
    receipt = loraformat.merge(path, [adapter], tmp_path / "out.safetensors", jobs=1, max_memory_bytes=23 << 20)
    found = CONTAINER.open(Path(receipt.output)).tensors["m.q.weight"].read()
    np.testing.assert_array_equal(found, base + (change.astype(np.float64) * 0.5).astype(np.float32))
