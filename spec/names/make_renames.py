"""Writes `renames/transformers.json`: what transformers calls the tensors of its checkpoints; the README says how.

    python spec/names/make_renames.py

Needs transformers 5, whose own table (`conversion_mapping`) is what is read: the names are facts about its models.
"""

import json
import re
from pathlib import Path
from typing import Any, Final

import transformers
from transformers import conversion_mapping as mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

FILE: Final = Path(__file__).parent / "renames" / "transformers.json"
_PLAIN: Final = ("WeightRenaming", "PrefixChange")
_PARAMETER: Final = re.compile(r"\\?\.(?:weight|bias)$")


def find_type(key: str) -> str:
    """Return the `model_type` of a class of transformers, or the key itself where it is one."""
    config = getattr(getattr(transformers, key, None), "config_class", None)
    return config.model_type if config is not None else key


def list_rows(changes: list[Any]) -> list[list[str]]:
    """Return pattern and replacement of each rename, in order."""
    rows = []
    for change in changes:
        if isinstance(change, WeightRenaming) and type(change).__name__ in _PLAIN:
            replacement = change.target_patterns[0].replace(r"\.", ".")
            rows += [[pattern, replacement] for pattern in change.source_patterns]
    for pattern, _ in rows:
        re.compile(pattern)
    return rows


def list_splits(changes: list[Any]) -> list[list[Any]]:
    """Return pattern and members of each module that becomes several, of as many rows each, in order."""
    splits: list[list[Any]] = []
    for change in changes:
        operations = getattr(change, "operations", ())
        is_split = isinstance(change, WeightConverter) and len(operations) == 1 and type(operations[0]) is Chunk
        if not is_split or operations[0].dim or len(change.source_patterns) != 1:
            continue
        (source,), targets = change.source_patterns, change.target_patterns
        row = [_PARAMETER.sub("", source), [_PARAMETER.sub("", target) for target in targets]]
        if "in_proj_" not in source and "_correction_" not in source and row not in splits:
            re.compile(row[0])
            splits.append(row)
    return splits


def make() -> dict[str, Any]:
    """Return the file's content; what a class says of a whole model stands before what its parts say."""
    mapping.get_checkpoint_conversion_mapping("legacy")
    every = mapping._checkpoint_conversion_mapping_cache  # There is no other way to ask for all.
    families: dict[str, list[list[list[str]]]] = {}
    splits: dict[str, list[list[Any]]] = {}
    for key in sorted(every, key=lambda each: (each.endswith("Model"), each)):
        rows, own = list_rows(every[key]), families.setdefault(find_type(key), [])
        if rows and rows not in own:
            own.append(rows)
        found = splits.setdefault(find_type(key), [])
        found += [row for row in list_splits(every[key]) if row not in found]
    legacy = families.pop("legacy")
    return {
        "source": f"transformers {transformers.__version__}, conversion_mapping",
        "all": legacy,
        "families": {name: families[name] for name in sorted(families) if families[name]},
        "splits": {name: splits[name] for name in sorted(splits) if splits[name]},
    }


def write_lines(content: dict[str, Any]) -> str:
    """Return the JSON with one line for each family."""
    families, splits = (
        ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in content[part].items())
        for part in ("families", "splits")
    )
    head = [f" {json.dumps(key)}: {json.dumps(content[key])}," for key in ("source", "all")]
    return "\n".join(["{", *head, ' "families": {', families, " },", ' "splits": {', splits, " }", "}", ""])


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(write_lines(make()), encoding="utf-8")
