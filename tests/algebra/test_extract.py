"""Extraction: what is taken exactly, what is cut, what is replaced, what is refused."""

import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

import loraformat
from builders import read_onnx, write_onnx, write_tensors
from loraformat.adapter import SlotKind
from loraformat.algebra.extraction import Extraction, Outcome

Arrays = dict[str, NDArray[Any]]


def low(rng: np.random.Generator, rows: int, columns: int, rank: int, size: float = 0.02) -> NDArray[np.float32]:
    product = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    return (size * product / np.sqrt(rank)).astype(np.float32)


def write_models(
    folder: Path, base: Arrays, tuned: Arrays, config: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return write_tensors(folder / "tuned.safetensors", tuned), write_tensors(folder / "base.safetensors", base)


def outcome_of(extraction: Extraction, name: str) -> Outcome:
    return next(each.outcome for each in extraction.parameters if each.name == name)


def merged(extraction: Extraction, base: Path, folder: Path) -> Arrays:
    """Return what our own merge makes of the base and the adapter, through its file."""
    path = loraformat.save(extraction.adapter, folder / "extracted.safetensors", force=True)
    loraformat.merge(base, [path], folder / "merged.safetensors", force=True, min_retained=0)
    return load_file(folder / "merged.safetensors")


@pytest.fixture
def models() -> tuple[Arrays, Arrays]:
    """Return a base and its fine-tune: low rank at four sites, a norm, a bias, a bias alone, and one of full rank."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (70, 32),
        "model.layers.0.q_proj.weight": (48, 32),
        "model.layers.0.q_proj.bias": (48,),
        "model.layers.0.k_proj.weight": (16, 32),
        "model.layers.0.k_proj.bias": (16,),
        "model.layers.0.up_proj.weight": (96, 32),
        "model.layers.0.norm.weight": (32,),
        "model.conv.weight": (24, 10, 3, 3),
        "model.still.weight": (9, 7),
    }
    base = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    tuned = dict(base)
    tuned["model.embed_tokens.weight"] = base["model.embed_tokens.weight"] + low(rng, 70, 32, 2)
    tuned["model.layers.0.q_proj.weight"] = base["model.layers.0.q_proj.weight"] + low(rng, 48, 32, 3)
    tuned["model.conv.weight"] = base["model.conv.weight"] + low(rng, 24, 90, 2).reshape(24, 10, 3, 3)
    full = 0.02 * rng.standard_normal((96, 32))
    tuned["model.layers.0.up_proj.weight"] = base["model.layers.0.up_proj.weight"] + full.astype(np.float32)
    for name in ("model.layers.0.q_proj.bias", "model.layers.0.k_proj.bias", "model.layers.0.norm.weight"):
        tuned[name] = base[name] + 1
    return base, tuned


def test_without_a_cut_the_merge_gives_the_tuned_model(models: tuple[Arrays, Arrays], tmp_path: Path) -> None:
    base, tuned = models
    tuned_path, base_path = write_models(tmp_path, base, tuned)
    extraction = loraformat.extract(tuned_path, base_path)
    found = {each.name: (each.outcome, each.rank) for each in extraction.parameters}
    assert found == {
        "model.embed_tokens.weight": (Outcome.EXACT, 2),
        "model.layers.0.q_proj.weight": (Outcome.EXACT, 3),
        "model.layers.0.q_proj.bias": (Outcome.REPLACED, 0),
        "model.layers.0.k_proj.weight": (Outcome.UNCHANGED, 0),
        "model.layers.0.k_proj.bias": (Outcome.REPLACED, 0),
        "model.layers.0.up_proj.weight": (Outcome.REPLACED, 0),
        "model.layers.0.norm.weight": (Outcome.REPLACED, 0),
        "model.conv.weight": (Outcome.EXACT, 2),
        "model.still.weight": (Outcome.UNCHANGED, 0),
    }
    assert extraction.problems == ()
    targets = {target.name: (target.kind, target.slot) for target in extraction.adapter.targets}
    assert targets["model.embed_tokens"] == ("lora", SlotKind.EMBEDDING)
    assert targets["model.conv"] == ("lora", SlotKind.CONV)
    assert targets["model.layers.0.q_proj"] == ("lora", SlotKind.LINEAR)
    result = merged(extraction, base_path, tmp_path)
    for name, array in tuned.items():
        np.testing.assert_allclose(result[name], array, rtol=0, atol=3e-8, err_msg=name)
        if outcome_of(extraction, name) in (Outcome.REPLACED, Outcome.UNCHANGED):
            np.testing.assert_array_equal(result[name], array, err_msg=name)


def test_the_adapter_is_bound_to_the_base(models: tuple[Arrays, Arrays], tmp_path: Path) -> None:
    base, tuned = models
    tuned_path, base_path = write_models(tmp_path, base, tuned)
    adapter = loraformat.extract(tuned_path, base_path).adapter
    stamped = loraformat.stamp(adapter, base_path)
    assert {target.name: target.fingerprint for target in adapter.targets} == {
        target.name: target.fingerprint for target in stamped.targets
    }
    rng = np.random.default_rng(9)
    other = write_tensors(
        tmp_path / "other.safetensors", {n: rng.standard_normal(a.shape).astype("f4") for n, a in base.items()}
    )
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(other, [adapter], tmp_path / "wrong.safetensors")
    assert "LF406" in caught.value.codes


@pytest.mark.parametrize("rank", [4, 11])
def test_a_rank_cuts_at_the_best_error(rank: int, models: tuple[Arrays, Arrays], tmp_path: Path) -> None:
    base, tuned = models
    tuned_path, base_path = write_models(tmp_path, base, tuned)
    extraction = loraformat.extract(tuned_path, base_path, rank=rank)
    name = "model.layers.0.up_proj.weight"
    record = next(each for each in extraction.parameters if each.name == name)
    difference = tuned[name].astype(np.float64) - base[name]
    values = np.linalg.svd(difference, compute_uv=False)
    best = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
    assert (record.outcome, record.rank) == (Outcome.TRUNCATED, rank)
    assert record.error is not None
    assert best * (1 - 1e-6) <= record.error <= 1.01 * best
    result = merged(extraction, base_path, tmp_path)[name].astype(np.float64) - base[name]
    real = np.linalg.norm(difference - result) / np.linalg.norm(difference)
    assert real == pytest.approx(record.error, rel=1e-4), "the stated error is what the merge shows"
    exact = next(each for each in extraction.parameters if each.name == "model.layers.0.q_proj.weight")
    assert (exact.outcome, exact.rank) == (Outcome.EXACT, 3), "no more than the difference has"


@pytest.mark.parametrize(("flags", "share"), [({"energy": 0.9}, 0.1**0.5), ({"max_error": 0.25}, 0.25)])
def test_energy_and_error_take_the_fewest(
    flags: dict[str, float], share: float, models: tuple[Arrays, Arrays], tmp_path: Path
) -> None:
    base, tuned = models
    tuned_path, base_path = write_models(tmp_path, base, tuned)
    extraction = loraformat.extract(tuned_path, base_path, **flags)  # type: ignore[arg-type]
    name = "model.layers.0.up_proj.weight"
    record = next(each for each in extraction.parameters if each.name == name)
    values = np.linalg.svd(tuned[name].astype(np.float64) - base[name], compute_uv=False)
    tails = np.sqrt(np.r_[np.cumsum(values[::-1] ** 2)[::-1], 0.0]) / np.linalg.norm(values)
    assert record.rank == int(np.flatnonzero(tails <= share)[0])
    assert record.error == pytest.approx(tails[record.rank], rel=1e-3)


@pytest.mark.parametrize("form", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_rounding_does_not_hide_a_low_rank(form: Any, tmp_path: Path) -> None:
    """A model stored in 16 bits differs from its base by a product and by rounding: the product is found."""
    rng = np.random.default_rng(1)
    base = {"a.q.weight": (0.05 * rng.standard_normal((120, 88))).astype(form)}
    tuned = {"a.q.weight": (base["a.q.weight"].astype(np.float64) + low(rng, 120, 88, 4, 0.05)).astype(form)}
    tuned_path, base_path = write_models(tmp_path, base, tuned)
    extraction = loraformat.extract(tuned_path, base_path)
    (record,) = extraction.parameters
    assert (record.outcome, record.rank) == (Outcome.EXACT, 4)
    result = merged(extraction, base_path, tmp_path)["a.q.weight"].astype(np.float64)
    wide = tuned["a.q.weight"].astype(np.float64)
    steps = float(np.linalg.norm(np.abs(wide) * float(ml_dtypes.finfo(form).eps)))
    moved = float(np.linalg.norm(wide - base["a.q.weight"].astype(np.float64)))
    assert np.linalg.norm(result - wide) <= steps + 1e-6 * moved, "rounding of the stored form and of float32 factors"
    assert np.linalg.norm(result - wide) < 0.1 * moved


def test_a_cast_alone_is_no_change(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    base = {"a.q.weight": rng.standard_normal((30, 20)).astype(np.float32), "a.k.weight": np.ones((30, 20), np.float32)}
    tuned = {
        "a.q.weight": base["a.q.weight"].astype(ml_dtypes.bfloat16),
        "a.k.weight": base["a.k.weight"] + low(rng, 30, 20, 1),
    }
    tuned_path, base_path = write_models(tmp_path, base, tuned)
    extraction = loraformat.extract(tuned_path, base_path)
    record = next(each for each in extraction.parameters if each.name == "a.q.weight")
    assert (record.outcome, record.why) == (Outcome.UNCHANGED, "equal but for rounding")


def test_conv1d_by_the_configuration(tmp_path: Path) -> None:
    """GPT-2 stores (in, out): A has the length of the input."""
    rng = np.random.default_rng(3)
    name = "transformer.h.0.attn.c_attn"
    base = {f"{name}.weight": rng.standard_normal((24, 72)).astype(np.float32)}
    tuned = {f"{name}.weight": base[f"{name}.weight"] + low(rng, 24, 72, 2)}
    tuned_path, base_path = write_models(tmp_path, base, tuned, {"model_type": "gpt2"})
    extraction = loraformat.extract(tuned_path, base_path)
    (target,) = extraction.adapter.targets
    assert target.slot is SlotKind.LINEAR_TRANSPOSED
    assert target.factors["lora_A.weight"].shape == (2, 24)
    assert target.factors["lora_B.weight"].shape == (72, 2)
    np.testing.assert_allclose(
        merged(extraction, base_path, tmp_path)[f"{name}.weight"], tuned[f"{name}.weight"], atol=3e-7
    )


def test_from_two_graphs(tmp_path: Path) -> None:
    """ONNX stores (in, out) and names weights as it likes: the modules are paired, and the merge is into the graph."""
    rng = np.random.default_rng(4)
    base = {f"model.layers.{i}.q": rng.standard_normal((40, 24)).astype(np.float32) for i in range(2)}
    tuned = {name: weight + low(rng, 40, 24, 2) for name, weight in base.items()}
    base_path, tuned_path = write_onnx(tmp_path / "base.onnx", base), write_onnx(tmp_path / "tuned.onnx", tuned)
    extraction = loraformat.extract(tuned_path, base_path)
    assert {t.name: (t.slot, t.rank) for t in extraction.adapter.targets} == dict.fromkeys(base, (SlotKind.LINEAR, 2))
    loraformat.merge(base_path, [extraction.adapter], tmp_path / "merged.onnx")
    stored = read_onnx(tmp_path / "merged.onnx")
    for place, weight in enumerate(tuned.values()):
        np.testing.assert_allclose(stored[f"onnx::MatMul_{100 + place}"], weight.T, atol=5e-7)


def test_a_graph_from_a_checkpoint(tmp_path: Path) -> None:
    """The base as safetensors, the tuned model as ONNX: stored the other way round, and still one difference."""
    rng = np.random.default_rng(5)
    base = {"model.q": rng.standard_normal((40, 24)).astype(np.float32)}
    tuned = {"model.q": base["model.q"] + low(rng, 40, 24, 2)}
    base_path = write_tensors(tmp_path / "base.safetensors", {"model.q.weight": base["model.q"]})
    extraction = loraformat.extract(write_onnx(tmp_path / "tuned.onnx", tuned), base_path)
    np.testing.assert_allclose(merged(extraction, base_path, tmp_path)["model.q.weight"], tuned["model.q"], atol=5e-7)


def test_another_container_and_what_stands_against_reading_it(tmp_path: Path) -> None:
    """A base in an archive of numpy, with one array in Fortran order, which is no run of bytes."""
    rng = np.random.default_rng(5)
    base = {
        "m.q.weight": rng.standard_normal((40, 24)).astype("f4"),
        "m.k.weight": rng.standard_normal((9, 24)).astype("f4"),
    }
    tuned = {name: weight + low(rng, *weight.shape, 1) for name, weight in base.items()}
    np.savez(
        tmp_path / "base.npz", **{"m.q.weight": base["m.q.weight"], "m.k.weight": np.asfortranarray(base["m.k.weight"])}
    )
    tuned_path = write_tensors(tmp_path / "tuned.safetensors", tuned)
    extraction = loraformat.extract(tuned_path, tmp_path / "base.npz")
    assert outcome_of(extraction, "m.q.weight") is Outcome.EXACT
    assert outcome_of(extraction, "m.k.weight") is Outcome.LEFT_OUT
    assert "cannot be read from the base" in extraction.problems[0].found
    (target,) = extraction.adapter.targets
    change = target.factors["lora_B.weight"].read() @ target.factors["lora_A.weight"].read()
    np.testing.assert_allclose(base["m.q.weight"] + change, tuned["m.q.weight"], atol=5e-7)


def test_values_of_a_graph_are_the_modules(tmp_path: Path) -> None:
    """A weight of full rank that a graph stores turned around is taken as PyTorch has it, and merged back."""
    rng = np.random.default_rng(5)
    base = {"model.q": rng.standard_normal((40, 24)).astype(np.float32)}
    tuned = {"model.q": rng.standard_normal((40, 24)).astype(np.float32)}
    base_path = write_onnx(tmp_path / "base.onnx", base)
    extraction = loraformat.extract(write_onnx(tmp_path / "tuned.onnx", tuned), base_path)
    (target,) = extraction.adapter.targets
    assert (target.kind, target.factors["weight"].shape) == ("replace", (40, 24))
    loraformat.merge(base_path, [extraction.adapter], tmp_path / "merged.onnx")
    np.testing.assert_array_equal(read_onnx(tmp_path / "merged.onnx")["onnx::MatMul_100"], tuned["model.q"].T)


def test_new_rows_and_a_new_head_are_taken_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    base = {
        "m.embed_tokens.weight": rng.standard_normal((20, 8)).astype("f4"),
        "m.lm_head.weight": np.ones((20, 8), "f4"),
    }
    grown = np.vstack([base["m.embed_tokens.weight"], rng.standard_normal((3, 8)).astype("f4")])
    tuned = {"m.embed_tokens.weight": grown, "m.score.weight": np.ones((2, 8), "f4")}
    tuned_path, base_path = write_models(tmp_path, base, tuned)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.extract(tuned_path, base_path)
    assert caught.value.codes == ("LF722",)
    assert "m.lm_head.weight" in str(caught.value)
    extraction = loraformat.extract(tuned_path, base_path, allow_missing=["*.lm_head.*"])
    assert {each.name: (each.outcome, each.why) for each in extraction.parameters} == {
        "m.embed_tokens.weight": (Outcome.REPLACED, "its number of rows changed"),
        "m.score.weight": (Outcome.REPLACED, "the base has no such parameter"),
        "m.lm_head.weight": (Outcome.LEFT_OUT, "only the base has it"),
    }
    assert [(problem.code, problem.where) for problem in extraction.problems] == [("LF730", "m.lm_head.weight")]
    path = loraformat.save(extraction.adapter, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(load_file(path)["m.embed_tokens.weight"], grown)


def test_targets_and_replace_choose(models: tuple[Arrays, Arrays], tmp_path: Path) -> None:
    base, tuned = models
    tuned_path, base_path = write_models(tmp_path, base, tuned)
    extraction = loraformat.extract(tuned_path, base_path, targets=["*.q_proj.*", "*.conv.*"], replace=["*.conv.*"])
    assert {target.name: target.kind for target in extraction.adapter.targets} == {
        "model.conv": "replace",
        "model.layers.0.q_proj": "lora",
    }
    left = {problem.where for problem in extraction.problems}
    assert left == {
        "model.embed_tokens.weight",
        "model.layers.0.k_proj.bias",
        "model.layers.0.up_proj.weight",
        "model.layers.0.norm.weight",
    }
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.extract(tuned_path, base_path, targets=["*.nothing"])
    assert caught.value.codes == ("LF724",)


def test_what_no_adapter_holds_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    base = {
        "a.q.weight": rng.standard_normal((30, 20)).astype("f4"),
        "a.A_log": np.ones(4, "f4"),
        "a.steps": np.zeros(2, "i8"),
    }
    tuned = {
        "a.q.weight": base["a.q.weight"] + low(rng, 30, 20, 1),
        "a.A_log": np.zeros(4, "f4"),
        "a.steps": np.ones(2, "i8"),
    }
    tuned_path, base_path = write_models(tmp_path, base, tuned)
    extraction = loraformat.extract(tuned_path, base_path)
    assert {problem.where for problem in extraction.problems} == {"a.A_log", "a.steps"}
    assert {each.name for each in extraction.parameters} == set(base)


def test_refusals(models: tuple[Arrays, Arrays], tmp_path: Path) -> None:
    base, tuned = models
    _tuned_path, base_path = write_models(tmp_path, base, tuned)
    broken, vast = (
        tuned | {"model.layers.0.q_proj.weight": np.full((48, 32), number, np.float32)} for number in (np.nan, 1e30)
    )
    narrow = tuned | {"model.layers.0.q_proj.weight": np.ones((48, 31), np.float32)}
    cases = [
        ("LF720", base_path),
        ("LF721", write_tensors(tmp_path / "narrow.safetensors", narrow)),
        ("LF723", write_tensors(tmp_path / "broken.safetensors", broken)),
        ("LF723", write_tensors(tmp_path / "vast.safetensors", vast)),
    ]
    for code, path in cases:
        with pytest.raises(loraformat.LoraformatError) as caught:
            loraformat.extract(path, base_path)
        assert caught.value.codes == (code,)
    stranger = write_tensors(tmp_path / "stranger.safetensors", {"other.thing.weight": np.ones((3, 4), np.float32)})
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.extract(stranger, base_path)
    assert caught.value.codes == ("LF721",)


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ({"energy": 0.9, "max_error": 0.1}, ["energy and max_error"]),
        ({"energy": 0.0}, ["energy"]),
        ({"max_error": 1.0}, ["max_error"]),
        ({"rank": 0, "dtype": "int8"}, ["rank", "dtype"]),
    ],
)
def test_settings_that_will_not_do(
    flags: dict[str, Any], where: list[str], models: tuple[Arrays, Arrays], tmp_path: Path
) -> None:
    tuned_path, base_path = write_models(tmp_path, *models[::-1])
    with pytest.raises(loraformat.FindingError) as caught:
        loraformat.extract(tuned_path, base_path, **flags)
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [("LF705", each) for each in where]


def test_half_precision_factors_state_their_own_error(models: tuple[Arrays, Arrays], tmp_path: Path) -> None:
    base, tuned = models
    tuned_path, base_path = write_models(tmp_path, base, tuned)
    extraction = loraformat.extract(tuned_path, base_path, dtype="bfloat16")
    record = next(each for each in extraction.parameters if each.name == "model.layers.0.q_proj.weight")
    target = next(each for each in extraction.adapter.targets if each.name == "model.layers.0.q_proj")
    down, up = (target.factors[role].read().astype(np.float64) for role in ("lora_A.weight", "lora_B.weight"))
    difference = tuned[record.name].astype(np.float64) - base[record.name]
    real = np.linalg.norm(difference - target.scale * up @ down) / np.linalg.norm(difference)
    assert record.error == pytest.approx(real, rel=1e-3)
    assert record.outcome is Outcome.EXACT
    assert 1e-4 < real < 4 * 2.0**-8
    assert target.factors["lora_A.weight"].dtype.name == "bfloat16"


def test_memory_is_that_of_one_weight(tmp_path: Path) -> None:
    """Twelve weights of 1 MB in each model; one difference, its tiles and a few thin blocks at a time."""
    rng = np.random.default_rng(8)
    base = {f"a.{i}.q.weight": rng.standard_normal((512, 512)).astype("f4") for i in range(12)}
    tuned = {name: weight + low(rng, 512, 512, 2) for name, weight in base.items()}
    tuned_path, base_path = write_models(tmp_path, base, tuned)
    del base, tuned
    tracemalloc.start()
    extraction = loraformat.extract(tuned_path, base_path, rank=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert extraction.count()["exact"] == 12
    assert peak < 9 << 20, "less than one model, of 12 MB"


@settings(max_examples=15)
@given(rank=st.integers(1, 4), rows=st.integers(40, 60), columns=st.integers(33, 50), seed=st.integers(0, 99))
def test_round_trip(rank: int, rows: int, columns: int, seed: int, tmp_path: Path) -> None:
    """A LoRA that was merged into a base is extracted again: the same change, of the same rank."""
    rng = np.random.default_rng(seed)
    base = {"a.q.weight": (0.1 * rng.standard_normal((rows, columns))).astype("f4")}
    delta = low(rng, rows, columns, rank, 0.05)
    tuned_path, base_path = write_models(tmp_path, base, {"a.q.weight": base["a.q.weight"] + delta})
    (target,) = loraformat.extract(tuned_path, base_path).adapter.targets
    down, up = (target.factors[role].read().astype(np.float64) for role in ("lora_A.weight", "lora_B.weight"))
    assert target.rank == rank
    assert np.linalg.norm(target.scale * up @ down - delta) <= 1e-6 * np.linalg.norm(base["a.q.weight"])


def test_progress_ends_at_the_total(models: tuple[Arrays, Arrays], tmp_path: Path) -> None:
    class Seen:
        total, done = 0, 0

        def start(self, total_bytes: int) -> None:
            self.total = total_bytes

        def advance(self, done_bytes: int) -> None:
            self.done += done_bytes

    seen = Seen()
    loraformat.extract(*write_models(tmp_path, *models), rank=2, progress=seen)
    assert seen.done == seen.total == sum(array.nbytes for array in models[1].values())


def test_a_tied_table_is_warned_of(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    base = {"model.embed_tokens.weight": rng.standard_normal((60, 24)).astype("f4")}
    tuned = {name: weight + low(rng, 60, 24, 2) for name, weight in base.items()}
    tuned_path, base_path = write_models(tmp_path, base, tuned, {"model_type": "llama", "tie_word_embeddings": True})
    extraction = loraformat.extract(tuned_path, base_path)
    assert [(each.code, each.where, each.severity) for each in extraction.problems] == [
        ("LF402", "model.embed_tokens.weight", "warning")
    ]
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base_path, [extraction.adapter], tmp_path / "merged.safetensors")
    assert caught.value.codes == ("LF402",)


def test_the_same_models_give_the_same_file(models: tuple[Arrays, Arrays], tmp_path: Path) -> None:
    tuned_path, base_path = write_models(tmp_path, *models)
    written = [
        loraformat.save(loraformat.extract(tuned_path, base_path, rank=4).adapter, tmp_path / name).read_bytes()
        for name in ("one.safetensors", "two.safetensors")
    ]
    assert written[0] == written[1]
