"""Workflow commands, read by a reader written from the runner's rules (actions/runner, ActionCommand.cs)."""

import re
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from loraformat import Verdict
from loraformat.problems import Problem
from loraformat.reports import Setting, write_report
from reports.samples import ALL, BROKEN, FORGED, ROOT

COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}
IN_DATA = {"%0D": "\r", "%0A": "\n", "%25": "%"}
IN_PROPERTY = {**IN_DATA, "%3A": ":", "%2C": ","}


@dataclass
class Command:
    name: str
    properties: dict[str, str]
    message: str


def unescape(text: str, table: dict[str, str]) -> str:
    return re.sub("|".join(table), lambda match: table[match[0]], text)


def read_command(line: str) -> Command:
    """Read as the runner does: `::name key=value,key=value::message`."""
    assert line.startswith("::")
    head, _, message = line[2:].partition("::")
    name, _, rest = head.partition(" ")
    pairs = (pair.split("=", 1) for pair in rest.split(","))
    return Command(name, {key: unescape(value, IN_PROPERTY) for key, value in pairs}, unescape(message, IN_DATA))


def commands(verdicts: list[Verdict]) -> list[Command]:
    # The runner breaks lines at \n, \r and \r\n.
    text = write_report("github", verdicts, Setting(ROOT))
    return [read_command(line) for line in re.split("\r\n|\r|\n", text.removesuffix("\n")) if line]


def test_one_command_for_each_problem() -> None:
    problems = [problem for verdict in ALL for problem in verdict.problems]
    found = commands(ALL)
    assert [command.name for command in found] == [COMMANDS[problem.severity] for problem in problems]
    assert [command.properties["title"] for command in found] == [f"{each.code} {each.title}" for each in problems]
    assert all(command.properties.keys() == {"file", "title"} for command in found)


def test_files() -> None:
    files = [command.properties["file"] for command in commands(ALL)]
    assert files[0] == "adapters/noted/adapter_model.safetensors"
    assert files[1] == "adapters/warned/adapter_config.json"
    assert files[2] == "/elsewhere/100% söhne.safetensors"


def test_a_message() -> None:
    first = commands([BROKEN])[0]
    assert first.message == (
        "x.safetensors\nfound: 3 bytes\nexpected: at least 8\n"
        "mend: The file is empty or cut off: fetch or write it again."
    )


def test_a_name_forges_no_command() -> None:
    (command,) = commands([FORGED])
    assert command.properties["file"].endswith("/x.safetensors")
    assert "%0A,:;" in command.properties["file"]
    assert command.message.count("\n") == 3
    assert "::error::forged" in command.message


@given(st.text(max_size=40))
def test_any_text_is_one_command(text: str) -> None:
    path = BROKEN.path / text.replace("\0", "") if text.strip("/\0") else BROKEN.path
    (command,) = commands([Verdict(path, "", 0, (Problem("LF206", text, text, text, text, "warning"),))])
    assert command.name == "warning"
    assert command.properties["title"] == "LF206 rank above both dimensions"
