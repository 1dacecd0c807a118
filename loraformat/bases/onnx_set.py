"""A set of graphs that a merge has written beside the graphs of a folder: they refer to that folder's data files.

It is opened by the file that lists it, to be proven and looked at. Nothing is merged into it: what it refers to is its
base's, and other sets'.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loraformat.bases import BaseModel
from loraformat.bases._onnx.members import Member
from loraformat.bases._onnx.thin_sets import HEAD, SUFFIX, read_set
from loraformat.bases.onnx_folder import OnnxFolder, choose_entry
from loraformat.bases.onnx_graph import OnnxGraph
from loraformat.files import resolve_inside
from loraformat.problems import Problem
from loraformat.spans import InputFile

_MEND: Final = "Merge all adapters into the folder at once. To undo a set, remove its files: the base is as it was."


class OnnxSet(OnnxFolder):
    """An opened set; the attributes are those of `BaseModel`."""

    format = "onnx set"

    def __init__(self, path: Path) -> None:
        own, folder = path.absolute(), path.absolute().parent
        self._files, receipt = read_set(own)
        entry = choose_entry(folder)
        members = [Member(name, OnnxGraph(resolve_inside(entry, file))) for name, file in self._files.items()]
        super().__init__(folder, members)
        self.path = own
        self.parent_receipt: Mapping[str, Any] | None = receipt

    @property
    def problems(self) -> Sequence[Problem]:
        """What is odd about the graphs, and that nothing can be merged into them."""
        found = "graphs that have most of their numbers in files of their base"
        return [*super().problems, Problem("LF635", str(self.path), found, "the base's folder", _MEND)]

    @property
    def files(self) -> Sequence[InputFile]:
        """The files that its graphs have, those of the base among them."""
        return list({file.path: file for member in self._members for file in member.graph.files}.values())

    def list_shared(self) -> Mapping[str, InputFile]:
        """Return nothing: what is shared is the base's."""
        return {}

    def locate_graph(self, graph: str) -> Path:
        """Return where the file of a graph is."""
        return self.path.parent / self._files[graph]


class OnnxSetFormat:
    """The base format `onnx set`."""

    name = "onnx set"
    suffixes = (SUFFIX,)

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Recognise the list's first words."""
        return path.name.endswith(SUFFIX) and head.startswith(HEAD)

    def open(self, path: Path) -> BaseModel:
        """Index the graphs."""
        return OnnxSet(path)


BASE: Final = OnnxSetFormat()
