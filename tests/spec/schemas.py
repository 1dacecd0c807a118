"""The JSON Schemas of spec/schema, as validators."""

import json
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from spec.cases import SPEC

FOLDER = SPEC / "schema"
NAMES = sorted(path.name.removesuffix(".schema.json") for path in FOLDER.iterdir())


@cache
def schema(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))


@cache
def validator(name: str, *, closed: bool = False) -> Draft202012Validator:
    """Return the validator of a schema; `closed` refuses fields that it does not describe."""
    chosen = {each: close(schema(each)) if closed else schema(each) for each in NAMES}
    resources = [(each["$id"], Resource.from_contents(each)) for each in chosen.values()]
    return Draft202012Validator(chosen[name], registry=Registry().with_resources(resources))


def close(value: Any) -> Any:
    """Return a schema that allows no properties but those it names."""
    if isinstance(value, list):
        return [close(item) for item in value]
    if not isinstance(value, dict):
        return value
    closed = {name: close(item) for name, item in value.items()}
    if "properties" in closed and "object" in closed.get("type", ()) and "additionalProperties" not in closed:
        closed["additionalProperties"] = False
    return closed


def errors(name: str, value: Any, *, closed: bool = False) -> list[str]:
    """Return what is wrong with a value, one line each."""
    found = validator(name, closed=closed).iter_errors(value)
    return [f"{error.json_path}: {error.message:.200}" for error in found]
