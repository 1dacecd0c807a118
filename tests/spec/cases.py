"""The conformance vectors as the tests see them, and what this package says to each."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loraformat import Adapter, LoraformatError, Problem, load
from loraformat.rules import check_adapter

SPEC = Path(__file__).parents[2] / "spec"
VECTORS = SPEC / "vectors"
TEXT = (SPEC / "SPEC.md").read_text(encoding="utf-8")
CODES_OF_THE_SPEC = set(re.findall(r"\bLF\d{3}\b", TEXT))
KINDS = ("valid", "invalid", "merge", "convert")


@dataclass(frozen=True)
class Vector:
    """One folder."""

    folder: Path

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def file(self) -> Path:
        return self.folder / "adapter.safetensors"

    @cached_property
    def expected(self) -> dict[str, Any]:
        return json.loads((self.folder / "expected.json").read_text(encoding="utf-8"))


PENDING: dict[str, str] = {}
"""Vectors that this package does not pass yet, with the reason; a test finds those that it passes after all."""


def vectors(kind: str, *, pending: bool = False) -> list[Vector]:
    """Return the vectors of one kind, sorted, with or without those that are pending."""
    found = [Vector(path.parent) for path in sorted((VECTORS / kind).glob("*/expected.json"))]
    return [vector for vector in found if pending or vector.name not in PENDING]


ALL = [vector for kind in KINDS for vector in vectors(kind, pending=True)]


def read(path: Path) -> tuple[Adapter | None, list[Problem]]:
    """Return the adapter as a reader of this format has it, and everything that is wrong with it."""
    try:
        adapter = load(path, scheme="native")
    except LoraformatError as error:
        return None, list(error.problems)
    return adapter, check_adapter(adapter)
