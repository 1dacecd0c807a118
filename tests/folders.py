"""Model folders as transformers writes them: weights in one file or in shards with an index, and what lies beside."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graphs import Array, write_state

WriteFile = Callable[[Path, Mapping[str, Array]], object]


def write_model_folder(
    folder: Path, arrays: Mapping[str, Array], single: str, shards: int, write: WriteFile, **config: Any
) -> Path:
    """Write a folder.

    Args:
        folder: the folder.
        arrays: its tensors.
        single: name of the weights when they are one file, e.g. `pytorch_model.bin`.
        shards: number of files; 0 is one without an index.
        write: writes one of them.
        config: fields of `config.json`.
    """
    folder.mkdir(parents=True)
    stem, _, suffix = single.rpartition(".")
    names = [f"{stem}-{index + 1:05}-of-{shards:05}.{suffix}" for index in range(shards)] or [single]
    places = {name: names[index % len(names)] for index, name in enumerate(arrays)}
    for shard in sorted(set(places.values())):
        write(folder / shard, {name: array for name, array in arrays.items() if places[name] == shard})
    if shards:
        index = {"metadata": {"total_size": sum(array.nbytes for array in arrays.values())}, "weight_map": places}
        (folder / f"{single}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}, indent=2) + "\n")
    return folder


def read_index(folder: Path, single: str = "model.safetensors") -> Any:
    """Return the index of a folder."""
    return json.loads((folder / f"{single}.index.json").read_text())


def write_loose_state(path: Path, arrays: Mapping[str, Array]) -> Path:
    """Write a safetensors file with any names, also such as no writer takes."""
    plain = {name: f"n{index}" for index, name in enumerate(arrays)}
    write_state(path, {plain[name]: array for name, array in arrays.items()})
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    text = json.dumps({name: entries[own] for name, own in plain.items()}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    return path
