"""What the pages for users name: commands, options, functions and reason codes that there are."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import loraformat
from loraformat.reasons import all_reasons
from loraformat_cli.group import root

HOUSE = Path(__file__).parents[2]
PAGES = [HOUSE / "README.md", *sorted((HOUSE / "docs").glob("*.md"))]
TEXTS = [*PAGES, HOUSE / "spec" / "reasons.toml", *sorted((HOUSE / "cli").rglob("*.py"))]
CONTEXT = click.Context(root)


def _options(command: click.Command) -> frozenset[str]:
    options = [each for each in command.params if isinstance(each, click.Option)]
    own = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    return frozenset(own | {"--help", "-h", "--version"})


COMMANDS = {
    name: _options(command)
    for name in root.list_commands(CONTEXT)
    if (command := root.get_command(CONTEXT, name)) is not None
}
ALL = frozenset().union(*COMMANDS.values())


def _uses(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each call of a command and the options in it, which end where the shell's command does."""
    for name, words in re.findall(r"(?<![\w.-])loraformat ([a-z][a-z-]*)((?:(?!loraformat )[^\n`|#;&])*)", text):
        yield name, re.findall(r"(?<=[ \[])--?[a-z][a-z-]*", words)


def name_of(path: Path) -> str:
    return str(path.relative_to(HOUSE))


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_commands_have_the_options_that_they_are_shown_with(path: Path) -> None:
    uses = [(name, options) for name, options in _uses(path.read_text(encoding="utf-8")) if name in COMMANDS]
    assert [(name, sorted(set(options) - COMMANDS[name])) for name, options in uses] == [(name, []) for name, _ in uses]


def test_the_page_of_commands_is_what_they_declare() -> None:
    """`python docs/make_commands.py` writes it anew."""
    page = HOUSE / "docs" / "commands.md"
    written = runpy.run_path(str(page.with_name("make_commands.py")))["render"]()
    assert page.read_text(encoding="utf-8") == written
    named = {option for name in re.findall(r"^\| `([^`]+)`", written, re.MULTILINE) for option in name.split(", ")}
    assert named == ALL - {"--help", "-h", "--version"}


@pytest.mark.parametrize("path", [*PAGES, HOUSE / "spec" / "reasons.toml"], ids=name_of)
def test_an_option_by_itself_is_one_of_some_command(path: Path) -> None:
    named = re.findall(r"(?:`|Leave out |[(:] )(--[a-z][a-z-]*)", path.read_text(encoding="utf-8"))
    assert set(named) <= ALL


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_functions_and_reasons_of_a_page_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert {name for name in re.findall(r"\bloraformat\.([a-z_]+)\(", text) if not hasattr(loraformat, name)} == set()
    assert set(re.findall(r"\bLF\d{3}\b", text)) <= all_reasons().keys()


def test_a_wrong_option_is_found() -> None:
    shown = (
        "$ loraformat merge base.onnx style --weight 2 -o out.onnx | loraformat verify --adapter x\n`loraformat kinds`"
    )
    assert list(_uses(shown)) == [("merge", ["--weight", "-o"]), ("verify", ["--adapter"]), ("kinds", [])]
    assert "--weight" not in COMMANDS["merge"]
