"""Which reader a file is for: its container, by its first bytes, and its scheme, by its tensors."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from loraformat.containers import CONTAINERS, Container, TensorFile
from loraformat.errors import LoraformatError, error_for, refuse
from loraformat.manifest import MANIFEST_KEY
from loraformat.recognition import PEFT_TYPE, Recognised, recognise_config, recognise_tensors
from loraformat.schemes import SCHEMES, Bundle, CertainScheme, Scheme
from loraformat.signatures import HEAD_BYTES, describe_text
from loraformat.spans import InputFile, open_input

_PEFT: Final = "base_model.model."
_PEFT_ALONE: Final = (
    "These names are PEFT's, and what kind of adapter they are stands in adapter_config.json: put it beside the file, "
    "and name the folder."
)
_WEIGHTS: Final = (".weight", ".bias")
_OF_ADAPTERS: Final = re.compile(r"lora_|\blora\b|hada_w|lokr_|adapter|^base_model\.model\.")
"""What names of adapters' tensors have, and those of models have not."""
_FACTOR: Final = re.compile(r"lora_(?:A|B|down|up|magnitude)|hada_w|lokr_w")
_KNOWN_ENDINGS: Final = (
    ("lora_down.weight", "kohya's scheme"),
    ("_lora.down.weight", "the oldest scheme of diffusers"),
    ("lora.down.weight", "the older scheme of diffusers"),
    ("hada_w1_a", "LyCORIS LoHa"),
    ("lokr_w1", "LyCORIS LoKr"),
    ("lokr_w1_a", "LyCORIS LoKr"),
    ("lora_a", "the scheme of mlx-lm"),
    ("lora_A", "the scheme of loralib or litgpt"),
    (":up", "the scheme of cloneofsimo/lora"),
    ("lora_A.weight", "the scheme of diffusers or ai-toolkit"),
)


def open_tensors(path: Path | InputFile) -> TensorFile:
    """Index the tensors of a file in the container that it is; raises LoraformatError."""
    return choose_container(path).open(path)


def choose_container(path: Path | InputFile) -> Container:
    """Return the container that a file is, by its first bytes; raises LoraformatError for none."""
    head, size = read_head(path)
    return _choose_container(path.path if isinstance(path, InputFile) else path, head, size)


def choose_scheme(bundle: Bundle, name: str | None) -> tuple[Scheme, str]:
    """Return the scheme of `bundle` and the evidence for it.

    Raises:
        InputError: LF121 no scheme knows these tensors, LF835 they are a model's.
        FindingError: LF209 an adapter that no weight can hold, LF303 several schemes know it, LF305 none is so called.
    """
    if name is not None:
        chosen = SCHEMES.find(name)
        if chosen is None:
            raise refuse("LF305", name, "no scheme of this name", f"one of {', '.join(SCHEMES.names())}")
        return chosen, "named by the user"
    unmergeable = recognise_bundle(bundle)
    if unmergeable is not None:
        raise error_for([unmergeable.as_problem(bundle.path)])
    named = _find_named(bundle)  # Of ours, no other need be asked then, nor imported.
    names = SCHEMES.names() if named is None else sorted((named, *SCHEMES.list_guests()))
    asked = (scheme for name in names if (scheme := SCHEMES.find(name)) is not None)
    found = [(scheme, evidence) for scheme in asked if (evidence := scheme.detect(bundle)) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        readings = "; ".join(f"{scheme.name} ({evidence})" for scheme, evidence in found)
        raise refuse("LF303", bundle.path, readings, "one reading")
    if (what := _recognise_model(bundle)) is not None:
        raise refuse("LF835", bundle.path, what, "an adapter: a PEFT folder, or a file of factors")
    mend = _PEFT_ALONE if _is_peft_alone(bundle) else ""
    raise refuse("LF121", bundle.path, _describe_names(bundle), f"a scheme among {', '.join(SCHEMES.names())}", mend)


def _find_named(bundle: Bundle) -> str | None:
    """Return the scheme that the bundle names itself; None where it names none surely."""
    name = "native" if MANIFEST_KEY in bundle.metadata else "peft" if PEFT_TYPE in (bundle.config or {}) else ""
    scheme = SCHEMES.find(name)
    sure = isinstance(scheme, CertainScheme) and scheme.is_named(bundle) and scheme.detect(bundle) is not None
    return name if sure else None


def _is_peft_alone(bundle: Bundle) -> bool:
    return bundle.config is None and bool(bundle.tensors) and all(key.startswith(_PEFT) for key in bundle.tensors)


def _recognise_model(bundle: Bundle) -> str | None:
    """Return what a bundle is that no scheme knows, where it is a model by its file or by the names of its tensors."""
    names = sorted(bundle.tensors)
    if bundle.path.suffix.lower() == ".onnx":
        return f"an ONNX model with {len(names)} tensors"
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    if 2 * len(weights) <= len(names) or any(_OF_ADAPTERS.search(name) for name in names):
        return None
    return f"{len(names)} tensors such as {', '.join(weights[:3])}, which are a model's"


def is_factors(modules: Collection[str]) -> bool:
    """Say whether everything of these names is a factor of an adapter."""
    return bool(modules) and all(_FACTOR.search(module) for module in modules)


def read_head(path: Path | InputFile) -> tuple[bytes, int]:
    """Return the first bytes of a file, and its size."""
    file = open_input(path)
    try:
        return file.read(0, min(HEAD_BYTES, file.size_bytes)), file.size_bytes
    finally:
        file.close()


def _choose_container(path: Path, head: bytes, size: int) -> Container:
    hint = path.suffix.lower().removeprefix(".") or "-"
    for name in sorted(CONTAINERS.names(), key=lambda name: not name.startswith(hint)):
        likely = CONTAINERS.find(name)  # Imports no other where the file is what its name says.
        if likely is not None and likely.has_magic and likely.sniff(head, size):
            return likely
    containers = [container for _, container in CONTAINERS]
    for container in containers:
        if container.sniff(head, size):
            return container
    for container in containers:  # Its own reader says best what is wrong with a file of its name.
        if path.suffix.lower() in container.suffixes:
            return container
    raise refuse_unreadable(path, head, "an adapter as .safetensors or a PEFT folder")


def refuse_unreadable(path: Path, head: bytes, expected: str) -> LoraformatError:
    """Return the error for a file that nothing reads: LF121, or LF111 where its first bytes say what it is."""
    described = describe_text(head)
    if described is None:
        return refuse("LF121", path, "a file of no known format", expected)
    return refuse("LF111", path, described.what, expected, described.mend)


def recognise_bundle(bundle: Bundle) -> Recognised | None:
    """Return what the bundle is, where it is an adapter that no weight can hold."""
    config = bundle.config or {}
    if MANIFEST_KEY in bundle.metadata or (PEFT_TYPE in config and recognise_config(config)):
        return None  # Of its own configuration, PEFT's scheme says so.
    return recognise_config(config) or recognise_tensors(bundle.tensors)


def recognise_names(bundle: Bundle) -> str | None:
    """Return what the tensors' names look like, among schemes that this version knows of but does not read."""
    for ending, what in _KNOWN_ENDINGS:
        key = next((key for key in bundle.tensors if key == ending or key.endswith((f".{ending}", ending))), None)
        if key is not None:
            return f"tensors such as {key}: {what}"
    return None


def _describe_names(bundle: Bundle) -> str:
    if not bundle.tensors:
        return "a file without tensors"
    names = ", ".join(sorted(bundle.tensors)[:3])
    return recognise_names(bundle) or f"{len(bundle.tensors)} tensors such as {names}"
