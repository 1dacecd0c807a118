"""A state dict in memory: a mapping of names to arrays of numpy or torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loraformat.arrays import ArrayFile, HeldArray, hold_arrays
from loraformat.bases import NewContents, Rewriter, Site
from loraformat.bases._finishing import Checksums
from loraformat.bases._float_state import FloatingState
from loraformat.bases._rewriting import list_output
from loraformat.bases._state_dict import digest_structure, list_sites
from loraformat.containers._strided import StridedTensor, check_name, is_c_order
from loraformat.errors import refuse
from loraformat.images import FileImage, NewOutput, OutputTensor
from loraformat.problems import Problem
from loraformat.spans import InputFile, Span, StoredTensor
from loraformat.strict_json import JsonValue

PLACE: Final = Path("state dict")
"""What it is called in messages, for it has no path."""


class HeldState(Checksums, FloatingState):
    """A state dict; the attributes are those of `BaseModel`.

    Args:
        tensors: its values by their names; those that are no tensors are passed over.
        config: transformers' configuration of the model, empty where there is none.

    Raises:
        LoraformatError: LF831 nothing in it is a tensor, LF106 a tensor whose numbers cannot be had.
    """

    format = "state dict"
    suffix = ""
    folder_mark = ""
    parent_receipt: Mapping[str, Any] | None = None
    problems: Sequence[Problem] = ()

    def __init__(self, tensors: Mapping[str, Any], config: Mapping[str, JsonValue]) -> None:
        self.path = PLACE
        self._config = config
        self.arrays = hold_arrays(tensors)
        if not self.arrays:
            raise refuse("LF831", PLACE, _describe_values(tensors), "arrays of numpy or torch under their names")
        self._stored = _list_stored(self.arrays)
        self.files: Sequence[InputFile] = list({id(each.file): each.file for each in self._stored}.values())
        self.sites: Sequence[Site] = list_sites(self._stored, config)
        self.structure_sha256 = digest_structure(self._stored, {})

    def tell_config(self) -> Mapping[str, JsonValue]:
        """Return the model's configuration."""
        return self._config

    @property
    def rewriter(self) -> Rewriter:
        """What describes it with other tensors."""
        return _HeldRewriter(self._stored, self._gone)

    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every tensor."""
        return self._stored

    def describe_images(self, output: NewOutput) -> list[FileImage]:
        """Return nothing: it is no file, and no file is made of it."""
        return []

    def encode_receipt(self, text: str) -> bytes:
        """Return the text as it is."""
        return text.encode()

    def list_stale(self, output: Path) -> list[Path]:
        """Return nothing."""
        return []


class _HeldRewriter:
    """Describes a state dict in memory with other tensors; the attributes are those of `Rewriter`."""

    format = HeldState.format
    suffix = ""
    folder_mark = ""

    def __init__(self, tensors: Sequence[StoredTensor], gone: frozenset[str]) -> None:
        self._tensors, notes = list_output(tensors, {}, gone)  # No name goes: it is loaded by all of them.
        self.problems: Sequence[Problem] = notes

    def output_tensors(self) -> list[OutputTensor]:
        """Return the tensors as they stand."""
        return list(self._tensors)

    def describe_rewritten(self, output: NewOutput, contents: NewContents) -> list[FileImage]:
        """Return nothing: no file is made."""
        return []

    def check_config(self, config_changes: Mapping[str, JsonValue]) -> list[Problem]:
        """Return nothing: who asked is told of the changes."""
        return []

    def encode_receipt(self, text: str) -> bytes:
        """Return the text as it is."""
        return text.encode()


def _list_stored(arrays: Mapping[str, HeldArray]) -> list[StoredTensor]:
    """Return arrays as tensors of one file for each device, under the addresses that they have."""
    for name in arrays:
        check_name(PLACE, name)
    by_device: dict[str, list[HeldArray]] = {}
    for held in arrays.values():
        by_device.setdefault(held.device, []).append(held)
    files = {device: ArrayFile(PLACE / device, group) for device, group in by_device.items()}
    return [_as_stored(name, held, files[held.device]) for name, held in arrays.items()]


def _as_stored(name: str, held: HeldArray, file: ArrayFile) -> StoredTensor:
    extent = Span(file.path, held.address, held.extent_bytes)
    if not held.extent_bytes or is_c_order(held.shape, held.strides):
        return StoredTensor(name, held.dtype, held.shape, extent, file)
    return StridedTensor(name, held.dtype, held.shape, held.strides, extent, file)


def _describe_values(tensors: Mapping[str, Any]) -> str:
    """Say what a mapping without tensors has, and where in it some are: checkpoints wrap their state dicts."""
    inner = [repr(name) for name, value in tensors.items() if isinstance(value, Mapping) and hold_arrays(value)]
    if inner:
        return f"a mapping with a state dict under {', '.join(inner[:4])}"
    names = ", ".join(repr(name) for name in list(tensors)[:4])
    return f"{len(tensors)} values, none a tensor{f', such as {names}' if names else ''}"
