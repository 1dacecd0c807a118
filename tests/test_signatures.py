"""What a file is by its first bytes."""

import pickle
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import loraformat
from builders import write_onnx, write_tensors
from graphs import linear_net, write_model
from loraformat.signatures import HEAD_BYTES, describe_head, describe_text

FC = {"fc": np.ones((4, 3), np.float32)}


def zip_head() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("head", "words", "mend"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-LFS pointer", "git lfs pull"),
        (zip_head(), "zip archive", ".pt or .npz"),
        *[(pickle.dumps({"a": 1}, protocol), "pickle", "safetensors") for protocol in (2, 3, 4, 5)],
        (b"GGUF\x03\x00\x00\x00", "GGUF", "adapter"),
        (b"<!DOCTYPE html><html>", "HTML page", "again"),
        (b"<!doctype html>", "HTML page", "again"),
        (b"\n  <html lang='en'>", "HTML page", "again"),
        (b"\x1f\x8b\x08\x00", "gzip", "Unpack"),
        (b"\x89HDF\r\n\x1a\n\x00", "HDF5", "KerasHub"),
        (b"\x93NUMPY\x01\x00v\x00", "array", "npz"),
        (b'{"r": 8}', "JSON", "tensors"),
        (b'\n{\n "r": 8}', "JSON", "tensors"),
    ],
)
def test_known_beginnings(head: bytes, words: str, mend: str) -> None:
    described = describe_head(head[:HEAD_BYTES])
    assert described is not None
    assert words in described.what
    assert mend in described.mend


@pytest.mark.parametrize("head", [b"", b"\x00" * 64, b"version 2", b"GG", b"P", b"hello", bytes(range(64))])
def test_other_beginnings(head: bytes) -> None:
    assert describe_head(head) is None


def test_what_we_read_is_no_stranger(tmp_path: Path) -> None:
    """A model that looks like one of these would be refused."""
    weights = {"m.q": np.ones((3, 2), np.float32)}
    for path in (
        write_tensors(tmp_path / "a.safetensors", weights),
        write_onnx(tmp_path / "b.onnx", weights),
    ):
        assert describe_head(path.read_bytes()[:HEAD_BYTES]) is None


@pytest.mark.filterwarnings("ignore:The onnxtxt format")
@pytest.mark.parametrize("form", ["textproto", "json", "onnxtxt"])
def test_onnx_as_text_is_told_how_to_be_protobuf(tmp_path: Path, form: str) -> None:
    model = linear_net(FC).model()
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path), format=form)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.inspect(path)
    assert caught.value.codes == ("LF111",)
    assert "onnx.load(P, format=F)" in str(caught.value)
    onnx.save(onnx.load(str(path), format=form), tmp_path / "protobuf.onnx")
    assert loraformat.inspect(tmp_path / "protobuf.onnx").base.format == "onnx"


@pytest.mark.parametrize("name", ["model.ort", "model.onnx"])
def test_the_own_format_of_onnxruntime_is_named(tmp_path: Path, name: str) -> None:
    source, path = write_model(tmp_path / "source.onnx", linear_net(FC).model()), tmp_path / name
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    with pytest.raises(loraformat.LoraformatError, match="onnxruntime's own format") as caught:
        loraformat.inspect(path)
    assert caught.value.codes == ("LF111",)


def test_a_line_that_a_download_left() -> None:
    described = describe_text(b"Entry not found")
    assert described is not None
    assert "'Entry not found'" in described.what
    assert describe_text(b"\x08\x0aEntry not found") is None
    assert describe_text(b"short") is None
    assert describe_text(b"\x1f\x8b\x08\x00") == describe_head(b"\x1f\x8b\x08\x00")
