"""Analysis: shares, modules, layers, comparisons, amplification, and what it leaves out or refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from builders import Factors, write_peft, write_tensors
from loraformat.algebra._directions import name_modules
from loraformat.problems import Problem

LAYERS, MODULES = 3, {"self_attn.q_proj": (40, 24), "mlp.up_proj": (56, 24)}


def make_factors(seed: int, rank: int) -> dict[str, Factors]:
    rng = np.random.default_rng(seed)
    return {
        f"model.layers.{layer}.{module}": (
            rng.standard_normal((rank, shape[1])).astype("f4"),
            (0.1 * (layer + 1) * rng.standard_normal((shape[0], rank))).astype("f4"),
        )
        for layer in range(LAYERS)
        for module, shape in MODULES.items()
    }


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [
        write_peft(tmp_path / "first", make_factors(1, 4), alpha=8),
        write_peft(tmp_path / "second", make_factors(2, 6), alpha=6),
    ]


def test_energy_adds_up_and_falls_where_the_change_is(adapters: list[Path]) -> None:
    (shown,) = loraformat.analyse(adapters[0]).adapters
    deltas = {name: 2.0 * up.astype("f8") @ down for name, (down, up) in make_factors(1, 4).items()}
    whole = sum(np.linalg.norm(delta) ** 2 for delta in deltas.values())
    assert shown.norm == pytest.approx(whole**0.5, rel=1e-6)
    assert shown.name == "first"
    for target in shown.targets:
        assert target.energy == pytest.approx(np.linalg.norm(deltas[target.name]) ** 2 / whole, rel=1e-6)
        assert target.scale == 2
        np.testing.assert_allclose(target.values, np.linalg.svd(deltas[target.name])[1][:4], rtol=1e-6)
    assert list(shown.by_layer) == ["0", "1", "2"]
    for layer, share in shown.by_layer.items():
        part = sum(np.linalg.norm(delta) ** 2 for name, delta in deltas.items() if f".{layer}." in name)
        assert share == pytest.approx(part / whole, rel=1e-6)
    assert set(shown.by_module) == set(MODULES)
    assert sum(shown.by_module.values()) == pytest.approx(1)


def test_modules_are_told_apart() -> None:
    assert name_modules(["m.layers.0.q", "m.layers.11.q", "pooler.dense"]) == {
        "m.layers.0.q": "q",
        "m.layers.11.q": "q",
        "pooler.dense": "pooler.dense",
    }
    assert name_modules(["encoder.0.q", "decoder.0.q", "decoder.0.v"]) == {
        "encoder.0.q": "encoder.*.q",
        "decoder.0.q": "decoder.*.q",
        "decoder.0.v": "v",
    }


def test_layers_that_read_the_same_are_seen(tmp_path: Path) -> None:
    factors = make_factors(3, 4)
    first, third = "model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"
    mixing = np.random.default_rng(0).standard_normal((4, 4)).astype("f4")
    factors[third] = (mixing @ factors[first][0], factors[third][1])
    (shown,) = loraformat.analyse(write_peft(tmp_path / "a", factors)).adapters
    phi = {
        side: next(m for m in shown.within if m.module == "self_attn.q_proj" and m.side == side)
        for side in ("input", "output")
    }
    assert phi["input"].labels == ("0", "1", "2")
    assert phi["input"].phi[0][2] == pytest.approx(1, abs=1e-5), "one row space, however it is mixed"
    assert phi["input"].phi[0][1] < 0.6
    assert phi["output"].phi[0][2] < 0.6
    assert phi["input"].expected == pytest.approx(4 / 24)
    matrix = np.array(phi["input"].phi)
    np.testing.assert_array_equal(matrix, matrix.T)


def test_an_adapter_and_itself_share_everything(adapters: list[Path]) -> None:
    analysis = loraformat.analyse([adapters[0], adapters[0], adapters[1]])
    assert [shown.name for shown in analysis.adapters] == ["first (1)", "first (2)", "second"]
    same, *others = analysis.comparisons
    for shown in same.maps:
        np.testing.assert_allclose(np.diag(np.array(shown.phi)), 1, atol=1e-5)
        assert shown.rows == (1, 2, 3, 4)
    assert all(each["cosine"] == pytest.approx(1) for each in same.by_target.values())
    for compared in others:
        assert all(len(shown.rows) == 4 and len(shown.columns) == 6 for shown in compared.maps)
        assert all(abs(each["cosine"]) < 0.5 for each in compared.by_target.values())


def test_cosine_is_of_the_changes(adapters: list[Path]) -> None:
    (compared,) = loraformat.analyse(adapters).comparisons
    ones, others = make_factors(1, 4), make_factors(2, 6)
    for name, found in compared.by_target.items():
        one, other = (up.astype("f8") @ down for down, up in (ones[name], others[name]))
        expected = np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other)
        assert found["cosine"] == pytest.approx(expected, abs=1e-9)


def test_amplification_of_a_planted_direction(tmp_path: Path) -> None:
    """ΔW lies exactly along a singular direction of W: what W has there is its singular value."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((30, 22))
    u, s, vt = np.linalg.svd(weight)
    down, up = vt[6:7].astype("f4"), (12 * u[:, 6:7]).astype("f4")
    base = write_tensors(tmp_path / "base.safetensors", {"m.q.weight": weight.astype("f4")})
    (shown,) = loraformat.analyse(write_peft(tmp_path / "a", {"m.q": (down, up)}, alpha=1), base).adapters
    found = shown.targets[0].amplification
    assert found is not None
    assert found.rank == 1
    assert found.along_delta == pytest.approx(s[6], rel=1e-5)
    assert found.factor == pytest.approx(12 / s[6], rel=1e-5)
    assert found.along_weight == pytest.approx(s[0], rel=1e-4)
    assert found.weight_norm == pytest.approx(np.linalg.norm(weight), rel=1e-6)
    again = loraformat.analyse(tmp_path / "a", base, seed=1).adapters[0].targets[0].amplification
    assert again is not None
    assert again.along_random != found.along_random


def test_an_untrained_target_has_no_directions(tmp_path: Path) -> None:
    factors = {
        "m.0.q": (np.ones((2, 6), "f4"), np.zeros((5, 2), "f4")),
        "m.1.q": make_factors(0, 2)["model.layers.0.mlp.up_proj"],
    }
    base = write_tensors(
        tmp_path / "b.safetensors", {"m.0.q.weight": np.ones((5, 6), "f4"), "m.1.q.weight": np.ones((56, 24), "f4")}
    )
    (shown,) = loraformat.analyse(write_peft(tmp_path / "a", factors), base).adapters
    silent = shown.targets[0]
    assert (silent.norm, silent.effective_rank, silent.stable_rank, silent.energy) == (0, 0, 0, 0)
    assert silent.amplification is None
    assert shown.targets[1].amplification is not None


def test_what_has_no_singular_values_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    base = {"m.q.weight": rng.standard_normal((40, 24)).astype("f4"), "m.norm.weight": np.ones(24, "f4")}
    change = rng.standard_normal((40, 2)) @ rng.standard_normal((2, 24))
    tuned = {"m.q.weight": base["m.q.weight"] + change.astype("f4"), "m.norm.weight": np.zeros(24, "f4")}
    paths = [write_tensors(tmp_path / f"{i}.safetensors", arrays) for i, arrays in enumerate((tuned, base))]
    adapter = loraformat.extract(*paths).adapter
    analysis = loraformat.analyse(adapter)
    assert analysis.adapters[0].name == "adapter 1"
    assert [target.name for target in analysis.adapters[0].targets] == ["m.q"]
    assert [problem.code for problem in analysis.problems] == ["LF726"]
    whole = loraformat.extract(*paths, replace=["*"]).adapter
    assert codes(lambda: loraformat.analyse(whole)) == ["LF725"]


def codes(call: Any) -> list[str]:
    with pytest.raises(loraformat.LoraformatError) as caught:
        call()
    return [problem.code for problem in caught.value.problems if isinstance(problem, Problem)]


def test_refusals(adapters: list[Path], tmp_path: Path) -> None:
    base = write_tensors(tmp_path / "base.safetensors", {"other.weight": np.ones((3, 4), "f4")})
    assert set(codes(lambda: loraformat.analyse(adapters[0], base))) == {"LF401"}
    broken = make_factors(1, 4)
    name = next(iter(broken))
    broken[name][0][0, 0] = np.nan
    assert codes(lambda: loraformat.analyse(write_peft(tmp_path / "nan", broken))) == ["LF501"]
    assert codes(lambda: loraformat.analyse([])) == ["LF725"]


def test_changes_without_factors_give_the_same(adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As other additive kinds are: by the dense change. φ(r, r) of ΔW's own spaces is that of A and B."""
    by_factors = loraformat.analyse(adapters)
    monkeypatch.setattr("loraformat.algebra._directions.PAIRS", ())
    dense = loraformat.analyse(adapters)
    for expected, found in zip(by_factors.adapters, dense.adapters, strict=True):
        for one, other in zip(expected.targets, found.targets, strict=True):
            np.testing.assert_allclose(other.values[: len(one.values)], one.values, rtol=1e-5)
            assert all(value < 1e-5 * one.values[0] for value in other.values[len(one.values) :])
    phi = [{name: each["output"] for name, each in a.comparisons[0].by_target.items()} for a in (by_factors, dense)]
    assert phi[1] == pytest.approx(phi[0], abs=1e-4)


def test_json_holds_everything(adapters: list[Path]) -> None:
    analysis = loraformat.analyse(adapters)
    text = json.dumps(analysis.as_json(), allow_nan=False)
    read = json.loads(text)
    assert [len(adapter["targets"]) for adapter in read["adapters"]] == [6, 6]
    assert len(read["comparisons"][0]["by_target"]) == 6
    assert read["base"] is None
