"""The JSON that stands in SPEC.md is what it says."""

import json
import re

import pytest

from loraformat.manifest import parse_manifest
from loraformat.strict_json import parse_json_object
from spec.cases import SPEC, TEXT
from spec.schemas import errors

EXAMPLES = re.findall(r"^```json\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_there_is_an_example() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_are_manifests(example: str) -> None:
    parse_json_object(example.encode(), "SPEC.md")
    assert not errors("manifest", json.loads(example))
    assert parse_manifest(example, "SPEC.md").targets


def test_links_lead_somewhere() -> None:
    for page in (SPEC / "SPEC.md", SPEC / "README.md", SPEC / "CHANGELOG.md", *(SPEC / "decisions").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for name in re.findall(
            r"`((?:vectors|schema|conformance|decisions|valid|invalid|merge|convert)/[\w./*-]*)`", text
        ):
            folder = SPEC / "vectors" if name.split("/")[0] in {"valid", "invalid", "merge", "convert"} else SPEC
            assert list(folder.glob(name.rstrip("/"))), f"{page.name}: {name}"


def test_decisions_have_one_form() -> None:
    pages = sorted((SPEC / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for page in pages:
        headings = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert headings == ["Context", "Decision", "Alternatives", "Consequences"], page.name
