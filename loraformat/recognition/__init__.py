"""Adapters that no weight can hold, known by their configuration, their tensors or their files.

`unmergeable.py` has the table; here a row of it is found.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from loraformat.problems import Problem
from loraformat.recognition.unmergeable import UNMERGEABLE, Unmergeable
from loraformat.strict_json import JsonValue

PEFT_TYPE: Final = "peft_type"
_CODE: Final = "LF209"
_EXPECTED: Final = "changes of weights"


@dataclass(frozen=True, slots=True)
class Recognised:
    """A row, and what speaks for it.

    Attributes:
        row: what it is.
        evidence: in words.
        field: the field of a configuration that it is, if it is one.
    """

    row: Unmergeable
    evidence: str
    field: str = ""

    def as_problem(self, where: object, expected: str = _EXPECTED) -> Problem:
        """Return the refusal: what it is, by what it is known, why there is no weight, what to do instead."""
        place = f"{where}: {self.field}" if self.field else str(where)
        found = f"{self.row.name} ({self.evidence}): {self.row.why}"
        return Problem(_CODE, place, found, expected, self.row.mend)


_EXPRESSIONS: Final[dict[str, re.Pattern[str]]] = {}


def recognise_config(config: Mapping[str, JsonValue]) -> Recognised | None:
    """Return what a configuration says that its adapter is, PEFT's or another's, by the first row that knows it.

    Options of PEFT's LoRA are not among it: with them it is still LoRA, of which more is to be said.
    """
    peft_type = config.get(PEFT_TYPE)
    if peft_type is not None:
        return recognise_type(peft_type) if isinstance(peft_type, str) else None
    return next(iter(recognise_fields(config)), None)


def spell_type(peft_type: str) -> str:
    """Return a `peft_type` as PEFT writes it: some tools write `lora`, or Python's `PeftType.LORA`."""
    return peft_type.rpartition(".")[2].strip().upper().replace("-", "_")


def recognise_type(peft_type: str) -> Recognised | None:
    """Return what a `peft_type` is, where it is none that can be merged."""
    row = next((row for row in UNMERGEABLE if spell_type(peft_type) in row.types), None)
    return Recognised(row, f"peft_type {peft_type!r}") if row is not None else None


def recognise_fields(config: Mapping[str, JsonValue]) -> list[Recognised]:
    """Return what the fields of a configuration speak for."""
    return [
        Recognised(row, f"{field.path} {value!r:.60}", field.path)
        for row in UNMERGEABLE
        for field in row.fields
        if field.holds(value := _take(config, field.path))
    ]


def recognise_tensors(names: Iterable[str]) -> Recognised | None:
    """Return what names of tensors speak for; the first row that knows any of them."""
    listed = sorted(names)
    for row in UNMERGEABLE:
        expression = _compile(row.keys)
        key = next((key for key in listed if expression is not None and expression.search(key)), None)
        if key is not None:
            return Recognised(row, f"tensors such as {key}")
    return None


def recognise_files(names: Collection[str]) -> Recognised | None:
    """Return what the names of files in a folder speak for."""
    for row in UNMERGEABLE:
        name = next((name for name in sorted(names) if any(fnmatchcase(name, glob) for glob in row.files)), None)
        if name is not None:
            return Recognised(row, f"the file {name}")
    return None


def _take(config: Mapping[str, JsonValue], path: str) -> JsonValue:
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value  # type: ignore[no-any-return]


def _compile(keys: tuple[str, ...]) -> re.Pattern[str] | None:
    if not keys:
        return None
    joined = "|".join(f"(?:{key})" for key in keys)
    return _EXPRESSIONS.setdefault(joined, re.compile(joined))
