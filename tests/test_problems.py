import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loraformat.problems import Problem, escape_controls
from loraformat.reasons import find_reason


def test_a_problem_is_a_paragraph() -> None:
    problem = Problem("LF107", "model.safetensors, tensor 'w'", "it begins at 5", "4", "Fetch it again.")
    assert str(problem).splitlines() == [
        f"LF107 {find_reason('LF107').title}: model.safetensors, tensor 'w'",
        "  found: it begins at 5",
        "  expected: 4",
        "  mend: Fetch it again.",
    ]


def test_what_is_not_said_has_no_line() -> None:
    assert [line.split(":")[0].strip() for line in str(Problem("LF101", "x", "0 bytes")).splitlines()[1:]] == [
        "found",
        "mend",
    ]


def test_advice_is_its_own_or_that_of_the_reason() -> None:
    assert Problem("LF101", "x", "y").advice == find_reason("LF101").mend
    assert Problem("LF101", "x", "y", mend="Turn it off and on.").advice == "Turn it off and on."


def test_the_record_holds_everything() -> None:
    record = Problem("LF504", "w", "0.4", "0.5", severity="warning").as_json()
    assert json.loads(json.dumps(record)) == {
        "code": "LF504",
        "severity": "warning",
        "title": find_reason("LF504").title,
        "where": "w",
        "found": "0.4",
        "expected": "0.5",
        "mend": find_reason("LF504").mend,
    }


def test_an_unknown_code_cannot_be_said() -> None:
    with pytest.raises(KeyError):
        str(Problem("LF000", "x", "y"))


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain, größe, 日本", "plain, größe, 日本"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\tb\rc\0", "a\\tb\\rc\\x00"),
        ("one\ntwo", "one\ntwo"),
        ("a\u202egpj.exe", "a\\u202egpj.exe"),
        ("\u200b\u2066\u061c", "\\u200b\\u2066\\u061c"),
        ("\ud800", "\\ud800"),
        ("\x9b1m", "\\x9b1m"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_controls_are_written_out(text: str, escaped: str) -> None:
    assert escape_controls(text) == escaped


@given(st.text())
def test_nothing_escaped_can_drive_a_terminal(text: str) -> None:
    assert escape_controls(text).replace("\n", "").isprintable()


@given(st.text(), st.text(), st.text(), st.text())
@example("a\nLF999 forged", "b\n", "\nc", "d\n\n")
def test_no_name_can_forge_a_line(where: str, found: str, expected: str, mend: str) -> None:
    lines = str(Problem("LF101", where, found, expected, mend)).split("\n")
    assert len(lines) == 3 + bool(expected)
    assert all(line.isprintable() for line in lines)
