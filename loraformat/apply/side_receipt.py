"""The receipt that a model has: in itself, or in a file beside it where its own files have no room for one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loraformat.bases import BaseModel
from loraformat.spans import read_small
from loraformat.strict_json import parse_lasting_object

_RECEIPT_SUFFIX: Final = ".merge_receipt.json"
_FOLDER_RECEIPT: Final = "merge_receipt.json"


def name_side_receipt(model: Path) -> Path:
    """Return where the receipt of a model that was merged in place stands."""
    return model / _FOLDER_RECEIPT if model.is_dir() else model.with_name(model.name + _RECEIPT_SUFFIX)


def read_side_receipt(model: Path) -> Mapping[str, Any] | None:
    """Return the receipt of a model that was merged in place, None where there is none."""
    path = name_side_receipt(model)
    return parse_lasting_object(read_small(path), path) if path.is_file() else None


def find_receipt(model: BaseModel) -> Mapping[str, Any] | None:
    """Return the receipt of a model's last merge, None where there is none.

    One that stands beside the model is later than one in it: a merge in place leaves that where it is.
    """
    return read_side_receipt(model.path) or model.parent_receipt
