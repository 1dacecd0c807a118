"""SARIF against its public schema, and what GitHub's code scanning asks beside it."""

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat import Verdict
from loraformat.problems import Problem
from loraformat.reasons import all_reasons
from loraformat.reports import Setting, write_report
from reports.public_schemas import find_schema
from reports.samples import ALL, BROKEN, FINE, FORGED, ROOT

SETTING = Setting(ROOT)
LEVELS = {"error": "error", "warning": "warning", "note": "note"}


def run_of(verdicts: list[Verdict]) -> dict[str, Any]:
    log = json.loads(write_report("sarif", verdicts, SETTING))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    return dict(run)


def check_schema(verdicts: list[Verdict]) -> None:
    schema = find_schema("sarif-2.1.0")
    log = json.loads(write_report("sarif", verdicts, SETTING))
    jsonschema.validators.validator_for(schema)(schema).validate(log)


@pytest.mark.parametrize("verdicts", [[], [FINE], ALL, *([each] for each in ALL)])
def test_the_public_schema(verdicts: list[Verdict]) -> None:
    check_schema(verdicts)


def test_the_schema_can_refuse() -> None:
    schema = find_schema("sarif-2.1.0")
    spoilers: list[Callable[[Any], Any]] = [
        lambda log: log.update(version="2.0"),
        lambda log: log["runs"][0]["results"][0].update(level="fatal"),
        lambda log: log["runs"][0]["results"][0].pop("message"),
        lambda log: log["runs"][0]["tool"].pop("driver"),
        lambda log: log["runs"][0].update(surprise=1),
    ]
    for spoil in spoilers:
        log = json.loads(write_report("sarif", ALL, SETTING))
        spoil(log)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validators.validator_for(schema)(schema).validate(log)


@given(st.lists(st.tuples(st.sampled_from(sorted(all_reasons())), st.text(), st.sampled_from(sorted(LEVELS)))))
def test_any_text_keeps_to_the_schema(drawn: list[tuple[str, str, Any]]) -> None:
    problems = tuple(Problem(code, text, text, severity=severity) for code, text, severity in drawn)
    check_schema([Verdict(BROKEN.path, "peft", 3, problems)])


def test_results_follow_the_problems() -> None:
    run = run_of(ALL)
    problems = [problem for verdict in ALL for problem in verdict.problems]
    assert [result["ruleId"] for result in run["results"]] == [problem.code for problem in problems]
    assert [result["level"] for result in run["results"]] == [LEVELS[problem.severity] for problem in problems]
    rules = run["tool"]["driver"]["rules"]
    assert [rules[result["ruleIndex"]]["id"] for result in run["results"]] == [problem.code for problem in problems]
    assert problems[2].found in run["results"][2]["message"]["text"]


def test_rules_are_the_reasons() -> None:
    rules = run_of(ALL)["tool"]["driver"]["rules"]
    ids = [rule["id"] for rule in rules]
    assert ids == sorted(set(ids)) == sorted({problem.code for verdict in ALL for problem in verdict.problems})
    for rule in rules:
        reason = all_reasons()[rule["id"]]
        assert rule["shortDescription"]["text"] == reason.title
        assert rule["help"]["text"] == reason.mend


def test_the_tool() -> None:
    from importlib.metadata import version

    driver = run_of([])["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("loraformat", version("loraformat"))


def test_locations_are_relative_and_encoded() -> None:
    results = run_of(ALL)["results"]
    uris = [result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for result in results]
    assert uris[0] == "adapters/noted/adapter_model.safetensors"  # of a folder, the file in it
    assert uris[1] == "adapters/warned/adapter_config.json"  # absolute, but below the root
    assert uris[2] == "file:///elsewhere/100%25%20s%C3%B6hne.safetensors"
    forged = urlsplit(uris[-1])
    assert (forged.scheme, forged.netloc, forged.query, forged.fragment) == ("", "", "", "")
    name = str(FORGED.path).encode("utf-8", "surrogateescape")
    assert unquote_to_bytes(uris[-1]) == name


def test_what_github_asks() -> None:
    """A line for each location, and fingerprints that tell apart the results of one file."""
    results = run_of(ALL)["results"]
    assert all(result["locations"][0]["physicalLocation"]["region"]["startLine"] == 1 for result in results)
    prints = [result["partialFingerprints"]["primaryLocationLineHash"] for result in results]
    assert len(set(prints)) == len(prints)
    twice = [
        Verdict(BROKEN.path, "peft", 1, tuple(Problem("LF217", "modules_to_save", found) for found in ("'a'", "'b'")))
    ]
    assert len({str(result["partialFingerprints"]) for result in run_of(twice)["results"]}) == 2
    assert prints == [r["partialFingerprints"]["primaryLocationLineHash"] for r in run_of(ALL)["results"]]


def test_no_times_and_no_machine() -> None:
    text = write_report("sarif", ALL, SETTING)
    assert "Utc" not in text
    assert "/repo" not in text
