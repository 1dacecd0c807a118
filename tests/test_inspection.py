"""What is in an adapter or a base, as data."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import lora_factors, write_onnx, write_peft, write_tensors
from loraformat.api import save
from loraformat.inspection import AdapterInspection, inspect_adapter, inspect_base
from loraformat.loading import load_adapter, open_base
from loraformat.schemes import NOT_STATED, StatedScale

DICE = np.random.default_rng(3)
FACTORS = {"model.q": lora_factors(DICE, 6, 4, 2), "model.v": lora_factors(DICE, 3, 5, 2)}


def look(path: Path, stated: StatedScale = NOT_STATED) -> AdapterInspection:
    return inspect_adapter(path, None, stated)


def codes(inspection: AdapterInspection) -> list[str]:
    return [problem.code for problem in inspection.problems]


def dense_norm(factors: tuple[Any, Any], scale: float) -> float:
    down, up = (factor.astype(np.float64) for factor in factors)
    return float(np.linalg.norm(scale * (up @ down)))


def test_a_signalling_nan_is_no_warning(tmp_path: Path) -> None:
    down, up = FACTORS["model.q"][0].copy(), FACTORS["model.q"][1]
    down.view(np.uint32)[:] = 0x7F800001
    (target,) = look(write_peft(tmp_path / "a", {"model.q": (down, up)}, alpha=8)).targets
    assert target.norm is None


def test_an_adapter(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", FACTORS, alpha=8)
    inspection = look(folder)
    first, second = inspection.targets
    assert (first.name, first.kind, first.slot, first.rank, first.scale) == ("model.q", "lora", "linear", 2, 4.0)
    assert (first.scaling, first.shape, first.parameters) == ("alpha/rank of 8", (6, 4), 2 * 4 + 6 * 2)
    assert second.shape == (3, 5)
    assert first.norm == pytest.approx(dense_norm(FACTORS["model.q"], 4.0))
    both = math.hypot(*(dense_norm(factors, 4.0) for factors in FACTORS.values()))
    assert inspection.norm == pytest.approx(both)
    assert (inspection.scheme, inspection.evidence) == ("peft", "adapter_config.json with peft_type")
    assert inspection.bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert not inspection.problems


def test_the_record_of_an_adapter(tmp_path: Path) -> None:
    wide = {"model.w": lora_factors(DICE, 6, 4, 3, np.float16)}
    record = look(write_peft(tmp_path / "a", FACTORS | wide, rank_pattern={"w": 3})).as_json()
    assert record == json.loads(json.dumps(record, allow_nan=False)) | {"targets": record["targets"]}
    assert (record["kind"], record["kinds"], record["ranks"]) == ("adapter", {"lora": 3}, {"2": 2, "3": 1})
    assert record["scales"] == {"8": 2, "5.33333": 1}
    assert record["dtypes"] == {"float32": 4, "float16": 2}
    assert record["parameters"] == sum(factor.size for pair in (FACTORS | wide).values() for factor in pair)
    assert record["base"] == {"name": "a/base", "revision": None, "layers": []}
    assert [target["name"] for target in record["targets"]] == ["model.q", "model.v", "model.w"]


def test_the_digest_is_there(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", FACTORS)
    assert look(folder).as_json()["sha256"] == load_adapter(folder).sha256 != ""


@pytest.mark.parametrize("form", ["float16", "bfloat16", "float8_e4m3fn"])
def test_norms_of_narrow_factors(tmp_path: Path, form: str) -> None:
    from loraformat.dtypes import BY_NAME

    factors = {"m.q": lora_factors(DICE, 6, 4, 2, BY_NAME[form].numpy())}
    inspection = look(write_peft(tmp_path / "a", factors, alpha=2))
    assert inspection.targets[0].norm == pytest.approx(dense_norm(factors["m.q"], 1.0))


def test_a_kind_that_is_not_known_is_listed(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", FACTORS)
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": factor
        for name, pair in FACTORS.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    tensors["base_model.model.model.q.trainable_tokens_delta"] = np.ones((2, 6), np.float32)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    inspection = look(folder)
    assert codes(inspection) == ["LF209"]
    first = inspection.targets[0]
    assert (first.kind, first.shape, first.norm) == ("lora and tokens", None, None)
    assert inspection.targets[1].norm is not None
    assert inspection.norm == pytest.approx(inspection.targets[1].norm)


def test_what_stands_against_a_merge_is_listed_not_raised(tmp_path: Path) -> None:
    factors = {"model.q": lora_factors(DICE, 6, 4, 3), "model.v": (FACTORS["model.v"][0], np.ones((3, 4), np.float32))}
    inspection = look(write_peft(tmp_path / "a", factors, r=2, init_lora_weights="pissa"))
    assert codes(inspection) == ["LF215", "LF205", "LF203"]
    assert [target.norm for target in inspection.targets] == [None, None]
    assert inspection.norm == 0


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_of_zero_divides_nothing(tmp_path: Path, rank: int) -> None:
    empty = {"m.q": (np.ones((0, 4), np.float32), np.ones((6, 0), np.float32))}
    inspection = look(write_peft(tmp_path / "a", empty, r=rank, use_rslora=True))
    assert codes(inspection) == ["LF204"]
    assert json.dumps(inspection.as_json(), allow_nan=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_have_no_norm(tmp_path: Path, bad: float) -> None:
    down, up = lora_factors(DICE, 6, 4, 2)
    down[1, 2] = bad
    inspection = look(write_peft(tmp_path / "a", {"m.q": (down, up)}))
    assert inspection.targets[0].norm is None
    assert json.dumps(inspection.as_json(), allow_nan=False)


def test_an_enormous_scale_does_not_overflow(tmp_path: Path) -> None:
    inspection = look(write_peft(tmp_path / "a", FACTORS, alpha=1e200))
    assert 1e199 < inspection.norm < 1e202
    assert json.dumps(inspection.as_json(), allow_nan=False)
    assert look(write_peft(tmp_path / "b", FACTORS, alpha=1.7e308)).targets[0].norm is None


def test_a_scale_of_zero_is_shown(tmp_path: Path) -> None:
    inspection = look(write_peft(tmp_path / "a", FACTORS, alpha=0))
    assert [target.scale for target in inspection.targets] == [0.0, 0.0]
    assert inspection.norm == 0


def test_a_native_file(tmp_path: Path) -> None:
    adapter = load_adapter(write_peft(tmp_path / "a", FACTORS))
    path = save(replace(adapter, metadata={"x.note": "1"}), tmp_path / "n.safetensors")
    inspection = look(path)
    assert (inspection.scheme, inspection.evidence) == ("native", "metadata key 'loraformat'")
    assert inspection.targets == look(tmp_path / "a").targets


def test_a_base(tmp_path: Path) -> None:
    weights = {"model.layers.0.q": np.ones((6, 4), np.float32), "model.head": np.ones((3, 5), np.float32)}
    path = write_onnx(tmp_path / "m.onnx", weights)
    record = inspect_base(open_base(path)).as_json()
    assert record == json.loads(json.dumps(record, allow_nan=False))
    assert (record["kind"], record["format"], record["path"]) == ("base", "onnx", str(path))
    assert (record["tensors"], record["parameters"], record["bytes"]) == (2, 39, 156)
    assert record["dtypes"] == {"float32": 2}
    assert record["files"] == [{"name": str(path), "bytes": path.stat().st_size}]
    assert {(site["module"], tuple(site["shape"])) for site in record["sites"]} == {
        ("model.layers.0.q", (4, 6)),
        ("model.head", (5, 3)),
    }
    assert record["receipt"] is None


def test_a_checkpoint(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"model.q.weight": np.ones((6, 4), np.float16)})
    record = inspect_base(open_base(path)).as_json()
    assert (record["tensors"], record["dtypes"]) == (1, {"float16": 1})
    assert [site["module"] for site in record["sites"]] == ["model.q"]
