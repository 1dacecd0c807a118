"""An ONNX graph as one that branches are put beside: where they can stand, what a model with them is."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from loraformat.adapter import SlotKind
from loraformat.bases import Site, Weight
from loraformat.bases._onnx.extension import Extension, edit_model, list_names
from loraformat.bases._onnx.openings import Opening, find_opening
from loraformat.bases._onnx.rows import Axes, find_axes
from loraformat.bases._onnx.sites import RawSite
from loraformat.bases._onnx.uses import read_attribute
from loraformat.containers.onnx_file import OnnxFile
from loraformat.encodings import Coding
from loraformat.images import FileImage, NewOutput
from loraformat.problems import Problem
from loraformat.spans import Part, StoredTensor

_NBITS: Final = "com.microsoft.MatMulNBits"
_OWN: Final = frozenset({"", "ai.onnx"})
_SPLITS: Final = 13
_UNREAD: Final = Coding("", (0, 0), (0, 0), {})
"""Stands for codes that nobody reads: a branch asks for the size of a weight, not for its numbers."""


class BranchableGraph:
    """What there is to know of a graph for branches.

    Attributes:
        sites: those of the model, each with a tensor of its own: what is added beside one node need not suit others
            that read the same tensor, nor be written in its form.
        path: the model's file.
        ir_version: the version of ONNX's format that the model says it has.

    Args:
        opened: the model.
        found: how the sites were found.
        sites: the model's sites as a merge sees them, in the same order.
    """

    def __init__(self, opened: OnnxFile, found: Sequence[RawSite], sites: Sequence[Site]) -> None:
        self._opened = opened
        self.path = opened.path
        self._nodes = {site.id: raw for raw, site in zip(found, sites, strict=True)}
        self.sites = [_part(self._free(*pair)) for pair in zip(found, sites, strict=True)]
        self._opset = next((each.version for each in opened.model.opset_import if each.domain in _OWN), 1)
        self.ir_version = int(opened.model.ir_version)

    def find_opening(self, site: Site) -> Opening | Problem:
        """Return where something can be added to what a site's node makes, or why nothing can (LF820)."""
        opening = find_opening(self._nodes[site.id])
        if isinstance(opening, Opening) and opening.sizes and self._opset < _SPLITS:
            found = f"operators of version {self._opset}, whose Split knows no sizes"
            return Problem("LF820", f"Attention {opening.visit.node.name!r}", found, f"version {_SPLITS} or later")
        return opening

    def find_mark(self, site: Site) -> str:
        """Return the name of the first value that a site's node makes."""
        return str(self._nodes[site.id].visit.node.output[0])

    def find_axes(self) -> Mapping[str, Axes]:
        """Return the axes of each value whose shape is known."""
        return find_axes(self._opened.model)

    def list_names(self) -> set[str]:
        """Return the names of all values and nodes in the model's graphs and functions."""
        return list_names(self._opened.model)

    def read_metadata(self, key: str) -> str | None:
        """Return the model's own annotation of this key."""
        return next((entry.value for entry in self._opened.model.metadata_props if entry.key == key), None)

    def describe_images(self, output: NewOutput, extension: Extension, *, share: bool) -> list[FileImage]:
        """Return the files of this model with more in its graph; all else of it is as it is.

        Args:
            output: the model; it gets no receipt.
            extension: what is new.
            share: whether it refers to this one's data files, beside which it then stands.
        """
        edits = edit_model(self._opened.file, self._opened.model, extension)
        return self._opened.extended_images(output, edits, share=share)

    def _free(self, raw: RawSite, site: Site) -> Site:
        """Return the site of codes that a merge cannot read with the size that they have: nobody asks for them."""
        if site.weight is not None or raw.obstacle is not None or raw.part is not None or raw.trace.tensor is None:
            return site
        tensor = self._opened.stored_tensor(raw.trace.tensor)
        if not isinstance(tensor, StoredTensor) or tensor.dtype.family == "float":
            return site
        shape = tensor.shape
        if raw.visit.op == _NBITS:
            shape = tuple(int(read_attribute(raw.visit.node, name, 0)) for name in ("N", "K"))
        if len(shape) != 2 or min(shape) <= 0:
            return site
        turned = site.transposed.get(SlotKind.LINEAR, False)
        rows = (*(raw.rows or (0, shape[1 if turned else 0])), 1)
        whole = Part((shape[0], shape[1]), (0, shape[0], 1), (0, shape[1], 1))
        part = replace(whole, columns=rows) if turned else replace(whole, rows=rows)
        weight = Weight(tensor.name, tensor.name, tensor, frozenset(), _UNREAD)
        return replace(site, weight=weight, obstacle=None, part=part)


def _part(site: Site) -> Site:
    if site.weight is None:
        return site
    key = f"{site.weight.key} {site.module}"
    return replace(site, weight=replace(site.weight, key=key, consumers=frozenset({site.id})))
