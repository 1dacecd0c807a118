"""`verify`: what reaches the face, what a person is told, and the exit code."""

import json
from pathlib import Path

import pytest

from loraformat.errors import refuse
from loraformat.problems import Problem
from loraformat.verification import Verification

WORDS = ("verify", "merged.onnx", "--base", "base.onnx", "--adapter", "style")
PROVEN = Verification(Path("merged.onnx"), 2, 4096, ())
DIFFERS = Verification(
    Path("merged.onnx"),
    2,
    4096,
    (
        Problem("LF802", "merged.onnx: w", "other bytes, the first at 128", "what base and adapters give"),
        Problem("LF609", "merged.onnx", "left out", severity="note"),
    ),
)


def test_a_proven_model_is_noted_on_stderr(run, face) -> None:
    face.answer("verify", PROVEN)
    result = run(*WORDS)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "2 weights computed once more, 4096 bytes equal" in result.stderr


def test_what_differs_is_named_and_fails(run, face) -> None:
    face.answer("verify", DIFFERS)
    result = run(*WORDS)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: LF802" in result.stderr
    assert "other bytes, the first at 128" in result.stderr
    assert "bytes equal" not in result.stderr


def test_warnings_alone_do_not_fail(run, face) -> None:
    face.answer("verify", Verification(Path("m"), 1, 8, (Problem("LF504", "w", "half", severity="warning"),)))
    result = run(*WORDS)
    assert result.exit_code == 0
    assert "warning: LF504" in result.stderr


@pytest.mark.parametrize(("found", "code"), [(PROVEN, 0), (DIFFERS, 1)], ids=["proven", "differs"])
def test_json_is_one_object_either_way(run, face, found, code) -> None:
    face.answer("verify", found)
    result = run(*WORDS, "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout) == found.as_json()


def test_every_flag_reaches_the_face(run, face) -> None:
    face.answer("verify", PROVEN)
    words = "--adapter subject:0.5 --scheme peft --scale 2 -j 3 --max-memory 64MiB --run --size batch=2"
    assert run(*WORDS, *words.split()).exit_code == 0
    ((_, args, kwargs),) = face.calls
    assert args == (Path("merged.onnx"), Path("base.onnx"), [Path("style"), (Path("subject"), 0.5)])
    assert kwargs == {
        "progress": None,
        "scheme": "peft",
        "scale": 2.0,
        "jobs": 3,
        "max_memory_bytes": 64 << 20,
        "run": True,
        "sizes": {"batch": 2},
    }


def test_what_is_not_given_is_left_to_the_face(run, face) -> None:
    face.answer("verify", PROVEN)
    run(*WORDS)
    assert face.calls[0][2] == {"progress": None, "run": False, "sizes": {}}


@pytest.mark.parametrize(
    "words",
    [WORDS[:4], (*WORDS[:2], *WORDS[4:]), (*WORDS, "-j0"), (*WORDS, "--alpha=1", "--scale=1"), ("verify",)],
    ids=["no adapter", "no base", "no threads", "two scales", "nothing"],
)
def test_misuse(run, face, words) -> None:
    face.answer("verify", PROVEN)
    assert run(*words).exit_code == 2
    assert face.calls == []


def test_a_model_that_cannot_be_read(run, face) -> None:
    face.answer("verify", refuse("LF803", "merged.onnx: receipt", "no receipt"))
    result = run(*WORDS, "--json")
    assert result.exit_code == json.loads(result.stdout)["exit_code"] != 0
