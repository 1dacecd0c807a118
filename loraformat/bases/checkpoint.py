"""A PyTorch state dict in one safetensors file: a site is a named tensor.

A state dict does not say which module applies a weight, only its name and shape: a matrix may be a Linear, a Conv1D or
an embedding table, and the adapter's target says which it expects.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loraformat.adapter import SlotKind
from loraformat.bases import BaseModel, Site, Weight
from loraformat.containers import TensorFile
from loraformat.containers.safetensors import CONTAINER, describe_images, escape_for_header
from loraformat.errors import LoraformatError
from loraformat.images import FileImage
from loraformat.problems import Problem
from loraformat.receipt import RECEIPT_KEY
from loraformat.spans import InputFile, StoredTensor, read_small
from loraformat.strict_json import JsonValue, parse_json_object, write_canonical

_WEIGHT: Final = ".weight"

_CONV1D_FAMILIES: Final = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""`model_type`s of transformers whose blocks store matrices `(in, out)` (`transformers.pytorch_utils.Conv1D`)."""

_CONV1D_MODULES: Final = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})

_TIED_MODULES: Final = frozenset(
    {"lm_head", "embed_tokens", "wte", "word_embeddings", "embed_in", "embed_out", "shared"}
)
"""Last parts of the names of modules that `tie_word_embeddings` ties together."""

_MATRIX: Final[Mapping[SlotKind, bool]] = {
    SlotKind.LINEAR: False,
    SlotKind.LINEAR_TRANSPOSED: True,
    SlotKind.EMBEDDING: True,
}
_CONV1D: Final[Mapping[SlotKind, bool]] = {SlotKind.LINEAR: True, SlotKind.LINEAR_TRANSPOSED: True}
_CONV: Final[Mapping[SlotKind, bool]] = {SlotKind.CONV: False}


class Checkpoint:
    """An opened state dict; the attributes are those of `BaseModel`."""

    format = "safetensors"
    suffix = ".safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: TensorFile = CONTAINER.open(path)
        self.files: Sequence[InputFile] = [self._opened.file]
        config = _read_config(path)
        self.sites: Sequence[Site] = [
            _make_site(tensor, config) for tensor in self._opened.tensors.values() if _is_adaptable(tensor)
        ]
        self.structure_sha256 = _digest(self._opened)
        self.parent_receipt: Mapping[str, Any] | None
        self.problems: Sequence[Problem]
        self.parent_receipt, self.problems = _read_receipt(self._opened)

    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor."""
        return list(self._opened.tensors.values())

    def describe_images(self, output: Path, blank_bytes: int, fresh: str) -> list[FileImage]:
        """Return the one output file: another header, the same data area."""
        return describe_images(self._opened, output, RECEIPT_KEY, blank_bytes)

    def encode_receipt(self, text: str) -> bytes:
        """Return `text` as it stands inside a JSON string of the header."""
        return escape_for_header(text)

    def list_stale(self, output: Path) -> list[Path]:
        """Return nothing: a state dict is one file."""
        return []


def _is_adaptable(tensor: StoredTensor) -> bool:
    return tensor.name.endswith(_WEIGHT) and 2 <= len(tensor.shape) <= 5 and tensor.elements > 0


def _make_site(tensor: StoredTensor, config: Mapping[str, JsonValue]) -> Site:
    module = tensor.name.removesuffix(_WEIGHT)
    consumers = {tensor.name}
    if config.get("tie_word_embeddings") is True and module.rsplit(".", 1)[-1] in _TIED_MODULES:
        consumers.add("the output layer or embedding tied to it (tie_word_embeddings in config.json)")
    obstacle = None
    if tensor.dtype.family != "float":
        obstacle = Problem("LF403", module, f"numbers stored as {tensor.dtype.name}", "a floating-point form")
    return Site(
        id=tensor.name,
        module=module,
        evidence="tensor name",
        transposed=_orient(module, tensor, config),
        weight=None if obstacle else Weight(tensor.name, tensor.name, tensor, frozenset(consumers)),
        obstacle=obstacle,
    )


def _orient(module: str, tensor: StoredTensor, config: Mapping[str, JsonValue]) -> Mapping[SlotKind, bool]:
    if len(tensor.shape) > 2:
        return _CONV
    conv1d = config.get("model_type") in _CONV1D_FAMILIES and module.rsplit(".", 1)[-1] in _CONV1D_MODULES
    return _CONV1D if conv1d else _MATRIX


def _read_config(path: Path) -> Mapping[str, JsonValue]:
    """Return `config.json` beside the file, empty where there is none."""
    config = path.with_name("config.json")
    return parse_json_object(read_small(config), config) if config.is_file() else {}


def _digest(opened: TensorFile) -> str:
    """Return the digest of names, forms, shapes and order; our own receipt does not count."""
    metadata = {key: text for key, text in opened.metadata.items() if key != RECEIPT_KEY}
    tensors: JsonValue = [[t.name, t.dtype.name, list(t.shape)] for t in opened.tensors.values()]
    return hashlib.sha256(write_canonical([metadata, tensors])).hexdigest()


def _read_receipt(opened: TensorFile) -> tuple[Mapping[str, Any] | None, list[Problem]]:
    text = opened.metadata.get(RECEIPT_KEY)
    if text is None:
        return None, []
    try:
        return parse_json_object(text.encode("utf-8"), f"{opened.file.path}: {RECEIPT_KEY}"), []
    except LoraformatError as error:
        return None, [Problem(p.code, p.where, p.found, p.expected, severity="note") for p in error.problems]


class CheckpointFormat:
    """The base format `safetensors`."""

    name = "safetensors"
    suffixes = (".safetensors",)

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Recognise safetensors by its header."""
        return CONTAINER.sniff(head, size_bytes)

    def open(self, path: Path) -> BaseModel:
        """Index the state dict."""
        return Checkpoint(path)


BASE: Final = CheckpointFormat()
