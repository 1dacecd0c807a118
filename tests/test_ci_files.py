"""The files for CI: they parse, and everything that they call exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import jsonschema
import numpy as np
import pytest

from builders import lora_factors, write_peft
from loraformat.reasons import all_reasons
from loraformat.reports import list_formats
from loraformat_cli.group import root
from reports.public_schemas import find_schema

yaml = pytest.importorskip("yaml", reason="PyYAML is missing; pip install pyyaml")

ROOT = Path(__file__).parent.parent
HOOKS, ACTION, PAGE = (ROOT / name for name in (".pre-commit-hooks.yaml", "action.yml", "docs/validate-in-ci.md"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def options_of(command: str) -> dict[str, click.Option]:
    found = root.get_command(click.Context(root), command)
    assert found is not None, f"no command {command}"
    return {name: each for each in found.params if isinstance(each, click.Option) for name in each.opts}


def check_line(line: str) -> None:
    """Check one call of the program: the command exists, and so do its options and their choices."""
    words = shlex.split(line, comments=True)
    words = words[words.index("loraformat") + 1 :]
    options = options_of(words[0])
    for place, word in enumerate(words[1:], 1):
        if word == "--":
            break
        if not word.startswith("-"):
            continue
        assert word in options, f"{word} in {line!r}"
        kind = options[word].type
        if isinstance(kind, click.Choice) and place + 1 < len(words) and "$" not in words[place + 1]:
            assert words[place + 1] in kind.choices, line


def calls_in(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    # What follows a pipe, `||` or `>` belongs to the shell.
    calls = [re.search(r"\bloraformat (validate|explain|merge|stamp)\b[^|>]*", line) for line in lines]
    return [call[0] for call in calls if call]


# --- pre-commit ------------------------------------------------------------------------------------------------------


def test_the_hook() -> None:
    (hook,) = read(HOOKS)
    assert hook.keys() <= {"id", "name", "description", "entry", "language", "types", "files", "require_serial"}
    assert (hook["id"], hook["language"], hook["types"]) == ("loraformat-validate", "python", ["file"])
    assert hook["entry"] == "loraformat validate"
    check_line(hook["entry"])


FILES = [
    ("adapters/style.safetensors", True),
    ("adapter_config.json", True),
    ("a/b/adapter_config.json", True),
    ("adapters/style.safetensors.bak", False),
    ("config.json", False),
    ("safetensors", False),
]


@pytest.mark.parametrize(("path", "wanted"), FILES)
def test_the_files_of_the_hook(path: str, wanted: bool) -> None:
    """pre-commit searches the expression in the path."""
    assert bool(re.search(read(HOOKS)[0]["files"], path)) == wanted


def test_the_hook_as_pre_commit_calls_it(tmp_path: Path) -> None:
    """The entry, its arguments, then the files that changed, from the root of the repository."""
    rng = np.random.default_rng(0)
    write_peft(tmp_path / "good", {"model.q": lora_factors(rng, 6, 10, 2)})
    entry = shlex.split(read(HOOKS)[0]["entry"])
    command = [sys.executable, "-m", *entry, "good/adapter_config.json", "good/adapter_model.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "ok good/adapter_model.safetensors (peft, 1 target)\n")


# --- the action ------------------------------------------------------------------------------------------------------


def steps() -> list[dict[str, Any]]:
    return list(read(ACTION)["runs"]["steps"])


def step(name: str) -> dict[str, Any]:
    return next(each for each in steps() if each.get("name") == name)


def test_the_public_schema_of_actions() -> None:
    schema = find_schema("github-action")
    validator = jsonschema.validators.validator_for(schema)(schema)
    validator.validate(read(ACTION))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**read(ACTION), "runs": {"using": "composite"}})


def test_actions_of_others_are_pinned() -> None:
    used = [each["uses"] for each in steps() if "uses" in each]
    assert len(used) == 2
    assert all(re.fullmatch(r"[\w-]+/[\w/-]+@(v\d+|[0-9a-f]{40})", name) for name in used)
    assert "SHA" in ACTION.read_text()


def test_inputs_are_declared_and_used() -> None:
    declared = read(ACTION)["inputs"]
    used = set(re.findall(r"inputs\.([\w-]+)", ACTION.read_text()))
    assert used == set(declared)
    assert {"paths", "base", "fail-on"} <= used
    assert all(each["description"] and "default" in each for each in declared.values())


def test_no_input_is_part_of_a_script() -> None:
    """`${{ }}` inside `run` is text that is pasted into the script: a branch name could be a command."""
    scripts = [each["run"] for each in steps() if "run" in each]
    assert scripts
    assert not any("${{" in script for script in scripts)


def test_every_call_of_the_action_exists() -> None:
    calls = [call for each in steps() for call in calls_in(each.get("run", ""))]
    assert len(calls) == 2
    for call in calls:
        check_line(call)
    assert any("--format sarif" in call for call in calls)


THE_PROGRAM = f'exec {shlex.quote(sys.executable)} -m loraformat "$@"'


def run_action(
    folder: Path, program: str = THE_PROGRAM, **inputs: str
) -> tuple["subprocess.CompletedProcess[str]", str]:
    """Run the action's script as the runner does; return how it ended and the outputs that it set."""
    programs = folder / "programs"
    programs.mkdir()
    (programs / "loraformat").write_text(f"#!/bin/sh\n{program}\n")
    (programs / "loraformat").chmod(0o755)
    outputs = folder / "outputs"
    outputs.touch()
    env = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_OUTPUT": str(outputs),
        "SARIF": str(folder / "report.sarif"),
        "PATHS": ".",
        "BASE": "",
        "FAIL_ON": "error",
        **inputs,
    }
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step("Validate")["run"]]
    done = subprocess.run(
        command, cwd=folder / "work", env=env, capture_output=True, text=True, check=False, timeout=120
    )
    return done, outputs.read_text()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    down, up = lora_factors(rng, 6, 10, 2)
    write_peft(tmp_path / "work" / "good one", {"model.q": (down, up)})
    write_peft(tmp_path / "work" / "silent", {"model.q": (down, 0 * up)})
    (tmp_path / "work" / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    return tmp_path


def test_the_script_of_the_action(work: Path) -> None:
    done, outputs = run_action(work)
    assert done.returncode == 1
    commands = [line.split()[0] for line in done.stdout.splitlines()]
    assert commands == ["::error", "::warning"]
    assert outputs == f"sarif={work / 'report.sarif'}\n"
    assert '"LF111"' in (work / "report.sarif").read_text()


@pytest.mark.parametrize(
    ("paths", "fail_on", "base", "expected"),
    [
        ("good one\n\nsilent\n", "error", "", ["good one", "silent"]),
        ("silent", "warning", "a base.onnx", ["silent"]),
        ("good one\n$(touch pwned)\n", "error", "", ["good one", "$(touch pwned)"]),
    ],
)
@pytest.mark.parametrize("code", [0, 1])
def test_inputs_reach_the_program(
    tmp_path: Path, paths: str, fail_on: str, base: str, expected: list[str], code: int
) -> None:
    """As words, whatever is in them; the program's second run decides how the job ends."""
    (tmp_path / "work").mkdir()
    notes = f"printf '%s\\n' \"$@\" . >> {shlex.quote(str(tmp_path / 'words'))}; exit {code}"
    done, _ = run_action(tmp_path, notes, PATHS=paths, FAIL_ON=fail_on, BASE=base)
    assert done.returncode == code, done.stderr
    first, last = (words.splitlines() for words in (tmp_path / "words").read_text().split("\n.\n")[:2])
    chosen = ["validate", "--fail-on", fail_on, *(["--base", base] if base else [])]
    report = ["--quiet", "--format", "sarif", "--output", str(tmp_path / "report.sarif"), "--force"]
    assert first == [*chosen, *report, "--", *expected]
    assert last == [*chosen, "--format", "github", "--", *expected]
    assert not list((tmp_path / "work").iterdir())


def test_a_base_that_is_missing_fails_the_job(work: Path) -> None:
    done, outputs = run_action(work, BASE="gone.onnx")
    assert done.returncode == 3
    assert outputs == ""  # nothing to upload
    assert "LF100" in done.stderr


# --- the page --------------------------------------------------------------------------------------------------------


def test_every_call_of_the_page_exists() -> None:
    calls = calls_in(PAGE.read_text(encoding="utf-8"))
    assert len(calls) >= 7
    for call in calls:
        check_line(call.strip("` .").replace("`", ""))


def test_the_page_names_every_format_and_real_codes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert table == set(list_formats())
    assert set(re.findall(r"LF\d{3}", page)) <= all_reasons().keys()


def test_the_examples_of_the_page_are_yaml_that_fits() -> None:
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)]
    hooks, workflow, gitlab = blocks
    assert hooks["repos"][0]["hooks"][0]["id"] == read(HOOKS)[0]["id"]
    given = workflow["jobs"]["validate"]["steps"][1]["with"]
    assert given.keys() <= read(ACTION)["inputs"].keys()
    for line in gitlab["adapters"]["script"][1:]:
        check_line(line)
    assert gitlab["adapters"]["artifacts"]["reports"]["junit"] in gitlab["adapters"]["script"][1]


def test_exit_codes_of_the_page(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    codes = re.findall(r"^\| ([\d, ]+) \|", page, re.MULTILINE)
    assert codes == ["0", "1", "2", "3, 4", "5", "70"]
