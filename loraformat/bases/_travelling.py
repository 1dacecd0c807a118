"""What travels with a model's weights: every other regular file of its folder, and an adapter's own tokenizer."""

from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from loraformat.errors import LoraformatError
from loraformat.files import resolve_inside
from loraformat.limits import MAX_FOLDER_DEPTH, MAX_TRAVELLING_FILES
from loraformat.outputs import is_unfinished
from loraformat.problems import Problem
from loraformat.spans import InputFile, read_small
from loraformat.strict_json import parse_json

_WEIGHT_SUFFIXES: Final = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz"}
    | {".onnx", ".onnx_data", ".gguf", ".h5", ".msgpack", ".ot", ".tflite", ".ort"}
)
_INDEX_SUFFIX: Final = ".index.json"
_MODULES_NAME: Final = "modules.json"
_TOKENIZER_NAMES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
_TEMPLATES_FOLDER: Final = "additional_chat_templates"


def list_tokenizer_files(folder: Path) -> Mapping[str, InputFile]:
    """Return the tokenizer files and chat templates of an adapter's folder, opened, by their names in it.

    An adapter that grew the vocabulary brings the tokenizer that knows the new words; it takes the base's place.

    Raises:
        RefusedError: LF903 a link that leads out of the folder.
        InputError: LF100 a file that cannot be opened.
    """
    templates = sorted((folder / _TEMPLATES_FOLDER).glob("*.jinja"))[:MAX_TRAVELLING_FILES]
    names = [*_TOKENIZER_NAMES, *(f"{_TEMPLATES_FOLDER}/{template.name}" for template in templates)]
    found = (name for name in names if (folder / name).is_file())
    return {name: InputFile(resolve_inside(folder / "adapter_config.json", name)) for name in found}


def find_travelling(entry: Path, own: Collection[str]) -> tuple[dict[str, InputFile], list[Problem]]:
    """Return the other files of a model's folder and its sub-folders, opened, by their relative names.

    Weights of other formats stay behind: they would be the base's, beside merged ones. So do hidden folders (version
    control, download caches), what is no regular file, and links that lead out of the folder.

    Args:
        entry: the model's index or only weight file; in a hub cache it is a link that shows where the real files are.
        own: names of files that the caller sees to.

    Returns:
        The files, and a problem for everything that is left out.
    """
    folder, modules = entry.parent, _list_module_folders(entry.parent)
    travelling: dict[str, InputFile] = {}
    problems: list[Problem] = []
    surplus: list[str] = []
    pending = deque([folder])
    while pending:
        for item in sorted(pending.popleft().iterdir()):
            name = item.relative_to(folder).as_posix()
            if name in own:
                continue
            reason = _find_reason(entry, name, modules)
            if reason:
                problems.append(Problem("LF609", name, f"{reason}, left out of the output", severity="note"))
            elif item.is_dir():
                pending.append(item)
            elif len(travelling) < MAX_TRAVELLING_FILES:
                travelling[name] = InputFile(item)
            else:
                surplus.append(name)
    if surplus:
        found = f"{len(surplus)} files, from {surplus[0]!r} on, left out of the output"
        expected = f"at most {MAX_TRAVELLING_FILES} files beside the weights"
        problems.append(Problem("LF609", str(folder), found, expected, severity="warning"))
    return travelling, problems


def _find_reason(entry: Path, name: str, modules: Collection[str]) -> str:
    """Return why a file or folder stays behind, or nothing."""
    item, relative = entry.parent / name, PurePosixPath(name)
    if is_unfinished(relative.name):
        return "what a merge is making, or a killed one has left"
    if item.is_dir():
        return _find_folder_reason(item, relative)
    is_weight = PurePosixPath(name.removesuffix(_INDEX_SUFFIX)).suffix in _WEIGHT_SUFFIXES
    if is_weight and str(relative.parent) not in modules:
        return "weights or their index in another file"
    if not item.is_file():
        return "a link that leads nowhere" if item.is_symlink() else "no regular file"
    try:
        resolve_inside(entry, name)
    except LoraformatError:
        return "a link out of the folder, or a name that other systems do not have"
    return ""


def _find_folder_reason(item: Path, relative: PurePosixPath) -> str:
    if item.is_symlink():
        return "a link to a folder"
    if relative.name.startswith(".") or relative.name == "__pycache__":
        return "a hidden folder"
    if len(relative.parts) > MAX_FOLDER_DEPTH:
        return f"a folder more than {MAX_FOLDER_DEPTH} deep"
    return ""


def _list_module_folders(folder: Path) -> set[str]:
    """Return the sub-folders that hold modules of their own beside the model, with their weights.

    sentence-transformers lists them: a pooling and perhaps a dense layer after the transformer.
    """
    path = folder / _MODULES_NAME
    try:
        listed = parse_json(read_small(path), path) if path.is_file() else None
    except LoraformatError:  # Then it is no such list, and the weights that stay behind are named.
        return set()
    entries = listed if isinstance(listed, list) else []
    paths = (entry.get("path") for entry in entries if isinstance(entry, Mapping))
    return {path for path in paths if isinstance(path, str) and path}
