"""JUnit's XML, read by Python's own parser."""

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat import Verdict
from loraformat.problems import Problem, Severity
from loraformat.reports import Setting, write_report
from reports.samples import ALL, BROKEN, FINE, FORGED, ROOT


def parse(verdicts: list[Verdict], fail_on: Severity = "error") -> ElementTree.Element:
    return ElementTree.fromstring(write_report("junit", verdicts, Setting(ROOT, fail_on)).encode("utf-8"))


@pytest.mark.parametrize(("fail_on", "failures"), [("error", 2), ("warning", 3)])
def test_counts(fail_on: Severity, failures: int) -> None:
    root = parse(ALL, fail_on)
    (suite,) = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    for element in (root, suite):
        counts = {name: int(element.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
        assert counts == {"tests": len(ALL), "failures": failures, "errors": 0, "skipped": 0}
    assert len(suite.findall("testcase")) == len(ALL)
    assert len(suite.findall("testcase/failure")) == failures
    failed = [case.find("failure") is not None for case in suite]
    assert failed == [verdict.reaches(fail_on) for verdict in ALL]


def test_a_case() -> None:
    (case,) = parse([BROKEN])[0]
    assert case.attrib["name"] == case.attrib["file"] == "/elsewhere/100% söhne.safetensors"
    failure = case.find("failure")
    assert failure is not None
    assert failure.attrib["type"] == "LF101"
    assert failure.attrib["message"] == "LF101 file too short: x.safetensors (and 4 more)"
    assert failure.text == "\n".join(f"{problem.severity}: {problem}" for problem in BROKEN.problems)


def test_what_does_not_fail_is_told_all_the_same() -> None:
    fine, noted = parse(ALL[:2])[0]
    assert fine.findtext("system-out") == "ok (native, 1 target)"
    assert "LF304" in (noted.findtext("system-out") or "")
    assert noted.attrib["file"] == "adapters/noted/adapter_model.safetensors"


def test_none() -> None:
    assert parse([])[0].attrib["tests"] == "0"


def test_hostile_names_come_through_as_text() -> None:
    (case,) = parse([FORGED])[0]
    assert "<b>&\"']]>%0A,:;" in case.attrib["name"]
    assert "\n" not in case.attrib["name"]
    assert "\\ufffe" in case.attrib["name"]
    failure = case.find("failure")
    assert failure is not None
    assert len(failure) == 0
    assert "<b>&\"']]>" in (failure.text or "")


@given(st.text(st.characters(), max_size=30))
def test_any_text_is_well_formed(text: str) -> None:
    path = BROKEN.path / text.replace("\0", "") if text.strip("/\0") else BROKEN.path
    (case,) = parse([Verdict(path, text, 1, (Problem("LF101", text, text, text, text),)), FINE][:1])[0]
    assert case.find("failure") is not None
