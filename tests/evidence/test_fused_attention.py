"""Roles in stacks whose attention is one operator: each change comes to its own rows, or nothing is merged."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import loraformat
from builders import write_peft
from graphs import Array, dyadic_factors, product, stored_weights, write_model
from stacks import FUSED, HIDDEN, INNER, NAMES, RANK, WIDTH, FusedStack

NARROW = WIDTH // 2
OTHERS = {"output": (HIDDEN, WIDTH), "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}


def shapes(operator: str) -> dict[str, tuple[int, int]]:
    """Return the shapes of all modules of a layer."""
    narrow = WIDTH if operator in ("attention", "multi-head") else NARROW
    return {"query": (WIDTH, HIDDEN), "key": (narrow, HIDDEN), "value": (narrow, HIDDEN)} | OTHERS


class Case:
    """A stack as a file, and an adapter of some modules of all its layers."""

    def __init__(self, folder: Path, stack: FusedStack, modules: Mapping[str, tuple[str, tuple[int, int]]]) -> None:
        """Take modules by role, each with its name and shape."""
        rng = np.random.default_rng(8)
        self.stack, self.folder = stack, folder
        self.factors = {
            f"model.layers.{number}.{name}": dyadic_factors(rng, *shape, RANK)
            for number in range(stack.layers)
            for name, shape in modules.values()
        }
        self.deltas = {
            (number, role): product(self.factors[f"model.layers.{number}.{name}"])
            for number in range(stack.layers)
            for role, (name, _) in modules.items()
        }
        self.base = write_model(folder / "base.onnx", stack.net.model(check=False))
        self.adapter = write_peft(folder / "adapter", self.factors, alpha=float(RANK))

    def check(self, starts: Mapping[str, tuple[str, int]]) -> None:
        """Merge; each role's change must lie in the weight of a role, from a row on, and nothing else may differ."""
        wanted = {name: old.astype(np.float64) for name, old in stored_weights(self.base).items()}
        for (number, role), delta in self.deltas.items():
            holder, start = starts.get(role, (role, 0))
            wanted[self.stack.weights[number, holder]][:, start : start + len(delta)] += delta.T
        loraformat.merge(self.base, [self.adapter], self.folder / "merged.onnx", resolve="structure")
        for name, values in stored_weights(self.folder / "merged.onnx").items():
            np.testing.assert_array_equal(values, wanted[name].astype(values.dtype), err_msg=name)
        self.check_map()

    def check_map(self) -> None:
        found = loraformat.resolve_targets(self.base, self.adapter, resolve="structure")
        (self.folder / "map.json").write_text(json.dumps(found.as_json()))
        mapped: Array = loraformat.resolve_targets(self.base, self.adapter, map=self.folder / "map.json")
        assert [(t.target, t.weight, t.rows, t.sites) for t in mapped.targets] == [
            (t.target, t.weight, t.rows, t.sites) for t in found.targets
        ]

    def refusal(self) -> str:
        with pytest.raises(loraformat.LoraformatError) as caught:
            loraformat.merge(self.base, [self.adapter], self.folder / "merged.onnx", resolve="structure")
        assert set(caught.value.codes) == {"LF425", "LF401"}
        assert not (self.folder / "merged.onnx").exists()
        return str(caught.value)


def named(operator: str, **more: tuple[str, tuple[int, int]]) -> dict[str, tuple[str, tuple[int, int]]]:
    """Return all modules of a layer, or some in the place of those that `more` holds."""
    left_out = {"whole": {"query", "key", "value"}, "gates": {"gate", "up"}}
    gone = set().union(*(left_out[role] for role in more))
    return {role: (NAMES[role], shape) for role, shape in shapes(operator).items() if role not in gone} | more


PACKED = {"query": ("qkv", 0), "key": ("qkv", WIDTH)}
PLACES = {
    "attention": PACKED | {"value": ("qkv", 2 * WIDTH)},
    "packed": PACKED | {"value": ("qkv", WIDTH + NARROW)},
}


@pytest.mark.parametrize("operator", FUSED)
def test_every_change_comes_to_its_own_rows(tmp_path: Path, operator: str) -> None:
    Case(tmp_path, FusedStack(operator=operator), named(operator)).check(PLACES.get(operator, {}))


def test_values_of_another_size(tmp_path: Path) -> None:
    """The operator says how wide the three are."""
    sizes = [NARROW, NARROW, 2 * WIDTH]
    stack = FusedStack(operator="attention", attributes={"qkv_hidden_sizes": sizes})
    modules = {r: (NAMES[r], (n, HIDDEN)) for r, n in zip(("query", "key", "value"), sizes, strict=True)}
    starts = {"query": ("qkv", 0), "key": ("qkv", NARROW), "value": ("qkv", 2 * NARROW)}
    Case(tmp_path, stack, modules).check(starts)


def test_rotations_by_an_operator(tmp_path: Path) -> None:
    Case(tmp_path, FusedStack(flags=frozenset({"rotated"})), named("grouped")).check({})


@pytest.mark.parametrize("operator", ["attention", "packed"])
def test_a_module_that_has_all_three(tmp_path: Path, operator: str) -> None:
    rows = 3 * WIDTH if operator == "attention" else 2 * WIDTH
    modules = named(operator, whole=("self_attn.qkv_proj", (rows, HIDDEN)))
    Case(tmp_path, FusedStack(operator=operator), modules).check({"whole": ("qkv", 0)})


def test_gates_in_one_matrix_behind_what_they_gate(tmp_path: Path) -> None:
    stack = FusedStack(flags=frozenset({"one matrix"}))
    Case(tmp_path, stack, named("grouped")).check({"up": ("gate_up", 0), "gate": ("gate_up", INNER)})


def test_modules_that_are_stored_in_parts(tmp_path: Path) -> None:
    """Queries, keys and values of one module lie in three tensors, gates and ups in two."""
    whole = {"whole": ("self_attn.qkv_proj", (2 * WIDTH, HIDDEN)), "gates": ("mlp.gate_up_proj", (2 * INNER, HIDDEN))}
    case = Case(tmp_path, FusedStack(), named("grouped", **whole))
    before = stored_weights(case.base)
    loraformat.merge(case.base, [case.adapter], tmp_path / "merged.onnx", resolve="structure")
    after = stored_weights(tmp_path / "merged.onnx")
    for number in range(case.stack.layers):
        for role, members in {"whole": ("query", "key", "value"), "gates": ("gate", "up")}.items():
            names = [case.stack.weights[number, member] for member in members]
            changes = [after[name].astype(np.float64) - before[name] for name in names]
            np.testing.assert_array_equal(np.concatenate(changes, axis=1).T, case.deltas[number, role])
    case.check_map()


UNSOUND = {
    "a scale of its own": (FusedStack(attributes={"scale": 1.0}), "multiplies its scores by 1, with heads of 8"),
    "heads that do not fit": (FusedStack(attributes={"num_heads": 3}), "into (3, 1) heads"),
    "a third of the rows for heads of another number": (
        FusedStack(operator="attention", attributes={"num_heads": 5}),
        "cuts 48 rows into [16, 16, 16], for 5 heads",
    ),
    "sizes that are not those of the matrix": (
        FusedStack(operator="attention", attributes={"qkv_hidden_sizes": [16, 16, 8]}),
        "cuts 48 rows into [16, 16, 8]",
    ),
    "heads in turns": (
        FusedStack(operator="multi-head", flags=frozenset({"head by head"})),
        "in 1 inputs, head by head",
    ),
    "rotations of neighbours": (FusedStack(flags=frozenset({"interleaved"})), "rotates neighbouring numbers"),
    "rotations of neighbours within": (FusedStack(attributes={"rotary_interleaved": 1}), "rotates neighbouring"),
    "keys of something else": (FusedStack(flags=frozenset({"crossed"})), "attends to different things"),
    "rows that something moves": (FusedStack(operator="packed", flags=frozenset({"sliced"})), "through Transpose"),
    "an operator that is not known": (FusedStack(flags=frozenset({"unknown"})), "whose inputs are not known"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_attention_that_is_not_surely_read_tells_nothing(tmp_path: Path, case: str) -> None:
    stack, words = UNSOUND[case]
    assert words in Case(tmp_path, stack, named(stack.operator)).refusal()


@pytest.mark.parametrize("operator", ["attention", "grouped"])
def test_a_module_whose_rows_may_be_in_turns(tmp_path: Path, operator: str) -> None:
    rows = 3 * WIDTH if operator == "attention" else 2 * WIDTH
    modules = named(operator, whole=("self_attention.query_key_value", (rows, HIDDEN)))
    assert "may have them in turns" in Case(tmp_path, FusedStack(operator=operator), modules).refusal()
