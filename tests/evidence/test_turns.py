"""Modules whose rows take turns in one matrix, and modules stored apart: found by their numbers, or refused."""

import json
from pathlib import Path

import numpy as np
import pytest

import loraformat
from builders import write_peft, write_tensors
from graphs import Array, Net, dyadic_factors, product, write_model
from graphs import stored_weights as stored

HEADS, SIZE, IN, RANK = 3, 4, 10, 2
ROWS = HEADS * SIZE
PARTS = tuple(f"h.0.attention.{name}" for name in ("q_proj", "k_proj", "v_proj"))
WHOLE = "h.0.attention.query_key_value"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(12)


def in_turns(parts: dict[str, Array]) -> Array:
    """Return `(3 * rows, in)`, of each head first its queries, then its keys, then its values."""
    heads = np.stack([part.reshape(HEADS, SIZE, IN) for part in parts.values()], axis=1)
    return heads.reshape(-1, IN)


def write_graph(path: Path, *weights: Array, turned: bool = True) -> Path:
    """Write a product for each `(out, in)` matrix; nothing has a name."""
    net = Net()
    for index, weight in enumerate(weights):
        held = net.weight(f"v{index}", weight.T if turned else weight)
        net.op("Gemm", [net.feed(f"x{index}"), held], net.result(f"y{index}"), f"n{index}", transB=int(not turned))
    return write_model(path, net.model())


class Case:
    def __init__(self, folder: Path, base: Path, state: dict[str, Array], rng: np.random.Generator) -> None:
        self.folder, self.base = folder, base
        factors = {name: dyadic_factors(rng, *values.shape, RANK) for name, values in state.items()}
        self.deltas = {name: product(pair) for name, pair in factors.items()}
        self.adapter = write_peft(folder / "adapter", factors, alpha=float(RANK))
        tensors = {f"{name}.weight": values for name, values in state.items()}
        self.checkpoint = write_tensors(folder / "model.safetensors", tensors)

    def merge(self) -> dict[str, Array]:
        """Merge by values; the same must come of what `resolve` prints."""
        found = loraformat.resolve_targets(self.base, self.adapter, base_checkpoint=self.checkpoint)
        self.found = found.targets
        (self.folder / "map.json").write_text(json.dumps(found.as_json()))
        loraformat.merge(self.base, [self.adapter], self.folder / "a.onnx", base_checkpoint=self.checkpoint)
        loraformat.merge(self.base, [self.adapter], self.folder / "b.onnx", map=self.folder / "map.json")
        after = stored(self.folder / "a.onnx")
        assert all(values.tobytes() == stored(self.folder / "b.onnx")[name].tobytes() for name, values in after.items())
        return after


def random(rng: np.random.Generator, *shape: int) -> Array:
    return np.asarray(rng.standard_normal(shape), np.float32)


@pytest.mark.parametrize("turned", [True, False])
def test_heads_of_three_modules_in_one_matrix(tmp_path: Path, rng: np.random.Generator, turned: bool) -> None:
    parts = {name: random(rng, ROWS, IN) for name in PARTS}
    packed = in_turns(parts)
    case = Case(tmp_path, write_graph(tmp_path / "base.onnx", packed, turned=turned), parts, rng)
    after = case.merge()["v0"]
    expected = (packed.astype(np.float64) + in_turns(case.deltas)).astype(np.float32)
    np.testing.assert_array_equal(after.T if turned else after, expected)
    assert {found.evidence for found in case.found} == {"3 runs of 4 rows, every 12 rows"}
    assert {found.strategy for found in case.found} == {"values"}
    assert [(f.section, f.rows) for f in case.found if f.target == PARTS[1]] == [
        ((0, 4), (4, 8)),
        ((4, 8), (16, 20)),
        ((8, 12), (28, 32)),
    ]


def test_two_modules_row_by_row(tmp_path: Path, rng: np.random.Generator) -> None:
    """As gates and what they gate lie in gpt-oss."""
    parts = {f"h.0.mlp.{name}": random(rng, ROWS, IN) for name in ("gate_proj", "up_proj")}
    packed = np.stack(list(parts.values()), axis=1).reshape(-1, IN)
    case = Case(tmp_path, write_graph(tmp_path / "base.onnx", packed), parts, rng)
    expected = packed.astype(np.float64) + np.stack(list(case.deltas.values()), axis=1).reshape(-1, IN)
    np.testing.assert_array_equal(case.merge()["v0"].T, expected.astype(np.float32))
    assert [(found.evidence, found.section, found.rows) for found in case.found] == [
        ("one row in 2, from row 0", None, (0, 23, 2)),
        ("one row in 2, from row 1", None, (1, 24, 2)),
    ]


def test_one_module_in_three_matrices(tmp_path: Path, rng: np.random.Generator) -> None:
    """The checkpoint has heads in turns, the graph what is alike together."""
    parts = {name: random(rng, ROWS, IN) for name in PARTS}
    other = random(rng, ROWS, IN)
    base = write_graph(tmp_path / "base.onnx", *parts.values(), other)
    case = Case(tmp_path, base, {WHOLE: in_turns(parts)}, rng)
    after = case.merge()
    changed = case.deltas[WHOLE].reshape(HEADS, 3, SIZE, IN)
    for index, values in enumerate(parts.values()):
        expected = values.astype(np.float64) + changed[:, index].reshape(-1, IN)
        np.testing.assert_array_equal(after[f"v{index}"].T, expected.astype(np.float32))
    np.testing.assert_array_equal(after["v3"].T, other)
    assert len(case.found) == 3 * HEADS


def unordered(parts: dict[str, Array], rng: np.random.Generator) -> Array:
    return np.concatenate(list(parts.values()))[rng.permutation(3 * ROWS)]


def doubled(parts: dict[str, Array], rng: np.random.Generator) -> Array:
    return np.concatenate([in_turns(parts), in_turns(parts)])


def of_unlike_heads(parts: dict[str, Array], rng: np.random.Generator) -> Array:
    """The second head's values stand before its keys and queries."""
    packed = in_turns(parts).reshape(HEADS, 3, SIZE, IN)
    packed[1] = packed[1, ::-1].copy()
    return packed.reshape(-1, IN)


@pytest.mark.parametrize("arrange", [unordered, doubled])
def test_rows_without_an_order_are_refused(tmp_path: Path, rng: np.random.Generator, arrange: object) -> None:
    parts = {name: random(rng, ROWS, IN) for name in PARTS}
    base = write_graph(tmp_path / "base.onnx", arrange(parts, rng))  # type: ignore[operator]
    case = Case(tmp_path, base, parts, rng)
    with pytest.raises(loraformat.LoraformatError) as caught:
        case.merge()
    assert set(caught.value.codes) <= {"LF401", "LF404"}


def test_heads_that_do_not_lie_alike_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    parts = {name: random(rng, ROWS, IN) for name in PARTS}
    base = write_graph(tmp_path / "base.onnx", of_unlike_heads(parts, rng))
    case = Case(tmp_path, base, {PARTS[0]: parts[PARTS[0]]}, rng)
    with pytest.raises(loraformat.LoraformatError) as caught:
        case.merge()
    assert caught.value.codes == ("LF401",)


def test_one_of_three_matrices_has_other_numbers(tmp_path: Path, rng: np.random.Generator) -> None:
    parts = {name: random(rng, ROWS, IN) for name in PARTS}
    base = write_graph(tmp_path / "base.onnx", *list(parts.values())[:2], random(rng, ROWS, IN))
    case = Case(tmp_path, base, {WHOLE: in_turns(parts)}, rng)
    with pytest.raises(loraformat.LoraformatError) as caught:
        case.merge()
    assert caught.value.codes == ("LF401",)


def test_a_factor_in_the_queries_of_a_packed_matrix(tmp_path: Path, rng: np.random.Generator) -> None:
    """The queries' part of the matrix was multiplied by 1/√(size of a head): the change is too, that of keys is not."""
    parts = {name: random(rng, ROWS, IN) for name in PARTS}
    factor = SIZE**-0.5
    packed = np.concatenate([parts[PARTS[0]] * np.float32(factor), parts[PARTS[1]], parts[PARTS[2]]])
    case = Case(tmp_path, write_graph(tmp_path / "base.onnx", packed), parts, rng)
    loraformat.merge(case.base, [case.adapter], tmp_path / "m.onnx", base_checkpoint=case.checkpoint)
    deltas = [case.deltas[PARTS[0]] * factor, case.deltas[PARTS[1]], case.deltas[PARTS[2]]]
    expected = packed.astype(np.float64) + np.concatenate(deltas)
    np.testing.assert_array_equal(stored(tmp_path / "m.onnx")["v0"].T, expected.astype(np.float32))


def test_a_factor_in_queries_that_take_turns_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    parts = {name: random(rng, ROWS, IN) for name in PARTS}
    packed = in_turns({**parts, PARTS[0]: parts[PARTS[0]] * np.float32(0.5)})
    case = Case(tmp_path, write_graph(tmp_path / "base.onnx", packed), parts, rng)
    with pytest.raises(loraformat.LoraformatError) as caught:
        case.merge()
    assert caught.value.codes == ("LF401",)
    assert PARTS[0] in str(caught.value)
