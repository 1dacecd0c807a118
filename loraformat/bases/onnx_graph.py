"""An ONNX graph: a site is a node and its weight input.

What most merges do not ask for is imported where it is: floats in the place of codes, roles and anchors of layers,
branches.
"""

import copy
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loraformat.bases import (
    AddedBias,
    Anchors,
    BaseModel,
    FloatForm,
    MeasuredValue,
    Roles,
    Site,
    Weight,
    WeightCopy,
    WeightFloats,
)
from loraformat.bases._finishing import Checksums
from loraformat.bases._onnx.biases import PlacedBias, add_biases, insert_biases, offer_biases, place_biases
from loraformat.bases._onnx.coded import find_ranges
from loraformat.bases._onnx.copies import apply_edits
from loraformat.bases._onnx.experts import find_experts
from loraformat.bases._onnx.offered_copies import describe_copy, offer_copies
from loraformat.bases._onnx.packed import expand_packed
from loraformat.bases._onnx.ranges import Ranges, check_ranges, find_measured, set_ranges
from loraformat.bases._onnx.remarks import find_branches, find_compiled, find_fed, find_halves
from loraformat.bases._onnx.scopes import GraphIndex, Visit
from loraformat.bases._onnx.sites import RawSite, find_sites
from loraformat.bases._onnx.traces import Trace
from loraformat.bases._onnx.weights import list_weight_sites
from loraformat.containers.onnx_file import CONTAINER, GraphChange, OnnxFile, TensorCopy, list_data, open_onnx
from loraformat.images import FileImage, NewOutput
from loraformat.problems import Problem
from loraformat.spans import InputFile, Span, StoredTensor
from loraformat.strict_json import JsonValue

if TYPE_CHECKING:
    import onnx

    from loraformat.bases._onnx.branchable import BranchableGraph
    from loraformat.bases._onnx.floats import Surgery

_FREE_INITIALIZERS: Final = 4
"""The version of the IR from which an initializer need not be an input of the model."""


class OnnxGraph(Checksums):
    """An opened ONNX model; the attributes are those of `BaseModel`."""

    format = "onnx"
    suffix = ".onnx"
    folder_mark = ""
    rewriter = None

    def __init__(self, path: Path | InputFile) -> None:
        self._opened: OnnxFile = open_onnx(path)
        self.path = self._opened.path
        self._tensors = _list_tensors(self._opened)
        index = GraphIndex(self._opened.model, self.path)
        caveat = find_ranges(index.visits)
        found = self._find_sites(index.visits)
        sites = list_weight_sites(self._opened, found, caveat)
        sites, self._shared = offer_copies(found, sites, index.names, is_old=self._is_old)
        self.sites: Sequence[Site] = offer_biases(found, sites, index.names, is_old=self._is_old)
        self._copies: Sequence[tuple[TensorCopy, Trace]] = ()
        self._biases: Sequence[PlacedBias] = ()
        self._found, self._index, self._change = found, index, GraphChange()
        self._beside: Sequence[Problem] = ()
        graph = self._opened.model.graph
        self._odd = [*find_branches(self.sites), *find_compiled(index.visits), *find_fed(graph)]
        self.structure_sha256: str = self._opened.structure_sha256
        self.parent_receipt: Mapping[str, Any] | None = self._opened.receipt

    def _find_sites(self, visits: Sequence[Visit]) -> list[RawSite]:
        model = self._opened.model
        inputs = {entry.name for entry in model.graph.input}
        return expand_packed([*find_sites(visits), *find_experts(visits)], model.producer_name, inputs)

    @property
    def _is_old(self) -> bool:
        """Whether every initializer must be an input of the model."""
        return self._opened.model.ir_version < _FREE_INITIALIZERS

    def with_copies(self, copies: Sequence[WeightCopy]) -> "OnnxGraph":
        """Return the graph with initializers more, each read by some of a weight's sites instead of the weight."""
        weights = {site.weight.key: site.weight for site in self.sites if site.weight is not None}
        graph = copy.copy(self)
        graph._copies = [
            each
            for wanted in copies
            for each in describe_copy(wanted, weights[wanted.key], self._shared, is_old=self._is_old)
        ]
        return graph

    def with_biases(self, biases: Sequence[AddedBias]) -> "OnnxGraph":
        """Return the graph with initializers more, each read as a bias where it had none."""
        graph = copy.copy(self)
        by_id = {site.id: raw for raw, site in zip(self._found, self.sites, strict=True)}
        names = self._index.names.union(site.own_name for site in self.sites)
        graph._biases = place_biases(biases, by_id, names)
        graph._change = add_biases(self._opened, graph._biases, self._change)
        return graph

    def rewire(self, graph: "onnx.GraphProto", tensors: Set[str]) -> Mapping[str, str]:
        """Have the base's main graph read copies and biases, and compute in floats what reads codes of `tensors`."""
        from loraformat.bases._onnx.opened_codes import open_codes
        from loraformat.bases._onnx.opened_experts import open_experts

        apply_edits(graph, ((each, trace.name) for each, trace in self._copies if trace.scope.path == ()))
        insert_biases(graph, self._biases)
        open_codes(graph, tensors)
        return open_experts(graph, tensors)

    def find_float_form(self, wanted: WeightFloats) -> FloatForm | Problem:
        """Return how a quantised weight would stand in floats, or why it cannot."""
        found = self._plan_surgery(wanted)
        return found if isinstance(found, Problem) else found.form

    def _plan_surgery(self, wanted: WeightFloats) -> "Surgery | Problem":
        from loraformat.bases._onnx.floats import plan_copy, plan_surgery

        chosen = [
            (site.weight, raw)
            for raw, site in zip(self._found, self.sites, strict=True)
            if site.weight is not None
            and site.weight.key == wanted.key
            and (not wanted.readers or site.id in wanted.readers)
        ]
        weight = chosen[0][0]
        if self._is_old:
            version = f"a model of version {self._opened.model.ir_version} of the IR"
            return Problem("LF619", weight.name, version, f"version {_FREE_INITIALIZERS} or later")
        if wanted.readers:
            return plan_copy([raw for _, raw in chosen], weight, self._index.names, wanted.name)
        return plan_surgery(chosen[0][1], weight, self._index.names)

    def list_joint_floats(self, keys: Set[str]) -> Sequence[Weight | Problem]:
        """Return the other experts of the nodes that read these weights; all others stay as they are."""
        from loraformat.bases._onnx.float_experts import list_joint_experts

        return list(list_joint_experts(self._found, self.sites, keys))

    def tell_floats(self) -> Mapping[str, JsonValue]:
        """Return nothing: a graph has no configuration."""
        return {}

    def with_floats(self, floats: Sequence[WeightFloats]) -> "OnnxGraph":
        """Return the graph with initializers of floats in the place of codes, and other nodes for them."""
        from loraformat.bases._onnx.floats import Surgery, join_surgeries

        graph = copy.copy(self)
        surgeries = [found for each in floats if isinstance(found := self._plan_surgery(each), Surgery)]
        inputs = {each.name for each in self._opened.model.graph.input}
        graph._change = join_surgeries(surgeries, self._index.visits, inputs, self._change)
        return graph

    def list_measurable(self) -> "Mapping[str, OnnxGraph]":
        """Return the graph itself."""
        return {"": self}

    def float_activations(self, graph: "onnx.GraphProto") -> Sequence[MeasuredValue]:
        """Have a main graph leave activations in floats; return whose ranges count."""
        from loraformat.bases._onnx.float_graph import make_float_graph

        known, _ = find_measured(self._index.visits)
        return [value for value in make_float_graph(graph) if value.scale in known]

    def check_ranges(self, ranges: Ranges | None) -> Sequence[Problem]:
        """Return what speaks against giving the graph these ranges; None stands for any."""
        return check_ranges(*find_measured(self._index.visits), ranges)

    def with_ranges(self, ranges: Ranges) -> "OnnxGraph":
        """Return the graph with scales, zero points and biases of other ranges."""
        graph = copy.copy(self)
        found, _ = find_measured(self._index.visits)
        graph._change = replace(self._change, replaced=tuple(set_ranges(self._opened, found, ranges)))
        return graph

    @property
    def opened(self) -> OnnxFile:
        """The model's structure, and where its numbers are, for whoever runs it."""
        return self._opened

    def find_roles(self) -> Roles:
        """Return what the linear layers of the main graph do, as far as the flow of values tells."""
        from loraformat.bases._onnx.structure import find_roles

        return find_roles(self._index.visits, find_sites(self._index.visits), self._read_opset())

    def find_anchors(self) -> Anchors:
        """Return which linear layers of the main graph work together, and the names that are left beside them."""
        from loraformat.bases._onnx.anchors import find_anchors

        return find_anchors(self._index.visits, find_sites(self._index.visits), self._read_opset())

    def _read_opset(self) -> int:
        imports = self._opened.model.opset_import
        return max((each.version for each in imports if each.domain in ("", "ai.onnx")), default=0)

    @property
    def changes(self) -> tuple[Sequence[TensorCopy], GraphChange]:
        """What its outputs have otherwise than the file: tensors once more, and other nodes."""
        return self._added, self._change

    @property
    def _added(self) -> tuple[TensorCopy, ...]:
        return tuple(each for each, _ in self._copies)

    @property
    def files(self) -> Sequence[InputFile]:
        """The model's file and its data files."""
        return self._opened.files

    @property
    def problems(self) -> Sequence[Problem]:
        """What is odd about the files, and what stands against any merge."""
        return [*self._opened.problems, *self._odd, *self._beside]

    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor, in graphs, attributes and functions."""
        return self._tensors

    def describe_images(self, output: NewOutput) -> list[FileImage]:
        """Return the data files and, last, the model: the same bytes and a metadata entry for the receipt."""
        return self._opened.images(output, *self.changes)

    @property
    def sharing_form(self) -> "OnnxGraph":
        """What a model beside it is that refers to its files: one as it is itself."""
        return self

    def describe_sharing_images(self, output: NewOutput, touched: Sequence[Span]) -> list[FileImage]:
        """Return a data file with the tensors that differ, and the model, which refers to the base's files too."""
        return self._opened.sharing_images(output, touched, *self.changes)

    def list_shared(self) -> Mapping[str, InputFile]:
        """Return the data files that a model beside this one may refer to, by their paths from its folder."""
        return self._opened.shared_files()

    def find_sharers(self, files: Set[Path]) -> list[Path]:
        """Return other models in its folder that have numbers in some of its files."""
        beside = (each for each in sorted(self.path.parent.glob("*.onnx")) if each != self.path)
        return [each for each in beside if not files.isdisjoint(list_data(each))]

    def as_branchable(self) -> "BranchableGraph":
        """Return the graph as one that run-time branches are put beside."""
        from loraformat.bases._onnx.branchable import BranchableGraph

        return BranchableGraph(self._opened, self._found, self.sites)

    def encode_receipt(self, text: str) -> bytes:
        """Return the text as protobuf stores it."""
        return text.encode("utf-8")

    def list_stale(self, output: Path) -> list[Path]:
        """Return the data files of the model at `output` that bear its name: `m.onnx.data`, not `model.onnx.data`."""
        if not output.is_file():
            return []
        return [path for path in self._opened.stale_data(output) if not path.name[len(output.stem)].isalnum()]


def _list_tensors(opened: OnnxFile) -> list[StoredTensor]:
    """Return every stored tensor; this also checks each against its file and opens all data files."""
    stored = (opened.stored_tensor(proto) for _, proto in opened.tensors())
    return [tensor for tensor in stored if isinstance(tensor, StoredTensor)]


class OnnxFormat:
    """The base format `onnx`."""

    name = "onnx"
    suffixes = (".onnx",)

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Recognise the fields that a model begins with."""
        return CONTAINER.sniff(head, size_bytes)

    def open(self, path: Path) -> BaseModel:
        """Index the graph; said is what else of the same model stands beside it."""
        graph = OnnxGraph(path)
        graph._beside = find_halves(path)
        return graph


BASE: Final = OnnxFormat()
