"""What all formats have in common."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loraformat import reports
from loraformat.reports import Setting, list_formats, summarise, write_report
from loraformat.reports._words import as_uri, locate, one_line
from reports.samples import ALL, BROKEN, FINE, FORGED, NOTED, ROOT, WARNED

SETTING = Setting(ROOT)


def test_a_format_is_a_file() -> None:
    files = {path.stem for path in Path(reports.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    assert set(list_formats()) == files == {"text", "json", "sarif", "junit", "github"}


@pytest.mark.parametrize("form", list_formats())
def test_the_same_verdicts_give_the_same_text(form: str) -> None:
    text = write_report(form, ALL, SETTING)
    assert text == write_report(form, list(ALL), SETTING)
    assert write_report(form, [], SETTING) == write_report(form, (), SETTING)
    assert text.endswith("\n")


@pytest.mark.parametrize("form", list_formats())
def test_reports_are_text_that_any_stream_takes(form: str) -> None:
    """No control character, no bidi mark, no lone surrogate: nothing that could drive a terminal or break a parser."""
    text = write_report(form, ALL, SETTING)
    text.encode("utf-8")
    assert not set(text) & set("\r\x1b\x00\x08\u202e\u2028")


@pytest.mark.parametrize("form", list_formats())
def test_every_problem_is_in_every_report(form: str) -> None:
    text = write_report(form, ALL, SETTING)
    for verdict in ALL:
        for problem in verdict.problems:
            assert problem.code in text
    assert text.count("LF209") >= 2


def test_importing_the_package_is_cheap() -> None:
    """The command line lists the formats in its help."""
    probe = (
        "import sys, loraformat.reports\n"
        "heavy = ('numpy', 'onnx', 'json', 'html', 'loraformat.validate', 'importlib.metadata')\n"
        "print([name for name in heavy if name in sys.modules], loraformat.reports.list_formats())"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("[] ('github', 'json', 'junit', 'sarif', 'text')")


def test_text() -> None:
    text = write_report("text", [FINE, NOTED, WARNED], SETTING)
    assert text == (
        "ok adapters/fine.safetensors (native, 1 target)\n"
        "ok adapters/noted (peft, 24 targets)\n"
        "  note: LF304 names were normalised: adapters/noted\n"
        "    found: the prefix module.\n"
        "    mend: Nothing to do: wrapper prefixes of training frameworks are not part of a module's name.\n"
        "warning /repo/adapters/warned/adapter_config.json (peft, 0 targets)\n"
        "  warning: LF221 configuration without tensors: adapters/warned\n"
        "    found: peft_type 'LORA'\n"
        "    expected: tensors\n"
        "    mend: Only the configuration was checked. The adapter itself is adapter_model.safetensors beside it.\n"
    )
    lines = write_report("text", [BROKEN], SETTING).splitlines()
    assert lines[0] == "error /elsewhere/100% söhne.safetensors"
    assert [line.split()[1] for line in lines if line.startswith("  ") and line[2] != " "] == [
        "LF101",
        "LF209",
        "LF209",
        "LF206",
        "LF216",
    ]


def test_a_name_forges_no_line_of_text() -> None:
    lines = write_report("text", [FORGED], SETTING).splitlines()
    assert len(lines) == 5  # head, title, found, expected, mend
    assert not any(line.lstrip().startswith("::") for line in lines)


def test_json() -> None:
    document = json.loads(write_report("json", ALL, SETTING))
    assert document.keys() == {"version", "verdicts"}
    assert document["version"] == "1.0"
    assert document["verdicts"] == json.loads(json.dumps([verdict.as_json() for verdict in ALL]))
    first = document["verdicts"][3]["problems"][0]
    assert (first["code"], first["severity"], first["found"]) == ("LF101", "error", "3 bytes")


def test_the_summary() -> None:
    assert summarise([]) == "nothing checked"
    assert summarise([FINE]) == "1 checked: 1 ok"
    assert summarise(ALL) == "5 checked: 2 ok, 2 with errors, 1 with warnings only"
    assert summarise([BROKEN]) == "1 checked: 1 with errors"


PLACES = [
    ("a/b.safetensors", "a/b.safetensors", True),
    ("./a/../b", "b", True),
    ("/repo/a b/c", "a b/c", True),
    ("/repo", ".", True),
    ("/repository/x", "/repository/x", False),
    ("../x", "/x", False),
    ("..x/y", "..x/y", True),
]


@pytest.mark.parametrize(("path", "place", "inside"), PLACES)
def test_places(path: str, place: str, inside: bool) -> None:
    assert locate(Path(path), ROOT) == (place, inside)


URIS = [
    ("a/b.safetensors", "a/b.safetensors"),
    ("a b/%41.safetensors", "a%20b/%2541.safetensors"),
    ("c:d/e?f#g", "c%3Ad/e%3Ff%23g"),  # neither a scheme, nor a query, nor a fragment
    ("é\udcff", "%C3%A9%FF"),  # a name that is not UTF-8
    ("/elsewhere/x y", "file:///elsewhere/x%20y"),
]


@pytest.mark.parametrize(("path", "uri"), URIS)
def test_uris(path: str, uri: str) -> None:
    assert as_uri(Path(path), ROOT) == uri


def test_one_line() -> None:
    assert one_line("a\nb\x1b\u202e\udcff") == "a\\nb\\x1b\\u202e\\udcff"
