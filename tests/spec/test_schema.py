"""The JSON Schemas: sound themselves, and of one mind with our reader."""

import json
from collections.abc import Mapping

import pytest
from jsonschema import Draft202012Validator

from loraformat.containers.safetensors import CONTAINER
from loraformat.errors import LoraformatError
from loraformat.manifest import parse_manifest
from loraformat.strict_json import parse_json_object
from spec.cases import ALL, Vector, vectors
from spec.schemas import FOLDER, NAMES, errors, schema


def test_the_schemas_are_schemas() -> None:
    assert len(NAMES) >= 11
    for name in NAMES:
        Draft202012Validator.check_schema(schema(name))
        assert schema(name)["$id"] == f"urn:loraformat:1.0:{name}"
        assert schema(name)["title"]
        assert schema(name)["description"].endswith(".")
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.schema.json" for name in NAMES}


@pytest.mark.parametrize("vector", ALL, ids=lambda vector: vector.name)
def test_expectations_are_of_their_schema(vector: Vector) -> None:
    assert not errors("expected", vector.expected)


# --- one mind with the reader -----------------------------------------------------------------------------------------

NUMBER_FORMS = "JSON Schema takes 2.0 for an integer; the specification asks how the number is written (section 1)"
MANIFEST_DIFFERENCES: Mapping[str, str] = {
    "invalid/rank-with-a-fraction": NUMBER_FORMS,
    "invalid/fingerprint-of-a-shape-with-a-fraction": NUMBER_FORMS,
}
HEADER_DIFFERENCES: Mapping[str, str] = {
    "invalid/shape-with-a-fraction": NUMBER_FORMS,
    "invalid/shape-with-an-exponent": NUMBER_FORMS,
    "invalid/offsets-with-a-fraction": NUMBER_FORMS,
    "invalid/offsets-negative": f"{NUMBER_FORMS}; -0 is one",
}
ARITHMETIC = {"LF107", "LF108"}
"""Offsets and sizes, which no schema can see."""
FILES = vectors("valid") + vectors("invalid")


def disagree(vector: Vector, known: Mapping[str, str], *, schema_accepts: bool, reader_accepts: bool) -> bool:
    """Say whether schema and reader differ, or do not differ where the table of differences says so."""
    return (schema_accepts and not reader_accepts) != (vector.name in known) or (reader_accepts and not schema_accepts)


def is_manifest(text: str) -> bool:
    try:
        return bool(parse_manifest(text, "manifest").targets)
    except LoraformatError:
        return False


def test_the_schema_of_manifests_and_the_reader_agree() -> None:
    wrong, asked = [], 0
    for vector in FILES:
        try:
            text = CONTAINER.open(vector.file).metadata["loraformat"]
            parse_json_object(text.encode(), "manifest")
        except (LoraformatError, KeyError):
            continue
        asked += 1
        accepts = not errors("manifest", json.loads(text))
        if disagree(vector, MANIFEST_DIFFERENCES, schema_accepts=accepts, reader_accepts=is_manifest(text)):
            wrong.append(vector.name)
    assert not wrong
    assert asked > 100


def test_the_schema_of_headers_and_the_reader_agree() -> None:
    wrong, asked = [], 0
    for vector in FILES:
        data = vector.file.read_bytes()
        text = data[8 : 8 + int.from_bytes(data[:8], "little")]
        try:
            reader_accepts = "loraformat" in CONTAINER.open(vector.file).metadata
        except LoraformatError as error:
            reader_accepts = bool(set(error.codes) & ARITHMETIC)
            if not reader_accepts and set(error.codes) & {"LF101", "LF102", "LF103", "LF104", "LF105", "LF111"}:
                continue
        asked += 1
        accepts = not errors("header", json.loads(text))
        if disagree(vector, HEADER_DIFFERENCES, schema_accepts=accepts, reader_accepts=reader_accepts):
            wrong.append(vector.name)
    assert not wrong
    assert asked > 100


def test_the_schema_of_headers_takes_a_null_for_no_metadata_as_no_adapter() -> None:
    assert errors("header", {"__metadata__": None})
    assert errors("header", {})
    assert not errors("header", {"__metadata__": {"loraformat": "{}"}})
