"""Every requirement and every reason that a file can show has its vector; no list names what does not exist."""

import re
import tomllib
from collections import defaultdict
from collections.abc import Mapping

from spec.cases import ALL, CODES_OF_THE_SPEC, KINDS, SPEC, TEXT, vectors

REQUIREMENTS = re.findall(r"^- \*\*(R-\d{3})\*\*", TEXT, re.MULTILINE)
REASONS = set(tomllib.loads((SPEC / "reasons.toml").read_text(encoding="utf-8")))

NO_VECTOR: Mapping[str, str] = {
    "R-082": "sharing shows in a graph or in a model's code: a state dict holds each tensor once",
    "R-083": "that another layer was folded into a weight shows in a graph only",
}
"""Requirements that no file of this format can show, because ..."""

NO_VECTOR_FOR_CODE: Mapping[str, str] = {
    "LF402": "as R-082",
    "LF407": "as R-083",
}

READER = {
    code
    for code in CODES_OF_THE_SPEC
    if code[2] in "123" and code not in {"LF206", "LF208", "LF214"}  # Two are warnings, one is a merger's.
}


def shown_by(field: str) -> dict[str, list[str]]:
    shown = defaultdict(list)
    for vector in ALL:
        for item in vector.expected.get(field, []):
            shown[item].append(vector.name)
    return shown


def test_numbers_are_used_once_and_in_order() -> None:
    assert sorted(set(REQUIREMENTS)) == REQUIREMENTS
    assert set(re.findall(r"R-\d{3}", TEXT)) == set(REQUIREMENTS)


def test_every_requirement_has_a_vector() -> None:
    shown = shown_by("requirements")
    assert not shown.keys() - set(REQUIREMENTS), "vectors of no requirement"
    assert sorted(set(REQUIREMENTS) - shown.keys()) == sorted(NO_VECTOR)


def test_every_requirement_of_a_reader_has_an_invalid_file() -> None:
    """Sections 1 to 7 are about files: what they demand can be violated by one."""
    broken = {number for vector in vectors("invalid") for number in vector.expected["requirements"]}
    refused = {number for vector in vectors("merge") for number in vector.expected["requirements"]}
    files = {number for number in REQUIREMENTS if number < "R-070"}
    assert files - broken - refused == set()
    assert files - broken == {"R-031", "R-061", "R-062", "R-063"}  # A merger's: they need a base.


def test_every_reason_that_a_file_can_show_has_a_vector() -> None:
    shown = shown_by("codes").keys() | shown_by("problems").keys()
    assert sorted(CODES_OF_THE_SPEC - shown) == sorted(NO_VECTOR_FOR_CODE)
    assert not READER - {code for vector in vectors("invalid") for code in vector.expected["codes"]}


def test_every_code_is_listed() -> None:
    assert not CODES_OF_THE_SPEC - REASONS
    named = {code for field in ("codes", "problems", "canonical_codes") for code in shown_by(field)}
    assert not named - CODES_OF_THE_SPEC


def test_the_changelog_names_every_requirement_once() -> None:
    text = (SPEC / "CHANGELOG.md").read_text(encoding="utf-8")
    spans = re.findall(r"R-(\d{3})(?: to R-(\d{3}))?", text)
    named = [number for first, last in spans for number in range(int(first), int(last or first) + 1)]
    assert len(named) == len(set(named))
    assert {int(number[2:]) for number in REQUIREMENTS} <= set(named)


def test_there_are_enough_and_they_are_small() -> None:
    counts = {kind: len(vectors(kind)) for kind in KINDS}
    assert min(counts.values()) >= 6
    assert counts["invalid"] >= 150
    files = [path for path in (SPEC / "vectors").rglob("*") if path.is_file() and path.suffix != ".py"]
    assert sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) < 400_000
