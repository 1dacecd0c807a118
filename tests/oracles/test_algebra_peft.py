"""`compose` against PEFT's `add_weighted_adapter`: equal where the definitions are, and different where we say so."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

import loraformat
from loraformat.adapter import Adapter, Target

if TYPE_CHECKING:
    from peft import PeftModel

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

Deltas = dict[str, NDArray[np.float64]]
NAMES = ("first", "second", "third")
WEIGHTS = (0.7, -0.3, 0.5)
RANK = 4
MODULES = ("q", "c", "e")
FULL = 6
"""The rank to which PEFT is asked to cut: the smallest dimension, beyond which its reshaping of convolutions fails."""


def build(folder: Path, first: Mapping[str, Any] | None = None, **shared: Any) -> "PeftModel":
    """Return a model with three adapters of random numbers, saved in `folder`.

    Args:
        folder: where to save.
        first: what is different in the first one's configuration.
        shared: what is different in all.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"q": nn.Linear(12, 20), "c": nn.Conv2d(3, 8, (3, 2)), "e": nn.Embedding(17, 6), "t": Conv1D(14, 9)}
    )
    shared = {"r": RANK, "init_lora_weights": False, "target_modules": list(MODULES)} | shared
    configs = {
        "first": LoraConfig(lora_alpha=6, **(shared | dict(first or {}))),
        "second": LoraConfig(lora_alpha=3, use_rslora=True, **shared),
        "third": LoraConfig(lora_alpha=8, **shared),
    }
    peft = get_peft_model(model, configs["first"], adapter_name="first")
    for name in ("second", "third"):
        peft.add_adapter(name, configs[name])
    peft.save_pretrained(str(folder), selected_adapters=list(NAMES))
    return peft


def combined(
    peft: "PeftModel", weights: Sequence[float], method: str, names: Sequence[str] = NAMES, **options: Any
) -> Deltas:
    """Return the change of every module under PEFT's combination, as a matrix `(out, in * kernel)`."""
    name = f"combined{len(peft.peft_config)}"
    peft.base_model.add_weighted_adapter(list(names), list(weights), name, combination_type=method, **options)
    return deltas(peft, name)


def deltas(peft: "PeftModel", name: str) -> Deltas:
    found = {}
    for path in "qcet":
        layer = peft.base_model.model[path]
        if name not in getattr(layer, "scaling", ()):
            continue
        delta = layer.get_delta_weight(name).detach().double().numpy()
        found[path] = delta.T if path in "et" else delta.reshape(delta.shape[0], -1)
    return found


def ours(adapter: Adapter) -> Deltas:
    return {target.name: delta_of(target) for target in adapter.targets}


def delta_of(target: Target) -> NDArray[np.float64]:
    down, up = (target.factors[role].read().astype(np.float64) for role in sorted(target.factors))
    return target.scale * up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)


def distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def assert_same(found: Deltas, expected: Deltas, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        assert distance(found[path], delta) < tolerance, path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("algebra")


@pytest.fixture(scope="module")
def peft(folder: Path) -> "PeftModel":
    return build(folder)


@pytest.fixture(scope="module")
def items(peft: "PeftModel", folder: Path) -> list[tuple[Adapter, float]]:
    adapters = [loraformat.load(folder / name) for name in NAMES]
    for name, adapter in zip(NAMES, adapters, strict=True):
        assert_same(ours(adapter), deltas(peft, name))  # What is composed is what PEFT has.
    return list(zip(adapters, WEIGHTS, strict=True))


# --- where the definitions are the same ------------------------------------------------------------------------------


def test_cat_is_the_sum(peft: "PeftModel", items: list[tuple[Adapter, float]]) -> None:
    made = loraformat.compose(items)
    assert_same(ours(made), combined(peft, WEIGHTS, "cat"))
    assert {target.rank for target in made.targets} == {3 * RANK}


def test_svd_is_the_sum_cut(peft: "PeftModel", items: list[tuple[Adapter, float]]) -> None:
    assert_same(ours(loraformat.compose(items, rank=RANK)), combined(peft, WEIGHTS, "svd", svd_rank=RANK), 1e-5)


def test_magnitude_pruning(peft: "PeftModel", items: list[tuple[Adapter, float]]) -> None:
    expected = combined(peft, WEIGHTS, "magnitude_prune_svd", svd_rank=FULL, density=0.4)
    assert_same(ours(loraformat.compose(items, "magnitude-prune", density=0.4, rank=FULL)), expected, 1e-4)


def test_ties_of_equal_weights(peft: "PeftModel", items: list[tuple[Adapter, float]]) -> None:
    expected = combined(peft, (1.0, 1.0, 1.0), "ties_svd", svd_rank=FULL, density=0.4)
    made = loraformat.compose([adapter for adapter, _ in items], "ties", density=0.4, rank=FULL)
    assert_same(ours(made), expected, 1e-4)


def test_dare_that_drops_nothing(peft: "PeftModel", items: list[tuple[Adapter, float]]) -> None:
    with pytest.warns(UserWarning, match="no pruning"):
        expected = combined(peft, WEIGHTS, "dare_linear_svd", svd_rank=FULL, density=1.0)
    assert_same(ours(loraformat.compose(items, "dare", density=1.0, rank=FULL)), expected, 1e-4)


def test_transposed_weights(tmp_path: Path) -> None:
    peft = build(tmp_path, target_modules=["t"], fan_in_fan_out=True)
    items = [(loraformat.load(tmp_path / name), weight) for name, weight in zip(NAMES, WEIGHTS, strict=True)]
    made = loraformat.compose(items)
    assert [target.slot.value for target in made.targets] == ["linear-transposed"]
    assert_same(ours(made), combined(peft, WEIGHTS, "cat"))
    assert_same(ours(loraformat.compose(items, rank=RANK)), combined(peft, WEIGHTS, "svd", svd_rank=RANK), 1e-5)


def test_a_target_that_one_adapter_lacks(tmp_path: Path) -> None:
    peft = build(tmp_path, {"target_modules": ["q"]})
    adapters = [loraformat.load(tmp_path / name) for name in NAMES]
    assert [target.name for target in adapters[0].targets] == ["q"]
    assert_same(ours(loraformat.compose(list(zip(adapters, WEIGHTS, strict=True)))), combined(peft, WEIGHTS, "cat"))


# --- where they are not ----------------------------------------------------------------------------------------------


def test_linear_of_peft_adds_factors(peft: "PeftModel", items: list[tuple[Adapter, float]]) -> None:
    """Half of an adapter and the same half again are twice the adapter for PEFT: it adds factors, not changes."""
    adapter = items[0][0]
    halves = combined(peft, (0.5, 0.5), "linear", names=("first", "first"))
    assert_same(halves, {path: 2 * delta for path, delta in ours(adapter).items()})
    assert_same(ours(0.5 * adapter + 0.5 * adapter), ours(adapter))
    others = combined(peft, WEIGHTS, "linear")
    assert all(distance(others[path], delta) > 0.5 for path, delta in ours(loraformat.compose(items)).items())


def test_ties_of_peft_on_factors_is_none_of_the_changes(peft: "PeftModel", items: list[tuple[Adapter, float]]) -> None:
    on_factors = combined(peft, (1.0, 1.0, 1.0), "ties", density=0.4)
    made = loraformat.compose([adapter for adapter, _ in items], "ties", density=0.4, rank=FULL)
    assert all(distance(on_factors[path], delta) > 0.5 for path, delta in ours(made).items())


def test_ties_of_peft_elects_without_the_weights(peft: "PeftModel", items: list[tuple[Adapter, float]]) -> None:
    """PEFT prunes, elects and only then weighs; we elect on what is added up, as mergekit does."""
    kept = {}
    for path in MODULES:
        parts = np.stack([top(ours(adapter)[path], 0.4) for adapter, _ in items])
        weighted = parts * np.array(WEIGHTS)[:, None, None]
        kept[path] = [cut(disjoint_mean(weighted, votes), FULL) for votes in (parts, weighted)]
    expected = combined(peft, WEIGHTS, "ties_svd", svd_rank=FULL, density=0.4)
    assert_same({path: theirs for path, (theirs, _) in kept.items()}, expected, 1e-4)
    made = ours(loraformat.compose(items, "ties", density=0.4, rank=FULL))
    assert_same(made, {path: mine for path, (_, mine) in kept.items()}, 1e-4)
    assert all(distance(made[path], delta) > 0.1 for path, delta in expected.items())


def top(matrix: NDArray[np.float64], density: float) -> NDArray[np.float64]:
    limit = np.sort(np.abs(matrix), axis=None)[-int(density * matrix.size)]
    return np.where(np.abs(matrix) >= limit, matrix, 0)


def disjoint_mean(weighted: NDArray[np.float64], votes: NDArray[np.float64]) -> NDArray[np.float64]:
    agree = np.sign(votes) == np.where(votes.sum(0) >= 0, 1, -1)
    mean: NDArray[np.float64] = (weighted * agree).sum(0) / np.maximum(1, agree.sum(0))
    return mean


def cut(matrix: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    best: NDArray[np.float64] = (left[:, :rank] * sizes[:rank]) @ right[:rank]
    return best


def test_dare_of_peft_has_no_seed(peft: "PeftModel", items: list[tuple[Adapter, float]]) -> None:
    options = {"svd_rank": FULL, "density": 0.5}
    once, again = (combined(peft, WEIGHTS, "dare_linear_svd", **options)["q"] for _ in range(2))
    assert distance(once, again) > 0.1
    mine = [ours(loraformat.compose(items, "dare", density=0.5, rank=FULL, seed=3))["q"] for _ in range(2)]
    np.testing.assert_array_equal(*mine)


def test_cat_of_peft_inherits_rslora(tmp_path: Path) -> None:
    """The new adapter has alpha = r, and the first one's rule: with rsLoRA it is √r too strong (peft#3761)."""
    peft = build(tmp_path, {"use_rslora": True})
    items = [(loraformat.load(tmp_path / name), weight) for name, weight in zip(NAMES, WEIGHTS, strict=True)]
    made = ours(loraformat.compose(items))
    assert_same({path: np.sqrt(3 * RANK) * delta for path, delta in made.items()}, combined(peft, WEIGHTS, "cat"))
    whole = [deltas(peft, name) for name in NAMES]
    expected = {path: sum(w * d[path] for w, d in zip(WEIGHTS, whole, strict=True)) for path in MODULES}
    assert_same(made, expected)
