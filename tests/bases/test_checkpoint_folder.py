"""Model folders: shards, index, what travels along, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import loraformat
from builders import lora_factors, write_peft, write_tensors
from loraformat.errors import LoraformatError
from loraformat.loading import open_base

Arrays = dict[str, NDArray[Any]]
INDEX = "model.safetensors.index.json"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def make_arrays(form: Any = np.float32) -> Arrays:
    rng = np.random.default_rng(3)
    shapes = {f"{Q}.weight": (12, 8), f"{K}.weight": (6, 8), "model.norm.weight": (8,), "lm_head.weight": (30, 8)}
    return {name: rng.standard_normal(shape).astype(form) for name, shape in shapes.items()}


def write_folder(folder: Path, arrays: Arrays, shards: int = 2, **config: Any) -> Path:
    folder.mkdir(parents=True)
    names = sorted(arrays)
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(places.values())):
        write_tensors(folder / shard, {name: arrays[name] for name in names if places[name] == shard}, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    return write_peft(tmp_path / "task", {Q: lora_factors(rng, 12, 8, 3), K: lora_factors(rng, 6, 8, 3)}, alpha=6)


def read_folder(folder: Path) -> Arrays:
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}


def expected(arrays: Arrays, adapter: Path, scale: float = 2.0) -> Arrays:
    factors = load_file(adapter / "adapter_model.safetensors")
    merged = dict(arrays)
    for target in (Q, K):
        a, b = (factors[f"base_model.model.{target}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        base = arrays[f"{target}.weight"]
        merged[f"{target}.weight"] = (base.astype(np.float64) + scale * b @ a).astype(base.dtype)
    return merged


def code_of(action: Any) -> str:
    with pytest.raises(LoraformatError) as caught:
        action()
    return caught.value.codes[0]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_are_merged_and_everything_travels(tmp_path: Path, adapter: Path, shards: int) -> None:
    arrays = make_arrays()
    base = write_folder(tmp_path / "Llama", arrays, shards)
    receipt = loraformat.merge(base, [adapter])
    output = tmp_path / "Llama-task"
    assert receipt.output == str(output)
    merged = read_folder(output)
    for name, array in expected(arrays, adapter).items():
        np.testing.assert_allclose(merged[name], array, rtol=1e-6, atol=1e-6)
    assert not np.array_equal(merged[f"{Q}.weight"], arrays[f"{Q}.weight"])
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [*(path.name for path in base.iterdir()), "merge_receipt.json"]
    )
    for name in (INDEX, "config.json", "tokenizer.json"):
        assert (output / name).read_bytes() == (base / name).read_bytes()
    told = json.loads((output / "merge_receipt.json").read_text())
    assert [weight["name"] for weight in told["weights"]] == sorted(f"{target}.weight" for target in (Q, K))


def test_one_file_without_an_index(tmp_path: Path, adapter: Path) -> None:
    arrays = make_arrays(ml_dtypes.bfloat16)
    base = tmp_path / "small"
    base.mkdir()
    write_tensors(base / "model.safetensors", arrays)
    loraformat.merge(base, [adapter], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(merged["lm_head.weight"], arrays["lm_head.weight"])
    for name, array in expected(arrays, adapter).items():
        np.testing.assert_allclose(merged[name].astype(np.float32), array.astype(np.float32), rtol=2**-7, atol=1e-3)


def test_untouched_shards_are_equal_to_the_last_bit(tmp_path: Path, adapter: Path) -> None:
    base = write_folder(tmp_path / "Llama", make_arrays(), 4)
    loraformat.merge(base, [adapter], tmp_path / "out")
    same = [p.name for p in base.glob("*.safetensors") if p.read_bytes() == (tmp_path / "out" / p.name).read_bytes()]
    assert len(same) == 2
    for path in base.glob("*.safetensors"):
        assert path.stat().st_size == (tmp_path / "out" / path.name).stat().st_size


def test_weights_of_other_formats_stay_behind_and_are_named(tmp_path: Path, adapter: Path) -> None:
    base = write_folder(tmp_path / "Llama", make_arrays())
    (base / "pytorch_model.bin").write_bytes(b"x")
    (base / "onnx").mkdir()
    receipt = loraformat.merge(base, [adapter], tmp_path / "out")
    assert sorted(problem.where for problem in receipt.problems if problem.code == "LF609") == [
        "onnx",
        "pytorch_model.bin",
    ]
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_a_merged_folder_merged_again_keeps_the_old_receipt(tmp_path: Path, adapter: Path) -> None:
    base = write_folder(tmp_path / "Llama", make_arrays())
    loraformat.merge(base, [adapter], tmp_path / "one")
    loraformat.merge(tmp_path / "one", [(adapter, -1.0)], tmp_path / "two")
    told = json.loads((tmp_path / "two" / "merge_receipt.json").read_text())
    assert told["parent"] == json.loads((tmp_path / "one" / "merge_receipt.json").read_text())
    np.testing.assert_allclose(read_folder(tmp_path / "two")[f"{Q}.weight"], make_arrays()[f"{Q}.weight"], atol=1e-5)


def test_tied_embeddings_are_refused(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "Llama", make_arrays(), tie_word_embeddings=True)
    rng = np.random.default_rng(5)
    head = write_peft(tmp_path / "head", {"lm_head": lora_factors(rng, 30, 8, 2)})
    assert code_of(lambda: loraformat.merge(base, [head], tmp_path / "out")) == "LF402"


def _move(index: dict[str, str]) -> None:
    index["lm_head.weight"] = next(shard for shard in index.values() if shard != index["lm_head.weight"])


BAD_INDEXES = {
    "a tensor in another shard": (_move, "LF115"),
    "a tensor in no shard": (lambda index: index.update({"ghost.weight": next(iter(index.values()))}), "LF115"),
    "a tensor that the index lacks": (lambda index: index.pop("lm_head.weight"), "LF115"),
    "a shard that is missing": (lambda index: index.update({"lm_head.weight": "model-9.safetensors"}), "LF100"),
    "a shard outside": (lambda index: index.update({"lm_head.weight": "../x.safetensors"}), "LF903"),
    "a shard at an absolute path": (lambda index: index.update({"lm_head.weight": "/etc/passwd"}), "LF903"),
    "a shard in a sub-folder": (lambda index: index.update({"lm_head.weight": "a/x.safetensors"}), "LF903"),
    "no shard name": (lambda index: index.update({"lm_head.weight": 3}), "LF115"),
    "nothing": (lambda index: index.clear(), "LF115"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_an_index_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    base = write_folder(tmp_path / "Llama", make_arrays())
    index = json.loads((base / INDEX).read_text())
    change, code = BAD_INDEXES[case]
    change(index["weight_map"])
    (base / INDEX).write_text(json.dumps(index))
    assert code_of(lambda: open_base(base)) == code


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    arrays = make_arrays()
    base = write_folder(tmp_path / "Llama", arrays)
    first, second = sorted(base.glob("*.safetensors"))
    write_tensors(second, load_file(second) | load_file(first))
    assert code_of(lambda: open_base(base)) == "LF115"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert code_of(lambda: open_base(tmp_path / "empty")) == "LF121"


class TestOutputFolders:
    def test_an_existing_folder_stays(self, tmp_path: Path, adapter: Path) -> None:
        base = write_folder(tmp_path / "Llama", make_arrays())
        out = tmp_path / "out"
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        assert code_of(lambda: loraformat.merge(base, [adapter], out)) == "LF601"
        assert code_of(lambda: loraformat.merge(base, [adapter], out, force=True)) == "LF601"
        assert (out / "mine.txt").read_text() == "mine"

    def test_force_replaces_what_an_earlier_merge_wrote(self, tmp_path: Path, adapter: Path) -> None:
        base = write_folder(tmp_path / "Llama", make_arrays())
        out = tmp_path / "out"
        loraformat.merge(base, [adapter], out)
        before = read_folder(out)[f"{Q}.weight"]
        loraformat.merge(base, [(adapter, 0.5)], out, force=True)
        assert not np.array_equal(read_folder(out)[f"{Q}.weight"], before)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["Llama", "out", "task"]

    @pytest.mark.parametrize("place", ["Llama", "Llama/inside", "."])
    def test_the_base_is_never_written_into(self, tmp_path: Path, adapter: Path, place: str) -> None:
        base = write_folder(tmp_path / "Llama", make_arrays())
        assert code_of(lambda: loraformat.merge(base, [adapter], tmp_path / place, force=True)) == "LF602"

    def test_a_file_in_the_way_is_refused(self, tmp_path: Path, adapter: Path) -> None:
        base = write_folder(tmp_path / "Llama", make_arrays())
        (tmp_path / "out").write_text("a file")
        assert code_of(lambda: loraformat.merge(base, [adapter], tmp_path / "out", force=True)) == "LF603"

    def test_a_failed_merge_leaves_nothing(
        self, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = write_folder(tmp_path / "Llama", make_arrays())
        before = sorted(path.name for path in tmp_path.iterdir())

        def fail(*_: object) -> None:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "pwrite", fail)
        assert code_of(lambda: loraformat.merge(base, [adapter], tmp_path / "out")) == "LF604"
        assert sorted(path.name for path in tmp_path.iterdir()) == before
