"""The group: commands are found, documented, and cheap to list."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from loraformat_cli import commands
from loraformat_cli.group import root

NAMES = root.list_commands(click.Context(root))
HEAVY = ("numpy", "onnx", "onnxruntime", "rich", "ml_dtypes", "safetensors", "google.protobuf", "importlib.metadata")


def test_a_command_is_a_file() -> None:
    files = {path.stem for path in Path(commands.__path__[0]).glob("*.py") if not path.stem.startswith("_")}
    assert set(NAMES) == {name.replace("_", "-") for name in files}
    assert {"merge", "inspect", "demo", "explain", "completion"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_every_command(run, name, flag) -> None:
    result = run(name, flag)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: loraformat {name} ")
    assert result.stderr == ""


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_option_is_documented(name) -> None:
    command = root.get_command(click.Context(root), name)
    assert command is not None
    assert command.help
    assert command.short_help
    undocumented = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert undocumented == []


def test_group_help_lists_every_command(run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in NAMES)


@pytest.mark.parametrize(("word", "near"), [("merg", "merge"), ("analyze", "analyse"), ("xyz", "--help")])
def test_a_misspelt_command(run, word, near) -> None:
    result = run(word, "model.onnx")
    assert result.exit_code == 2
    assert near in result.stderr


def test_version(run) -> None:
    from importlib.metadata import version

    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"loraformat {version('loraformat')}\n")


def test_a_variable_called_version_is_not_the_flag(run) -> None:
    assert run("explain", "LF401", env={"LORAFORMAT_VERSION": "0.1.0"}).stdout.startswith("LF401 ")


@pytest.mark.parametrize("words", [[], ["nope"], ["merge"], ["merge", "base.onnx"], ["explain", "--nope"]])
def test_wrong_usage_is_2_and_leaves_stdout_alone(run, words) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: loraformat" in result.stderr


@pytest.mark.parametrize("words", [["merge", "--json"], ["merge", "a", "b:nan", "--json"], ["explain", "x", "--json"]])
def test_wrong_usage_as_json(run, words) -> None:
    result = run(*words)
    document = json.loads(result.stdout)
    assert result.exit_code == document["exit_code"] == 2
    assert [problem["code"] for problem in document["problems"]] == ["usage"]
    assert result.stderr == ""


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"], ["inspect", "--help"], ["demo", "--help"]])
@pytest.mark.parametrize("module", ["loraformat", "loraformat_cli"])
def test_help_imports_nothing_heavy(module, words) -> None:
    probe = (
        "import runpy, sys\n"
        f"sys.argv = ['loraformat', *{words!r}]\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    print(stop.code, loaded, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "0 []\n"
    assert done.stdout.startswith("Usage: loraformat")


def test_module_and_program_agree(spawn) -> None:
    program = Path(sys.executable).with_name("loraformat")
    if not program.exists():
        pytest.skip("the program is not installed beside this interpreter")
    installed = subprocess.run([program, "--help"], capture_output=True, check=True, timeout=60)
    assert spawn("--help").stdout == installed.stdout


@pytest.mark.parametrize("command", ["merge", "stamp", "compose", "resize"])
def test_examples_are_not_wrapped(run, command) -> None:
    words = run(command, "--help").stdout
    assert "\\b" not in words
    assert re.search(rf"\n  Examples?:\n    loraformat {command} ", words)
