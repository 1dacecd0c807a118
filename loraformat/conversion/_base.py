"""What `--base` says: the facts of a checkpoint, a `config.json`, an ONNX graph or a GGUF model; no weight is read."""

from collections.abc import Mapping
from os.path import isdir
from pathlib import Path
from typing import Final

from loraformat.base_facts import NO_FACTS, BaseFacts, read_facts
from loraformat.containers import CONTAINERS
from loraformat.loading import find_facts, open_base
from loraformat.spans import read_small
from loraformat.strict_json import JsonValue, parse_json, parse_json_object

_CONFIG: Final = "config.json"
_GGUF: Final = ".gguf"
_GGUF_FIELDS: Final = {
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_experts": "expert_count",
    "intermediate_size": "feed_forward_length",
}
"""What configurations of transformers call a count, to its key in a GGUF file, behind the architecture's name."""


def read_base_facts(path: Path | None) -> BaseFacts:
    """Return the facts about the base at `path`.

    Args:
        path: a checkpoint's file or folder, an ONNX model, a GGUF model, a `config.json`, or None for nothing.

    Raises:
        LoraformatError: it cannot be read.
    """
    if path is None:
        return NO_FACTS
    if path.suffix == ".json":
        return read_facts(parse_json_object(read_small(path), path), str(path))
    if path.suffix == _GGUF:
        return _read_gguf(path)
    config = path / _CONFIG if isdir(path) else path.with_name(_CONFIG)
    fields: Mapping[str, JsonValue] = parse_json_object(read_small(config), config) if config.exists() else {}
    if isdir(path) and fields and not any(path.glob("*.safetensors")):
        return read_facts(fields, str(config))
    return find_facts(open_base(path))


def _read_gguf(path: Path) -> BaseFacts:
    """Return the facts that the key-values of a GGUF model state; the names of its tensors are llama.cpp's own."""
    container = CONTAINERS.find("gguf")
    assert container is not None
    opened = container.open(path)
    values = {
        key: parse_json(text.encode(), f"{path}, {key}") for key, text in opened.metadata.items() if len(text) < 1000
    }
    opened.file.close()
    architecture = values.get("general.architecture")
    fields = {name: values.get(f"{architecture}.{key}") for name, key in _GGUF_FIELDS.items()}
    return read_facts({**fields, "general.architecture": architecture}, str(path))
