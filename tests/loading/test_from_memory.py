"""Adapters from the bytes of a file, of every container that adapters come in."""

import io
import json
from pathlib import Path

import pytest

import loraformat
import models
from loraformat.containers import CONTAINERS, WritableContainer
from loraformat.errors import InputError, LoraformatError
from models import RANK

CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["fc"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_adapter(tmp_path_factory.mktemp("memory") / "style")


def rewrite(folder: Path, name: str) -> bytes:
    """Return an adapter's factors as a file of another container, its metadata left out."""
    container = CONTAINERS.find(name)
    assert isinstance(container, WritableContainer)
    tensors = CONTAINERS.find("safetensors").open(folder / "adapter_model.safetensors").tensors  # type: ignore[union-attr]
    sink = io.BytesIO()
    container.write(sink, [(key, each.dtype, each.shape, each.read) for key, each in tensors.items()], {})
    return sink.getvalue()


@pytest.mark.parametrize("container", ["safetensors", "npz", "torch_zip"])
def test_the_bytes_of_a_file_are_the_file(folder: Path, tmp_path: Path, container: str) -> None:
    data = rewrite(folder, container)
    expected = loraformat.load(folder)
    for source in (data, bytearray(data), memoryview(data), io.BytesIO(data)):
        adapter = loraformat.load(source, config=CONFIG)
        assert (adapter.source, len(adapter.sha256)) == ("adapter in memory", 64)
        found = {(t.name, r): f.read().tolist() for t in adapter.targets for r, f in t.factors.items()}
        assert found == {(t.name, r): f.read().tolist() for t in expected.targets for r, f in t.factors.items()}
    assert loraformat.load(loraformat.save(adapter, tmp_path / "out.safetensors")).scheme == "native"


def test_a_file_is_read_from_where_it_stands(folder: Path) -> None:
    data = (folder / "adapter_model.safetensors").read_bytes()
    stream = io.BytesIO(b"before" + data)
    stream.seek(6)
    assert len(loraformat.load(stream, config=CONFIG).targets) == 2
    with (folder / "adapter_model.safetensors").open("rb") as file:
        adapter = loraformat.load(file, config=json.loads((folder / "adapter_config.json").read_text()))
    assert adapter.sha256 == loraformat.load(folder).sha256


def test_it_is_merged_as_the_folder_is(folder: Path, tmp_path: Path) -> None:
    base = models.write_base(tmp_path, "safetensors")
    one = loraformat.merge(base, [folder], tmp_path / "a.safetensors")
    adapter = loraformat.load((folder / "adapter_model.safetensors").read_bytes(), config=CONFIG)
    other = loraformat.merge(base, [adapter], tmp_path / "b.safetensors")
    assert models.read_model(tmp_path / "a.safetensors") == models.read_model(tmp_path / "b.safetensors")
    assert one.adapters[0].sha256 == other.adapters[0].sha256


@pytest.mark.parametrize(
    ("source", "code"),
    [(b"", "LF121"), (b"\x08\0\0\0\0\0\0\0{", "LF121"), (b"<!doctype html>", "LF111"), (io.StringIO("text"), "LF451")],
)
def test_what_is_no_file_is_refused(source: bytes, code: str) -> None:
    with pytest.raises(InputError) as caught:
        loraformat.load(source)
    assert caught.value.codes == (code,)
    assert "adapter in memory" in caught.value.problems[0].where


def test_what_is_not_stated_is_missed(folder: Path) -> None:
    data = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(LoraformatError) as caught:
        loraformat.load(data)
    assert caught.value.codes == ("LF211",)
    assert {target.scale for target in loraformat.load(data, scale=0.5).targets} == {0.5}
