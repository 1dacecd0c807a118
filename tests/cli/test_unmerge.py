"""`unmerge`: what reaches the face, the path on stdout, and the warning where it is not exact."""

import json
from pathlib import Path

import pytest

from loraformat.errors import refuse
from loraformat.merging.unmerging import Undone

EXACT = Undone(Path("/models/base.onnx"), True, 4096)
NEARLY = Undone(Path("/models/nearly.onnx"), False, 4096)


def test_stdout_is_the_path_alone(run, face) -> None:
    face.answer("unmerge", EXACT)
    result = run("unmerge", "merged.onnx", "-o", "base.onnx")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "/models/base.onnx\n", "")


def test_a_subtraction_says_that_it_is_not_exact(run, face) -> None:
    face.answer("unmerge", NEARLY)
    result = run("unmerge", "merged.onnx", "--adapter", "style", "-o", "nearly.onnx")
    assert (result.exit_code, result.stdout) == (0, "/models/nearly.onnx\n")
    assert "warning: LF623" in result.stderr


@pytest.mark.parametrize("undone", [EXACT, NEARLY], ids=["exact", "nearly"])
def test_json_is_one_object(run, face, undone) -> None:
    face.answer("unmerge", undone)
    result = run("unmerge", "merged.onnx", "--json")
    assert json.loads(result.stdout) == undone.as_json()


def test_every_flag_reaches_the_face(run, face) -> None:
    face.answer("unmerge", EXACT)
    words = "-o base.onnx --adapter style --adapter subject:0.5 --force --scheme peft --alpha 16"
    assert run("unmerge", "merged.onnx", *words.split()).exit_code == 0
    ((_, args, kwargs),) = face.calls
    assert args == (Path("merged.onnx"), Path("base.onnx"))
    assert kwargs == {
        "adapters": [Path("style"), (Path("subject"), 0.5)],
        "force": True,
        "scheme": "peft",
        "alpha": 16.0,
    }


def test_what_is_not_given_is_left_to_the_face(run, face) -> None:
    face.answer("unmerge", EXACT)
    run("unmerge", "merged.onnx")
    assert face.calls == [("unmerge", (Path("merged.onnx"), None), {"adapters": [], "force": False})]


def test_alpha_and_scale_exclude_each_other(run, face) -> None:
    face.answer("unmerge", EXACT)
    assert run("unmerge", "merged.onnx", "--alpha", "1", "--scale", "1").exit_code == 2
    assert face.calls == []


def test_nothing_to_undo_it_with(run, face) -> None:
    face.answer("unmerge", refuse("LF622", "merged.onnx", "no journal, no kept bytes and no adapters", "one of them"))
    result = run("unmerge", "merged.onnx")
    assert result.exit_code != 0
    assert result.stdout == ""
    assert result.stderr.startswith("error: LF622")
