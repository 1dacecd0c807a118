"""What can be adapted: one file for each way of being a model.

A base offers *sites*: places where a module applies a weight. In a checkpoint a site is a named tensor; in an ONNX
graph it is a node and its weight input, since exporters rename, share and transpose tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from loraformat.adapter import SlotKind
from loraformat.images import FileImage
from loraformat.problems import Problem
from loraformat.registry import Registry
from loraformat.spans import InputFile, Part, StoredTensor

TENSOR_NAME: Final = "tensor name"
"""The evidence of sites in a state dict, which lists all parameters that a model has."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored tensor that sites use.

    Attributes:
        key: identifies it within the base.
        name: its name, for people.
        tensor: where its bytes are.
        consumers: ids of everything that reads it, sites among them.
    """

    key: str
    name: str
    tensor: StoredTensor
    consumers: frozenset[str]


@dataclass(frozen=True, slots=True)
class Site:
    """A place where a module applies a weight.

    Attributes:
        id: identifies it within the base.
        module: module path that the evidence names; empty when nothing tells.
        evidence: how the path is known: `name scopes`, `node name`, `initializer name` ...
        transposed: for each kind of slot that the site can be, whether the stored matrix is the transpose of the
            canonical `(out, in * kernel)`.
        weight: the weight, or None when there is an obstacle.
        divisor: the site multiplies its weight by this number, so a delta is divided by it (`alpha` of Gemm).
        obstacle: why nothing can be merged here.
        parameter: which of the module's parameters it is: `weight`, `bias` ...
        part: where in the stored tensor it is; None for all of it.
        section: first and last row, the latter excluded, of the module's canonical matrix `(out, in)` that are stored
            here, where the base splits the module; None for all of them. The sections of a module follow one another.
        grows: whether a replacement may have more rows than are stored: a table of tokens.
    """

    id: str
    module: str
    evidence: str
    transposed: Mapping[SlotKind, bool]
    weight: Weight | None
    divisor: float = 1.0
    obstacle: Problem | None = None
    parameter: str = "weight"
    part: Part | None = None
    section: tuple[int, int] | None = None
    grows: bool = False

    def stored_shape(self) -> tuple[int, ...]:
        """Return the shape of what the site applies, as it is stored; empty where there is nothing."""
        if self.weight is None:
            return ()
        return self.part.shape if self.part is not None else self.weight.tensor.shape


class BaseModel(Protocol):
    """An opened base.

    Attributes:
        path: the file that the user named.
        format: name of the kind of base, e.g. `onnx`.
        suffix: file name ending of an output; empty for a folder.
        folder_mark: for outputs that are folders, the file by which one of ours is known; else empty.
        sites: everything that can be adapted, or that looks so but cannot.
        structure_sha256: digest of everything but the weights' payloads.
        parent_receipt: the receipt that it carries, when it is itself a merged model.
    """

    path: Path
    format: str
    suffix: str
    folder_mark: str
    sites: Sequence[Site]
    structure_sha256: str
    parent_receipt: Mapping[str, Any] | None

    @property
    def files(self) -> Sequence[InputFile]:
        """All files that belong to it."""
        ...

    @property
    def problems(self) -> Sequence[Problem]:
        """What is odd about it."""
        ...

    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor, for `inspect`."""
        ...

    def describe_images(self, output: Path, blank_bytes: int, fresh: str) -> list[FileImage]:
        """Return the output files: this base plus a blank of `blank_bytes` for the receipt, the entry file last.

        `fresh` distinguishes data files whose usual name is taken.
        """
        ...

    def encode_receipt(self, text: str) -> bytes:
        """Return the bytes that put `text` into a blank; the rest of the blank is filled with spaces."""
        ...

    def list_stale(self, output: Path) -> list[Path]:
        """Return the files that only the model at `output`, about to be replaced, still needs."""
        ...


class BaseFormat(Protocol):
    """What a file in this folder provides as `BASE`.

    Attributes:
        name: for messages and `--json`.
        suffixes: file name endings that are usual for it, lower case with the dot.
    """

    name: str
    suffixes: tuple[str, ...]

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Say whether the file is such a base; `head` is its first 64 bytes, nothing for a folder."""
        ...

    def open(self, path: Path) -> BaseModel:
        """Index the base; raises LoraformatError."""
        ...


BASES: Registry[BaseFormat] = Registry("loraformat.bases", "BASE")
