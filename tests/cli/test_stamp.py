"""`stamp`, and the fingerprints in `merge` and `validate`."""

import json
from pathlib import Path

import numpy as np
import pytest

from builders import lora_factors, write_onnx, write_peft
from graphs import dyadic_factors, make_adapter, make_target
from loraformat.errors import refuse


@pytest.fixture
def stamped():
    return make_adapter(make_target("model.q", dyadic_factors(np.random.default_rng(0), 6, 10, 3)))


def test_stdout_is_the_path_alone(run, face, stamped) -> None:
    face.answer("stamp", stamped)
    face.answer("save", lambda adapter, path, force: path)
    result = run("stamp", "style", "--base", "m.onnx", "-o", "out.safetensors")
    assert (result.exit_code, result.stdout) == (0, "out.safetensors\n")
    assert result.stderr == "targets bound to m.onnx: 1\n"


def test_every_flag_reaches_the_face(run, face, stamped) -> None:
    face.answer("stamp", stamped)
    face.answer("save", lambda adapter, path, force: path)
    words = "--force --scheme peft --alpha 16 --strip-prefix model."
    run("stamp", "style", "--base", "m.onnx", "-o", "out.safetensors", *words.split())
    (stamping, saving) = face.calls
    flags = {"scheme": "peft", "alpha": 16.0, "scale": None, "strip_prefix": "model."}
    assert stamping == ("stamp", (Path("style"), Path("m.onnx")), flags)
    assert saving == ("save", (stamped, Path("out.safetensors")), {"force": True})


def test_as_json(run, face, stamped) -> None:
    face.answer("stamp", stamped)
    face.answer("save", lambda adapter, path, force: path)
    result = run("stamp", "style", "--base", "m.onnx", "-o", "out.safetensors", "--json")
    assert json.loads(result.stdout) == {"output": "out.safetensors", "base": "m.onnx", "targets": 1}


@pytest.mark.parametrize(
    "words",
    [
        ["style", "-o", "x"],
        ["style", "--base", "m"],
        ["--base", "m", "-o", "x"],
        ["style", "--base", "m", "-o", "x", "--alpha", "1", "--scale", "1"],
    ],
)
def test_wrong_usage(run, face, words) -> None:
    face.answer("stamp", None)
    assert run("stamp", *words).exit_code == 2
    assert face.calls == []


def test_nothing_is_written_after_an_error(run, face) -> None:
    face.answer("stamp", refuse("LF401", "model.q", "nothing of this name"))
    face.answer("save", None)
    assert run("stamp", "style", "--base", "m", "-o", "x").exit_code == 1
    assert [name for name, _, _ in face.calls] == ["stamp"]


def test_end_to_end(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stamp, validate and merge: the right base passes, another one is refused, and accepted on demand."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    write_peft(tmp_path / "style", {"model.q": lora_factors(rng, 12, 8, 2)})
    for name in ("right", "wrong"):
        write_onnx(tmp_path / f"{name}.onnx", {"model.q": rng.standard_normal((12, 8)).astype(np.float32)})
    done = run("stamp", "style", "--base", "right.onnx", "-o", "bound.safetensors")
    assert (done.exit_code, done.stdout) == (0, "bound.safetensors\n")
    assert run("stamp", "style", "--base", "right.onnx", "-o", "bound.safetensors").exit_code == 4
    assert run("stamp", "style", "--base", "right.onnx", "-o", "bound.safetensors", "--force").exit_code == 0
    assert run("validate", "bound.safetensors", "--base", "right.onnx").exit_code == 0
    refused = run("validate", "bound.safetensors", "--base", "wrong.onnx")
    assert refused.exit_code == 1
    assert "LF406" in refused.stdout
    refused = run("merge", "wrong.onnx", "bound.safetensors", "-o", "merged.onnx")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "--ignore-fingerprints" in refused.stderr
    done = run("merge", "wrong.onnx", "bound.safetensors", "-o", "merged.onnx", "--ignore-fingerprints")
    assert (done.exit_code, done.stdout) == (0, "merged.onnx\n")
    dry = run("merge", "wrong.onnx", "bound.safetensors", "-o", "other.onnx", "--dry-run", "--ignore-fingerprints")
    assert dry.exit_code == 0
