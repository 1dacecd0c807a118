"""`validate`: what reaches the face, what reaches whom, and how it ends."""

import json
from pathlib import Path

import numpy as np
import pytest

from builders import lora_factors, write_onnx, write_peft
from loraformat import Verdict
from loraformat.errors import refuse
from loraformat.problems import Problem, Severity
from loraformat.reports import list_formats


def verdict(*severities: Severity, path: str = "style") -> Verdict:
    problems = tuple(Problem("LF206", "model.q", f"rank {place}", severity=s) for place, s in enumerate(severities))
    return Verdict(Path(path), "peft", 2, problems, Path(path) / "adapter_model.safetensors")


def test_the_report_is_stdout_and_the_summary_is_not(run, face) -> None:
    face.answer("validate", [verdict(), verdict("warning", path="other")])
    result = run("validate", "style", "other")
    assert result.exit_code == 0
    assert result.stdout.startswith("ok style (peft, 2 targets)\nwarning other (peft, 2 targets)\n  warning: LF206 ")
    assert result.stderr == "2 checked: 1 ok, 1 with warnings only\n"
    assert run("validate", "style", "-q").stderr == ""


def test_every_flag_reaches_the_face(run, face) -> None:
    face.answer("validate", [])
    run("validate", "a", "b", "--base", "m.onnx", "--alpha", "8")
    run("validate", "a", "--scale", "-0.5")
    assert face.calls == [
        ("validate", ((Path("a"), Path("b")),), {"base": Path("m.onnx"), "alpha": 8.0, "scale": None}),
        ("validate", ((Path("a"),),), {"base": None, "alpha": None, "scale": -0.5}),
    ]


ENDS = [
    ((), "error", 0),
    (("note",), "warning", 0),
    (("warning",), "error", 0),
    (("warning",), "warning", 1),
    (("note", "error"), "error", 1),
    (("error",), "warning", 1),
]


@pytest.mark.parametrize(("severities", "fail_on", "code"), ENDS)
@pytest.mark.parametrize("form", list_formats())
def test_exit_codes(run, face, form, severities, fail_on, code) -> None:
    face.answer("validate", [verdict(), verdict(*severities)])
    assert run("validate", "x", "--fail-on", fail_on, "--format", form).exit_code == code


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["x", "--format", "xml"],
        ["x", "--fail-on", "note"],
        ["x", "--alpha", "1", "--scale", "1"],
        ["x", "--alpha", "nan"],
        ["x", "--json", "--format", "sarif"],
    ],
)
def test_wrong_usage(run, face, words) -> None:
    face.answer("validate", [])
    assert run("validate", *words).exit_code == 2
    assert face.calls == []


def test_errors_end_as_they_always_do(run, face) -> None:
    face.answer("validate", refuse("LF100", "base.onnx", "nothing at this path"))
    result = run("validate", "x", "--base", "base.onnx")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "LF100" in result.stderr
    for words in (["--json"], ["--format", "json"]):
        result = run("validate", "x", "--base", "base.onnx", *words)
        assert (result.exit_code, result.stderr) == (3, "")
        assert json.loads(result.stdout)["problems"][0]["code"] == "LF100"


@pytest.mark.parametrize("words", [["--json"], ["--format", "json"], ["--json", "--format", "json"]])
def test_json_is_one_object(run, face, words) -> None:
    face.answer("validate", [verdict("warning")])
    result = run("validate", "x", *words)
    document = json.loads(result.stdout)
    assert document == {"version": "1.0", "verdicts": [verdict("warning").as_json()]}
    assert result.stderr == ""


def test_the_failing_cases_of_junit_follow_the_flag(run, face) -> None:
    face.answer("validate", [verdict("warning")])
    assert 'failures="0"' in run("validate", "x", "--format", "junit").stdout
    assert 'failures="1"' in run("validate", "x", "--format", "junit", "--fail-on", "warning").stdout


def test_github_paths_start_at_the_working_folder(run, face, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    face.answer("validate", [verdict("error", path=str(tmp_path / "a"))])
    assert run("validate", "a", "--format", "github").stdout.startswith("::error file=a/adapter_model.safetensors,")


def test_a_report_into_a_file(run, face, tmp_path) -> None:
    face.answer("validate", [verdict("error")])
    output = tmp_path / "report.json"
    result = run("validate", "x", "--format", "sarif", "-o", output)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "1 checked: 1 with errors\n"
    assert json.loads(output.read_text())["version"] == "2.1.0"
    assert list(tmp_path.iterdir()) == [output]


def test_a_dash_is_stdout(run, face) -> None:
    face.answer("validate", [verdict()])
    assert run("validate", "x", "-o", "-").stdout == "ok x (peft, 2 targets)\n".replace("x", "style")


def test_a_report_replaces_nothing_unasked(run, face, tmp_path) -> None:
    face.answer("validate", [verdict()])
    output = tmp_path / "report.txt"
    output.write_text("old")
    result = run("validate", "x", "-o", output)
    assert (result.exit_code, output.read_text()) == (4, "old")
    assert "LF601" in result.stderr
    assert run("validate", "x", "-o", output, "--force").exit_code == 0
    assert output.read_text() == "ok style (peft, 2 targets)\n"


def test_a_report_never_replaces_what_was_checked(run, face, tmp_path) -> None:
    adapter = tmp_path / "adapter_model.safetensors"
    adapter.write_bytes(b"precious")
    face.answer("validate", [Verdict(tmp_path, "peft", 1, (), adapter)])
    result = run("validate", tmp_path, "-o", adapter, "--force")
    assert (result.exit_code, adapter.read_bytes()) == (4, b"precious")
    assert "LF602" in result.stderr


# --- with real files -------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    down, up = lora_factors(rng, 12, 8, 2)
    write_peft(tmp_path / "adapters" / "good", {"model.q": (down, up)})
    write_peft(tmp_path / "adapters" / "silent", {"model.q": (down, 0 * up)})
    (tmp_path / "adapters" / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    write_onnx(tmp_path / "base.onnx", {"model.q": rng.standard_normal((12, 8)).astype(np.float32)})
    return tmp_path / "adapters"


def test_end_to_end(spawn, adapters: Path) -> None:
    done = spawn("validate", "adapters", "--base", "base.onnx")
    assert done.returncode == 1
    heads = [line for line in done.stdout.decode().splitlines() if not line.startswith(" ")]
    assert heads == [
        "ok adapters/good (peft, 1 target)",
        "error adapters/pointer.safetensors",
        "warning adapters/silent (peft, 1 target)",
    ]
    assert b"git lfs pull" in done.stdout
    assert done.stderr == b"3 checked: 1 ok, 1 with errors, 1 with warnings only\n"


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--fail-on", "warning"], 1)])
def test_end_to_end_of_a_warning(
    run, monkeypatch: pytest.MonkeyPatch, adapters: Path, flags: list[str], code: int
) -> None:
    monkeypatch.chdir(adapters.parent)
    assert run("validate", "adapters/silent", *flags).exit_code == code


@pytest.mark.parametrize("form", list_formats())
def test_end_to_end_of_every_format(run, monkeypatch: pytest.MonkeyPatch, adapters: Path, form: str) -> None:
    """The same bytes on stdout and, in another run, in a file."""
    monkeypatch.chdir(adapters.parent)
    first = run("validate", "adapters", "--format", form)
    assert first.exit_code == 1
    assert "LF111" in first.stdout
    run("validate", "adapters", "--format", form, "-o", "report")
    assert (adapters.parent / "report").read_bytes() == first.stdout_bytes


def test_end_to_end_without_the_base(run, monkeypatch: pytest.MonkeyPatch, adapters: Path) -> None:
    monkeypatch.chdir(adapters.parent)
    done = run("validate", "adapters", "--base", "gone.onnx")
    assert (done.exit_code, done.stdout) == (3, "")
    assert "LF100" in done.stderr
