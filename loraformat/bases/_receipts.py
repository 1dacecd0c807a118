"""The receipt that a merged model carries: text in its own metadata, or a file of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from loraformat.errors import LoraformatError
from loraformat.images import Blank, FileImage, Literal
from loraformat.problems import Problem
from loraformat.spans import read_small
from loraformat.strict_json import parse_lasting_object

RECEIPT_NAME: Final = "merge_receipt.json"
"""The receipt's file in a folder, and the end of its name beside a single file."""

Reading: TypeAlias = tuple[Mapping[str, Any] | None, list[Problem]]
"""A receipt, if there is one, and a note when it cannot be read."""


def read_receipt_text(text: str | None, where: object) -> Reading:
    """Return the receipt that stands in a text of the model's metadata."""
    if text is None:
        return None, []
    try:
        return parse_lasting_object(text.encode("utf-8"), where), []
    except LoraformatError as error:
        return None, [_note(error, where)]


def read_receipt_file(path: Path) -> Reading:
    """Return the receipt in a file, which need not be there."""
    if not path.is_file():
        return None, []
    try:
        return parse_lasting_object(read_small(path), path), []
    except LoraformatError as error:
        return None, [_note(error, path)]


def name_receipt(model: Path) -> Path:
    """Return where the receipt of a single file stands that has no room for one."""
    return model.with_name(f"{model.name}.{RECEIPT_NAME}")


def describe_receipt_file(path: Path, blank_bytes: int) -> list[FileImage]:
    """Return the image of a file that holds the receipt, as UTF-8 JSON padded with spaces; none without room for it."""
    return [FileImage(path, [Blank(blank_bytes), Literal(b"\n")])] if blank_bytes else []


def _note(error: LoraformatError, where: object) -> Problem:
    found = f"a receipt that cannot be read: {error.problems[0].found}"
    return Problem("LF104", str(where), found, severity="note")
