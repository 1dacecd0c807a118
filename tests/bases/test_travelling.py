"""What travels with the weights: sub-folders, hub caches, modules of sentence-transformers; and what stays behind."""

import json
import os
from pathlib import Path

import pytest

from loraformat.bases import list_tokenizer_files
from loraformat.bases._travelling import find_travelling
from loraformat.errors import RefusedError
from loraformat.limits import MAX_FOLDER_DEPTH, MAX_TRAVELLING_FILES

ENTRY = "model.safetensors"


def put(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def travel(folder: Path) -> tuple[list[str], dict[str, str]]:
    files, problems = find_travelling(folder / ENTRY, {ENTRY})
    assert all(file.read(0, file.size_bytes) for file in files.values())
    assert {problem.code for problem in problems} <= {"LF609"}
    return sorted(files), {problem.where: problem.found for problem in problems}


def test_every_regular_file_travels_from_sub_folders_too(tmp_path: Path) -> None:
    names = ["README.md", ".gitattributes", "config.json", "1_Pooling/config.json", "a/b/c/deep.txt", "tokenizer.model"]
    assert travel(put(tmp_path, ENTRY, *names)) == (sorted(names), {})


def test_weights_of_other_formats_stay_behind(tmp_path: Path) -> None:
    weights = ["pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "original/consolidated.00.pth", "x.safetensors"]
    indexes = ["pytorch_model.bin.index.json", "other.safetensors.index.json"]
    put(tmp_path, ENTRY, "original/params.json", "index.json", *weights, *indexes)
    files, left_out = travel(tmp_path)
    assert files == ["index.json", "original/params.json"]
    assert left_out.keys() == {*weights, *indexes}


def test_what_killed_runs_leave_stays_behind(tmp_path: Path) -> None:
    """A part of ours in the base's folder is none of its files."""
    parts = [".x.json.loraformat-12-0123abcd.part", "sub/.y.loraformat-resume-0123.log", ".loraformat-journal"]
    put(tmp_path, ENTRY, "config.json", ".x.part", *parts)
    files, left_out = travel(tmp_path)
    assert files == [".x.part", "config.json"]
    assert left_out.keys() == set(parts)


def test_weights_of_modules_beside_the_model_travel(tmp_path: Path) -> None:
    """sentence-transformers: the dense layer is part of the model, and `modules.json` says so."""
    put(tmp_path, ENTRY, "2_Dense/model.safetensors", "2_Dense/config.json", "3_Other/model.safetensors")
    listed = [{"idx": 0, "path": ""}, {"idx": 2, "path": "2_Dense"}, {"path": 3}, "x"]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    files, left_out = travel(tmp_path)
    assert files == ["2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"]
    assert left_out.keys() == {"3_Other/model.safetensors"}


@pytest.mark.parametrize("text", ["{", "{}", "[[]]", '[{"path": ""}]'])
def test_a_list_of_modules_that_is_none_is_a_file_like_any_other(tmp_path: Path, text: str) -> None:
    put(tmp_path, ENTRY, "other.bin")
    (tmp_path / "modules.json").write_text(text)
    files, left_out = travel(tmp_path)
    assert files == ["modules.json"]
    assert left_out.keys() == {"other.bin"}


def test_hidden_folders_stay_behind(tmp_path: Path) -> None:
    put(tmp_path, ENTRY, ".git/config", ".cache/huggingface/x", "__pycache__/modeling.pyc", "modeling.py")
    files, left_out = travel(tmp_path)
    assert files == ["modeling.py"]
    assert left_out.keys() == {".git", ".cache", "__pycache__"}


def test_a_hub_cache_is_followed_and_nothing_else(tmp_path: Path) -> None:
    """Snapshots are links into a store of blobs; a link elsewhere could carry any file of the machine along."""
    blobs, snapshot = put(tmp_path / "blobs", "1", "2", "3"), tmp_path / "snapshots" / "abc"
    (snapshot / "sub").mkdir(parents=True)
    os.symlink("../../blobs/1", snapshot / ENTRY)
    os.symlink("../../blobs/2", snapshot / "config.json")
    os.symlink("../../../blobs/3", snapshot / "sub" / "more.json")
    (tmp_path / "secret").write_text("secret")
    os.symlink(tmp_path / "secret", snapshot / "secret.json")
    os.symlink("nowhere", snapshot / "dangling.json")
    os.symlink(blobs, snapshot / "folder")
    os.symlink("..", snapshot / "loop")
    os.mkfifo(snapshot / "pipe")
    files, left_out = travel(snapshot)
    assert files == ["config.json", "sub/more.json"]
    assert left_out.keys() == {"secret.json", "dangling.json", "folder", "loop", "pipe"}


def test_there_is_an_end_to_depth_and_number(tmp_path: Path) -> None:
    deep = "/".join("d" * (MAX_FOLDER_DEPTH + 1))
    put(tmp_path, ENTRY, f"{deep}/x", *(f"logs/{index:04}" for index in range(MAX_TRAVELLING_FILES)), "zz", "last/x")
    files, problems = find_travelling(tmp_path / ENTRY, {ENTRY})
    assert len(files) == MAX_TRAVELLING_FILES
    assert "zz" in files
    assert [(problem.where, problem.severity) for problem in problems] == [(deep, "note"), (str(tmp_path), "warning")]
    assert problems[1].found.startswith("2 files")


def test_the_tokenizer_of_an_adapter_is_listed(tmp_path: Path) -> None:
    names = ["tokenizer.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"]
    put(tmp_path, "adapter_config.json", "adapter_model.safetensors", "README.md", *names)
    found = list_tokenizer_files(tmp_path)
    assert sorted(found) == sorted(names)
    assert found["tokenizer.json"].read(0, 14) == b"tokenizer.json"
    assert list_tokenizer_files(tmp_path / "absent") == {}


def test_a_tokenizer_that_is_a_link_elsewhere_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "secret", "a/adapter_config.json")
    os.symlink(tmp_path / "secret", tmp_path / "a" / "tokenizer.json")
    with pytest.raises(RefusedError) as caught:
        list_tokenizer_files(tmp_path / "a")
    assert caught.value.codes == ("LF903",)
