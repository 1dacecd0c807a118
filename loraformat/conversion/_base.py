"""What `--base` says: the facts of a checkpoint, a `config.json`, or an ONNX graph, without reading a weight."""

from collections.abc import Mapping
from os.path import isdir
from pathlib import Path
from typing import Final

from loraformat.base_facts import NO_FACTS, BaseFacts, read_facts
from loraformat.loading import open_base
from loraformat.spans import read_small
from loraformat.strict_json import JsonValue, parse_json_object

_CONFIG: Final = "config.json"


def read_base_facts(path: Path | None) -> BaseFacts:
    """Return the facts about the base at `path`.

    Args:
        path: a checkpoint's file or folder, an ONNX model, a `config.json`, or None for nothing.

    Raises:
        LoraformatError: it cannot be read.
    """
    if path is None:
        return NO_FACTS
    if path.suffix == ".json":
        return read_facts(parse_json_object(read_small(path), path), str(path))
    config = path / _CONFIG if isdir(path) else path.with_name(_CONFIG)
    fields: Mapping[str, JsonValue] = parse_json_object(read_small(config), config) if config.exists() else {}
    if isdir(path) and fields and not any(path.glob("*.safetensors")):
        return read_facts(fields, str(config))
    modules = frozenset(site.module for site in open_base(path).sites if site.module)
    return read_facts(fields, str(path), modules)
