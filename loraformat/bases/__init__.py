"""What can be adapted: one file for each way of being a model.

A base offers *sites*: places where a module applies a weight. In a checkpoint a site is a named tensor; in an ONNX
graph it is a node and its weight input, since exporters rename, share and transpose tensors.

Two ways lead from a base to an output. `BaseModel.describe_images` is the base itself with spans rewritten, for a merge
that keeps every size and form. `BaseModel.rewriter` describes new files, for one that changes them.
"""

from pathlib import Path
from typing import Protocol

from loraformat.bases._abilities import (
    AddedBias,
    BiasableBase,
    CalibratedBase,
    CopyingBase,
    DataFileBase,
    DequantisingBase,
    FloatForm,
    LayeredBase,
    MeasurableGraph,
    MeasuredValue,
    OutputForm,
    RunnableBase,
    SharedBase,
    ToldBase,
    WeightCopy,
    WeightFloats,
    name_companion,
)
from loraformat.bases._finishing import Checksums
from loraformat.bases._model import (
    OF_TENSORS,
    TENSOR_NAME,
    BaseModel,
    FreeBias,
    NewContents,
    Rewriter,
    Site,
    Weight,
)
from loraformat.bases._roles import Anchor, AnchoredBase, Anchors, Role, Roles, StructuredBase
from loraformat.bases._travelling import list_tokenizer_files
from loraformat.bases._views import View, ViewedBase
from loraformat.registry import Registry

__all__ = [
    "BASES",
    "OF_TENSORS",
    "TENSOR_NAME",
    "AddedBias",
    "Anchor",
    "AnchoredBase",
    "Anchors",
    "BaseFormat",
    "BaseModel",
    "BiasableBase",
    "CalibratedBase",
    "Checksums",
    "CopyingBase",
    "DataFileBase",
    "DequantisingBase",
    "FloatForm",
    "FreeBias",
    "LayeredBase",
    "MeasurableGraph",
    "MeasuredValue",
    "NewContents",
    "OutputForm",
    "Rewriter",
    "Role",
    "Roles",
    "RunnableBase",
    "SharedBase",
    "Site",
    "StructuredBase",
    "ToldBase",
    "View",
    "ViewedBase",
    "Weight",
    "WeightCopy",
    "WeightFloats",
    "list_tokenizer_files",
    "name_companion",
]


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
