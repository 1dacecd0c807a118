"""Model folders: shards, index, what travels along, and what is refused."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import loraformat
from builders import lora_factors, write_peft, write_tensors
from folders import read_index, write_loose_state, write_model_folder
from graphs import Array
from laws.base_laws import HEAD, StateDictLaws, make_state
from loraformat.bases import BaseModel, NewContents
from loraformat.bases.checkpoint_folder import BASE
from loraformat.dtypes import BY_NAME
from loraformat.errors import LoraformatError
from loraformat.images import NewOutput, OutputTensor
from loraformat.loading import open_base
from loraformat.spans import InputFile
from outputs import write_images

Arrays = dict[str, NDArray[Any]]
INDEX = "model.safetensors.index.json"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


class TestCheckpointFolderLaws(StateDictLaws):
    base = BASE
    shards = 3

    def write(self, folder: Path, arrays: Mapping[str, Array]) -> Path:
        return write_model_folder(folder, arrays, "model.safetensors", self.shards, write_loose_state)

    def read(self, path: Path) -> Arrays:
        return read_folder(path)


class TestOneFileLaws(TestCheckpointFolderLaws):
    shards = 0


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


@pytest.mark.parametrize("value", [[], {}, ["gpt2"], {"gpt2": 1}, 3, True, None, 1.5, ""])
def test_a_model_type_that_is_no_text_is_none(tmp_path: Path, value: Any) -> None:
    base = open_base(write_folder(tmp_path / "base", make_arrays(), model_type=value))
    assert {site.module for site in base.sites} >= {Q, K}


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
    (base / "onnx" / "model.onnx").write_bytes(b"x")
    receipt = loraformat.merge(base, [adapter], tmp_path / "out")
    assert sorted(problem.where for problem in receipt.problems if problem.code == "LF609") == [
        "onnx/model.onnx",
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


class TestRewriting:
    """What the plan asks for beyond the laws: where new tensors go, the index, the configuration, the tokenizer."""

    @pytest.fixture
    def base(self, tmp_path: Path) -> BaseModel:
        path = write_model_folder(
            tmp_path / "m", make_state(), "model.safetensors", 3, write_loose_state, vocab_size=11
        )
        (path / "tokenizer.json").write_text("old")
        return open_base(path)

    def rewrite(
        self,
        base: BaseModel,
        tensors: list[OutputTensor],
        changes: Mapping[str, Any] = {},
        replaced: Mapping[str, InputFile] = {},
    ) -> Path:
        assert base.rewriter is not None
        output = base.path.with_name("out")
        fresh = {tensor.name: bytes(tensor.nbytes) for tensor in tensors if not tensor.is_copied}
        images = base.rewriter.describe_rewritten(NewOutput(output, 9, "0"), NewContents(tensors, changes, replaced))
        assert images[-1].path == output / "merge_receipt.json"
        write_images(images, fresh=fresh)
        return output

    def test_new_tensors_stand_beside_their_neighbours(self, base: BaseModel) -> None:
        assert base.rewriter is not None
        names = ["model.layers.1.conv.bias", f"{HEAD}.bias", "model.layers.1.other.weight", "stranger.weight"]
        new = [OutputTensor(name, BY_NAME["float32"], (2, 3), None) for name in names]
        output = self.rewrite(base, [*new, *base.rewriter.output_tensors()])
        places, old = read_index(output)["weight_map"], read_index(base.path)["weight_map"]
        assert places[names[0]] == old["model.layers.1.conv.weight"]
        assert places[names[1]] == old[f"{HEAD}.weight"]
        assert places[names[2]] in {old[name] for name in old if name.startswith("model.layers.1.")}
        assert {name: shard for name, shard in places.items() if name not in names} == old
        held = {name: path.name for path in output.glob("*.safetensors") for name in load_file(path)}
        assert held == places

    def test_the_index_counts_anew(self, base: BaseModel) -> None:
        assert base.rewriter is not None
        index = read_index(base.path)
        index["metadata"] |= {"total_parameters": 1, "note": "kept"}
        (base.path / INDEX).write_text(json.dumps(index))
        base = open_base(base.path)
        assert base.rewriter is not None
        tensors = [*base.rewriter.output_tensors(), OutputTensor("a.bias", BY_NAME["float16"], (5,), None)]
        arrays = make_state()
        assert read_index(self.rewrite(base, tensors))["metadata"] == {
            "note": "kept",
            "total_parameters": sum(array.size for array in arrays.values()) + 5,
            "total_size": sum(array.nbytes for array in arrays.values()) + 10,
        }

    def test_untouched_shards_are_whole_copies(self, base: BaseModel) -> None:
        assert base.rewriter is not None
        new = OutputTensor(f"{HEAD}.bias", BY_NAME["float32"], (11,), None)
        output = self.rewrite(base, [*base.rewriter.output_tensors(), new])
        shards = sorted(path.name for path in output.glob("*.safetensors"))
        same = [name for name in shards if (output / name).read_bytes() == (base.path / name).read_bytes()]
        assert len(shards) == 3
        assert set(shards) - set(same) == {read_index(base.path)["weight_map"][f"{HEAD}.weight"]}

    def test_a_shard_that_lost_all_its_tensors_is_gone(self, base: BaseModel) -> None:
        assert base.rewriter is not None
        places = read_index(base.path)["weight_map"]
        gone = places[f"{HEAD}.weight"]
        kept = [tensor for tensor in base.rewriter.output_tensors() if places[tensor.name] != gone]
        output = self.rewrite(base, kept)
        assert not (output / gone).exists()
        assert gone not in read_index(output)["weight_map"].values()

    def test_the_configuration_follows_and_the_tokenizer_is_replaced(self, base: BaseModel, tmp_path: Path) -> None:
        assert base.rewriter is not None
        (tmp_path / "new.json").write_text("new")
        replaced = {"tokenizer.json": InputFile(tmp_path / "new.json"), "merges.txt": InputFile(tmp_path / "new.json")}
        changes = {"vocab_size": 13, "tie_word_embeddings": False}
        assert base.rewriter.check_config(changes) == []
        output = self.rewrite(base, base.rewriter.output_tensors(), changes, replaced)
        text = (base.path / "config.json").read_text()
        assert (output / "config.json").read_text() == text.replace(
            '"vocab_size": 11', '"vocab_size": 13,\n  "tie_word_embeddings": false'
        )
        assert [(output / name).read_text() for name in replaced] == ["new", "new"]

    def test_without_a_configuration_a_change_of_it_is_said(self, tmp_path: Path) -> None:
        path = write_model_folder(tmp_path / "n", make_state(), "model.safetensors", 0, write_loose_state)
        (path / "config.json").unlink()
        rewriter = open_base(path).rewriter
        assert rewriter is not None
        assert [problem.code for problem in rewriter.check_config({"vocab_size": 13})] == ["LF614"]


def test_diffusers_names_are_known(tmp_path: Path) -> None:
    path = write_model_folder(
        tmp_path / "unet", make_state(), "diffusion_pytorch_model.safetensors", 2, write_loose_state
    )
    assert open_base(path).format == "safetensors folder"
