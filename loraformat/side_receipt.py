"""The receipt of a model that was merged in place: a file beside it, since its own files have no room for one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loraformat.spans import read_small
from loraformat.strict_json import parse_json_object

_RECEIPT_SUFFIX: Final = ".merge_receipt.json"
_FOLDER_RECEIPT: Final = "merge_receipt.json"


def name_side_receipt(model: Path) -> Path:
    """Return where the receipt of a model that was merged in place stands."""
    return model / _FOLDER_RECEIPT if model.is_dir() else model.with_name(model.name + _RECEIPT_SUFFIX)


def read_side_receipt(model: Path) -> Mapping[str, Any] | None:
    """Return the receipt of a model that was merged in place, None where there is none."""
    path = name_side_receipt(model)
    return parse_json_object(read_small(path), path) if path.is_file() else None
