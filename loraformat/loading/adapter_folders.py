"""What lies in an adapter's folder, and beside a file that is named: the factors, and the configuration."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from os.path import isfile
from pathlib import Path
from typing import Final

from loraformat.errors import error_for, refuse
from loraformat.loading.adapter_shards import find_split
from loraformat.loading.flat_yaml import parse_flat_yaml
from loraformat.recognition import recognise_config, recognise_files
from loraformat.recognition.stores import recognise_store
from loraformat.schemes import SCHEMES, FolderScheme, Layout
from loraformat.signatures import HEAD_BYTES, describe_head
from loraformat.spans import read_small
from loraformat.strict_json import JsonValue, parse_json_object

FACTORS_NAME: Final = "adapter_model.safetensors"
CONFIG_NAME: Final = "adapter_config.json"
FACTORS_NAMES: Final = (FACTORS_NAME, "adapter_model.bin", "adapter_model.pt")
"""What the file with the factors is called in a PEFT folder, the one to prefer first."""
_SAVED: Final = ("non_lora_trainables.bin", "non_lora_state_dict.bin", "trainable_params.bin", "vit.safetensors")
"""What scripts call the file beside PEFT's with the modules that they trained whole: LLaVA and those after it, the
fine-tuning of Qwen-VL, LongLoRA, ms-swift."""
_SAFE: Final = ".safetensors"
_TENSORS: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_OF_THE_RUN: Final = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "training_args.bin", "rng_state.pth", *_SAVED)
"""Files of tensors and states that transformers' Trainer and scripts leave beside an adapter."""
_OF_MODELS: Final = ("config.json", "model_index.json", "*.index.json", "*.onnx")
"""Names that folders of models have, and those of adapters have not."""
_AN_ADAPTER: Final = "an adapter: a PEFT folder, or a file of factors"
_INCOMPLETE: Final = (
    "The configuration is here, the weights are not: fetch the file with the tensors too, and put it beside "
    f"{CONFIG_NAME}."
)
_LISTED: Final = 6
_YAML: Final = (".yaml", ".yml")


def find_factors(folder: Path) -> Path:
    """Return the file in a folder that holds the factors: one of a known name, or its only safetensors file.

    Raises:
        LoraformatError: LF121 there is none, or more than one; LF209 for what cannot merge; LF835 a model's folder.
    """
    found = find_peft_file(folder)
    if found is None:
        others = (name for layout in _list_layouts() for name in layout.factors if "*" not in name)
        found = _find_named(folder, others)
    if found is not None:
        return found
    names = sorted(entry.name for entry in folder.iterdir())
    beside = _find_alone(folder)
    if beside is not None:
        return beside
    unmergeable = recognise_files(names) or recognise_config(read_config_beside(folder / FACTORS_NAME) or {})
    if unmergeable is not None:
        raise error_for([unmergeable.as_problem(folder)])
    alone = [name for name in names if name.lower().endswith(_SAFE) and (folder / name).is_file()]
    if len(alone) == 1:  # As diffusers, mlx-lm and the hub's users have it, under a name of their own.
        return folder / alone[0]
    store = recognise_store(names)
    if store is not None:
        raise refuse("LF121", folder, store.what, "a file of named tensors", store.mend)
    if _is_model(names) and not _list_below(folder):
        raise refuse("LF835", folder, f"a model folder with {', '.join(names[:_LISTED])}", _AN_ADAPTER)
    inside = f"a folder with {', '.join(names[:_LISTED])}" if names else "an empty folder"
    expected = f"a folder with {FACTORS_NAME}, or with one safetensors file"
    raise refuse("LF121", folder, inside, expected, _advise(folder, alone))


def find_peft_file(folder: Path) -> Path | None:
    """Return the file with the factors in a folder of PEFT's, of shards their index or the first; None for none."""
    return _find_named(folder, FACTORS_NAMES)


def _find_named(folder: Path, names: Iterable[str]) -> Path | None:
    listed = []
    for name in names:
        if (folder / name).exists():
            return folder / name
        listed.append(name)
    return next((split for name in listed if (split := find_split(folder / name)) is not None), None)


def is_factors_name(name: str) -> bool:
    """Say whether some scheme calls its file with the factors so."""
    return name in FACTORS_NAMES or any(name in layout.factors for layout in _list_layouts())


def _advise(folder: Path, files: Sequence[str]) -> str:
    """Say which of several files or folders below a folder to name; trainers save one below it for each checkpoint."""
    choices = [folder / name for name in files] or _list_below(folder)
    if not choices:
        return _INCOMPLETE if (folder / CONFIG_NAME).is_file() else ""
    more = f" and {len(choices) - _LISTED} more" if len(choices) > _LISTED else ""
    return f"Name the one that you mean: {', '.join(str(choice) for choice in choices[:_LISTED])}{more}."


def _list_below(folder: Path) -> list[Path]:
    """Return the folders of PEFT right below a folder."""
    return sorted({entry.parent for name in FACTORS_NAMES for entry in folder.glob(f"*/{name}")})


def _is_model(names: Sequence[str]) -> bool:
    """Say whether a folder with these names holds a model."""
    return CONFIG_NAME not in names and any(fnmatchcase(name, mark) for name in names for mark in _OF_MODELS)


def _find_alone(folder: Path) -> Path | None:
    """Return the one file of tensors beside PEFT's configuration, whatever it is called, in a folder of no model."""
    if not (folder / CONFIG_NAME).is_file() or (folder / "config.json").exists():
        return None
    found = [entry for entry in folder.iterdir() if entry.suffix in _TENSORS and entry.name not in _OF_THE_RUN]
    return found[0] if len(found) == 1 else None


def _list_layouts() -> Iterator[Layout]:
    """Yield how schemes lay out their folders; imports a scheme only when it comes to it."""
    for _, scheme in SCHEMES:
        if isinstance(scheme, FolderScheme):
            yield scheme.layout


def list_saved_beside(factors: Path) -> list[Path]:
    """Return the files beside PEFT's file of factors that hold modules trained whole."""
    names = _SAVED if factors.name in FACTORS_NAMES else ()
    return [path for name in names if (path := factors.with_name(name)).is_file()]


def read_config_beside(factors: Path) -> Mapping[str, JsonValue] | None:
    """Return the configuration beside a name that a scheme has; beside any other it may belong to another file."""
    fitting = (each for each in _list_layouts() if any(fnmatchcase(factors.name, name) for name in each.factors))
    own = factors.name in FACTORS_NAMES or (isfile(factors) and _find_alone(factors.parent) == factors)
    names = (CONFIG_NAME,) if own else tuple(name for layout in fitting for name in layout.configs)
    paths = [factors.with_name(name) for name in dict.fromkeys(names)]
    found = [_parse_config(path) for path in paths if path.exists()]
    return {name: value for config in reversed(found) for name, value in config.items()} if found else None


def _parse_config(path: Path) -> Mapping[str, JsonValue]:
    data = read_small(path)
    described = describe_head(data[:HEAD_BYTES])
    if described is not None and not data.lstrip().startswith(b"{"):
        raise refuse("LF111", path, described.what, "JSON text", described.mend)
    return parse_flat_yaml(data, path) if path.suffix in _YAML else parse_json_object(data, path)
