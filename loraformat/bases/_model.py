"""A base model: its sites, its weights, and how it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from loraformat.adapter import SlotKind
from loraformat.dtypes import Dtype
from loraformat.encodings import Coding
from loraformat.frozen_mapping import FrozenMapping
from loraformat.images import FileImage, NewOutput, OutputTensor
from loraformat.problems import Problem
from loraformat.spans import InputFile, Part, Span, StoredTensor
from loraformat.strict_json import JsonValue

TENSOR_NAME: Final = "tensor name"
"""The evidence of sites in a state dict, which lists all parameters that a model has."""

OF_TENSORS: Final = frozenset({"initializer name", "bias name"})
"""Evidence that stands at a tensor: exporters store equal ones once, and it does not tell one reader from others."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored tensor that sites use.

    Attributes:
        key: identifies it within the base.
        name: its name, for people.
        tensor: where its bytes are.
        consumers: ids of everything that reads it, sites among them; words for what has no site, such as a tensor
            whose bytes overlap its own.
        coding: how its codes are read, where it is quantised.
    """

    key: str
    name: str
    tensor: StoredTensor
    consumers: frozenset[str]
    coding: Coding | None = None


@dataclass(frozen=True, slots=True)
class FreeBias:
    """The place of a bias that a module lacks.

    Attributes:
        name: the name that its tensor would have.
        dtype: the number form that it would have.
        reader: of a graph, what would be there to read it, for people; empty where nothing more is needed.
        obstacle: why the module can be given none.
    """

    name: str
    dtype: Dtype
    reader: str = ""
    obstacle: Problem | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """A place where a module applies a weight.

    Attributes:
        id: identifies it within the base.
        module: module path that the evidence names; empty when nothing tells.
        evidence: how the path is known: `name scopes`, `node name`, `initializer name` ...
        transposed: for each kind of slot that the site can be, whether the stored matrix is the transpose of the
            canonical `(out, in * kernel)`.
        weight: the weight; None where there is none to change, whoever vouches for it.
        divisor: the site multiplies its weight by this number, so a delta is divided by it (`alpha` of Gemm).
        obstacle: why nothing can be merged here.
        caveat: what the user must accept before something is.
        parameter: which of the module's parameters it is: `weight`, `bias` ...
        part: where in the stored tensor it is; None for all of it.
        section: first and last row, the latter excluded, of the module's canonical matrix `(out, in)` that are stored
            here, where the base splits the module; None for all of them. The sections of a module follow one another.
        grows: whether a replacement may have more rows than are stored: a table of tokens.
        widens: whether the matrix may be filled up with columns of zeros, for an adapter of more inputs.
        tied: for a table that the configuration ties to others, the name that its tensor has, or would have untied.
        row_factors: what each row of the module's canonical matrix was multiplied by before it was stored; empty for
            nothing. Only the torch checkpoint tells (`evidence/values.py`).
        row_order: which row of the module's canonical matrix each stored one is; empty where they are in order.
        free_bias: the place of a bias of the module; None where it has one or can have none.
        own_name: the name of a copy for this site of a weight that others read too; empty where there can be none.
        part_mend: what would let there be one.
        graph: of a base that is several graphs, the file of the one that it is in; else empty.
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
    widens: bool = False
    tied: str = ""
    free_bias: FreeBias | None = None
    caveat: Problem | None = None
    row_factors: tuple[float, ...] = ()
    row_order: tuple[int, ...] = ()
    own_name: str = ""
    part_mend: str = ""
    graph: str = ""

    def stored_shape(self) -> tuple[int, ...]:
        """Return the shape of what the site applies, as it is stored; empty where there is nothing."""
        if self.weight is None:
            return ()
        return self.part.shape if self.part is not None else self.weight.tensor.shape


@dataclass(frozen=True, slots=True)
class NewContents:
    """What an output holds that is written anew.

    Attributes:
        tensors: all of its tensors.
        config_changes: members of `config.json` and their new values.
        replaced_files: files of a folder that come from elsewhere, such as a tokenizer, by their names there.
    """

    tensors: Sequence[OutputTensor]
    config_changes: Mapping[str, JsonValue] = field(default_factory=FrozenMapping)
    replaced_files: Mapping[str, InputFile] = field(default_factory=FrozenMapping)


class Rewriter(Protocol):
    """Describes the base as new files in safetensors, in which tensors may be added, changed in size and form, or gone.

    The plan takes `output_tensors`, edits the list, and hands it to `describe_rewritten`. The engine then writes every
    tensor without a source, or with one of another form or shape, to where `FileImage.locate_fresh(name)` says.

    Attributes:
        format: what kind of base the output is.
        suffix: file name ending of the output; empty for a folder.
        folder_mark: as in `BaseModel`.
        problems: what the output leaves out or changes, whatever the plan.
    """

    format: str
    suffix: str
    folder_mark: str
    problems: Sequence[Problem]

    def output_tensors(self) -> list[OutputTensor]:
        """Return the tensors of the base as they stand, each once: what a rewriting that changes nothing writes."""
        ...

    def describe_rewritten(self, output: NewOutput, contents: NewContents) -> list[FileImage]:
        """Return the output files, the one with the receipt's blank last.

        Args:
            output: the file or folder; its blank is to be filled with `encode_receipt`.
            contents: what it holds.

        Raises:
            LoraformatError: LF105, LF301, LF610 a tensor that the format cannot hold; LF110 a header too long.
        """
        ...

    def check_config(self, config_changes: Mapping[str, JsonValue]) -> list[Problem]:
        """Return a warning when the changes have no `config.json` in the output to stand in."""
        ...

    def encode_receipt(self, text: str) -> bytes:
        """Return the bytes that put `text` into the blank; the rest of the blank is filled with spaces."""
        ...


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
        rewriter: describes it as new files; None for a base that can only be copied.
    """

    path: Path
    format: str
    suffix: str
    folder_mark: str
    sites: Sequence[Site]
    structure_sha256: str
    parent_receipt: Mapping[str, Any] | None

    @property
    def rewriter(self) -> Rewriter | None:
        """What describes it as new files."""
        ...

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

    def describe_images(self, output: NewOutput) -> list[FileImage]:
        """Return the output files: this base plus a blank for the receipt, in the last file."""
        ...

    def compute_checksums(
        self, image: FileImage, descriptor: int, touched: Sequence[Span], jobs: int = 1
    ) -> Mapping[int, bytes]:
        """Return what must stand where in an output file because its numbers are what they are, such as checksums.

        Whoever verifies an output compares these bytes, and takes them out of what must equal the base.

        Args:
            image: the output file, from `describe_images`.
            descriptor: it, with all pieces and tiles written, open for reading.
            touched: the spans of the base, in any of its files, whose numbers were written anew.
            jobs: threads.

        Returns:
            Offsets in the file, and the bytes there; nothing for a container without checksums.
        """
        ...

    def finish_output(self, image: FileImage, descriptor: int, touched: Sequence[Span], jobs: int = 1) -> None:
        """Write what `compute_checksums` returns, once all pieces and tiles of a file are written.

        To be called once for every image, from any thread, with the descriptor open for reading and writing. Memory is
        bounded.
        """
        ...

    def encode_receipt(self, text: str) -> bytes:
        """Return the bytes that put `text` into a blank; the rest of the blank is filled with spaces."""
        ...

    def list_stale(self, output: Path) -> list[Path]:
        """Return the files that only the model at `output`, about to be replaced, still needs."""
        ...
