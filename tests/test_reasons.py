import ast
import re
import tomllib
from pathlib import Path

import pytest

from loraformat.reasons import EXIT_FINDING, EXIT_INPUT, EXIT_OUTPUT, EXIT_REFUSED, all_reasons, find_reason

ROOT = Path(__file__).parent.parent
LIST = ROOT / "spec" / "reasons.toml"
SOURCES = sorted([*ROOT.glob("loraformat/**/*.py"), *ROOT.glob("cli/**/*.py")])


def codes_in(source: Path) -> set[str]:
    """Return every code that a module names, documentation included."""
    return set(re.findall(r"\bLF\d{3}\b", source.read_text(encoding="utf-8")))


def test_every_code_in_the_sources_is_listed() -> None:
    used = {code: source.name for source in SOURCES for code in codes_in(source)}
    assert len(used) > 20
    assert not used.keys() - all_reasons().keys(), used


def test_every_listed_code_is_raised_somewhere() -> None:
    """It stands in the code, by itself in a string, and not only where code is described."""
    constants = (node for source in SOURCES for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
    used = {node.value for node in constants if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert all_reasons().keys() - used == set()


def test_the_list_is_complete_sorted_and_of_one_shape() -> None:
    table = tomllib.loads(LIST.read_text(encoding="utf-8"))
    assert list(table) == sorted(table)
    assert all(re.fullmatch(r"LF[1-9]\d\d", code) for code in table)
    for code, fields in table.items():
        assert fields.keys() == {"title", "exit", "since", "mend"}, code
        assert re.fullmatch(r"\d+\.\d+", fields["since"]), code
        assert fields["mend"].endswith("."), code
        assert fields["title"].strip(" .") == fields["title"], code


def test_titles_are_unique() -> None:
    titles = [reason.title for reason in all_reasons().values()]
    assert sorted(titles) == sorted(set(titles))


def test_exit_codes_are_the_four() -> None:
    exits = {reason.exit for reason in all_reasons().values()}
    assert exits == {EXIT_FINDING, EXIT_INPUT, EXIT_REFUSED, EXIT_OUTPUT} == {1, 3, 4, 5}


def test_a_reason_is_found_by_its_code() -> None:
    reason = find_reason("LF101")
    assert (reason.code, reason.title, reason.exit, reason.since) == ("LF101", "file too short", 3, "1.0")
    assert all(reason.code == code for code, reason in all_reasons().items())
    with pytest.raises(KeyError):
        find_reason("LF000")
