"""A folder of ONNX graphs: the halves of an encoder-decoder, a pipeline, one model in several forms; what lies beside.

The output is a folder: every graph with its adapted weights rewritten, every other file as it is, and the receipt in
`merge_receipt.json`.
"""

import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Final

from loraformat.bases import (
    AddedBias,
    BaseModel,
    FloatForm,
    RunnableBase,
    Site,
    View,
    Weight,
    WeightCopy,
    WeightFloats,
)
from loraformat.bases._joined_folder import PIPELINE, JoinedFolder
from loraformat.bases._onnx.members import Member, find_shared
from loraformat.bases._onnx.ranges import Ranges
from loraformat.bases._onnx.thin_sets import SUFFIX, SetForm, describe_set, is_thin, list_written, name_set
from loraformat.bases.checkpoint_folder import BASE as SAFETENSORS_FOLDER
from loraformat.bases.onnx_graph import OnnxGraph
from loraformat.bases.pipeline_folder import has_components
from loraformat.bases.torch_folder import BASE as TORCH_FOLDER
from loraformat.containers.onnx_file import list_data
from loraformat.errors import refuse
from loraformat.files import resolve_inside
from loraformat.images import FileImage, NewOutput
from loraformat.limits import MAX_FOLDER_DEPTH, MAX_GRAPHS
from loraformat.outputs import is_unfinished
from loraformat.problems import Problem
from loraformat.spans import InputFile, Span
from loraformat.strict_json import JsonValue

_SUFFIX: Final = ".onnx"
_HALF: Final = re.compile(r"(?:.*-)?(encoder|decoder)(?![a-z])")


class OnnxFolder(JoinedFolder):
    """An opened folder of ONNX models; the attributes are those of `BaseModel`."""

    format = "onnx folder"
    _members: Sequence[Member]

    def __init__(self, folder: Path, members: Sequence[Member], apart: Collection[str] = ()) -> None:
        """Index a folder's graphs.

        Args:
            folder: absolute path.
            members: the graphs.
            apart: files that neither belong to them nor travel with them.
        """
        self._members = members
        self._shared = find_shared(members)
        self.sites: Sequence[Site] = [site for member in members for site in member.list_sites(self._shared)]
        super().__init__(folder, choose_entry(folder), members, apart)
        self._all_views = self._list_views()

    def _list_views(self) -> Sequence[View]:
        by_graph: dict[str, list[Site]] = {member.name: [] for member in self._members}
        for site in self.sites:
            by_graph[site.graph].append(site)
        is_pipeline = (self.path / PIPELINE).is_file()
        return [
            View(
                member.name,
                next(iter(PurePosixPath(member.name).parts[:-1]), "") if is_pipeline else "",
                _find_half(member.name),
                by_graph[member.name],
                member.find_anchors,
                member.find_roles,
            )
            for member in self._members
        ]

    def list_runnable(self) -> Mapping[str, RunnableBase]:
        """Return the graphs by their files, each by itself."""
        if self._shared.paths:
            found = "graphs that have their numbers in one data file"
            raise refuse("LF446", self.path, found, "graphs with data files of their own")
        return {member.name: member.graph for member in self._members}

    def with_copies(self, copies: Sequence[WeightCopy]) -> "OnnxFolder":
        """Return the folder, with initializers more in some graphs."""
        return self._with(member.with_copies(copies) for member in self._members)

    def with_biases(self, biases: Sequence[AddedBias]) -> "OnnxFolder":
        """Return the folder, with biases more in some graphs."""
        return self._with(member.with_biases(biases) for member in self._members)

    def find_float_form(self, wanted: WeightFloats) -> FloatForm | Problem:
        """Return how a quantised weight would stand in floats, or why it cannot."""
        site = next(site for site in self.sites if site.weight is not None and site.weight.key == wanted.key)
        assert site.weight is not None, "chosen so"
        if site.weight.tensor.span.path in self._shared.paths:
            return Problem("LF619", site.weight.name, "codes in a data file of several graphs", "a file of its own")
        member = next(member for member in self._members if member.name == site.graph)
        found = member.graph.find_float_form(member.own_floats(wanted))
        return found if isinstance(found, Problem) else replace(found, name=member.mark(found.name))

    def with_floats(self, floats: Sequence[WeightFloats]) -> "OnnxFolder":
        """Return the folder, with floats in the place of codes in some graphs."""
        return self._with(member.with_floats(floats) for member in self._members)

    def list_measurable(self) -> Mapping[str, OnnxGraph]:
        """Return the chosen graphs that have measured ranges of activations."""
        return {member.mark(""): member.graph for member in self._chosen_members if member.has_ranges}

    def check_ranges(self, ranges: Ranges | None) -> Sequence[Problem]:
        """Return what speaks against giving the chosen graphs these ranges; None stands for any."""
        return [each for member in self._chosen_members if member.has_ranges for each in member.check_ranges(ranges)]

    def with_ranges(self, ranges: Ranges) -> "OnnxFolder":
        """Return the folder, with other ranges in some graphs."""
        return self._with(member.with_ranges(ranges) for member in self._members)

    @property
    def _chosen_members(self) -> list[Member]:
        return [member for member in self._members if member.name in self._chosen]

    def list_data_files(self) -> Set[Path]:
        """Return the files that only have numbers of graphs in them."""
        return {file.path for member in self._members for file in member.graph.files} - {
            member.graph.path for member in self._members
        }

    def list_joint_floats(self, keys: Set[str]) -> Sequence[Weight | Problem]:
        """Return the weights that the graphs' operators want in floats together with these."""
        weights = {site.weight.key: site.weight for site in self.sites if site.weight is not None}
        found = [each for member in self._members for each in member.list_joint_floats(keys)]
        return [each if isinstance(each, Problem) else weights[each] for each in found]

    def tell_floats(self) -> Mapping[str, JsonValue]:
        """Return nothing: what is beside graphs does not say how they are quantised."""
        return {}

    def _with(self, members: Iterator[Member]) -> "OnnxFolder":
        changed = object.__new__(OnnxFolder)
        changed.__dict__.update(self.__dict__, _members=list(members))
        return changed

    sharing_form = SetForm()
    """What a set of its graphs is that refer to its data files."""

    def describe_sharing_images(self, output: NewOutput, touched: Sequence[Span]) -> list[FileImage]:
        """Return the graphs that change once more, what differs, and the file that lists the set."""
        return describe_set(self._members, output, touched)

    def list_shared(self) -> Mapping[str, InputFile]:
        """Return the data files that graphs beside these may refer to, by their paths; none where some are links."""
        found = [(member, member.graph.list_shared()) for member in self._members]
        if any(len(member.graph.files) > 1 and not files for member, files in found):
            return {}
        return {member.place(name): file for member, files in found for name, file in files.items()}

    def find_sharers(self, files: Set[Path]) -> list[Path]:
        """Return other models in the folder that have numbers in some of its files: those of sets."""
        own = {member.graph.path for member in self._members}
        beside = (each for each in _list_graphs(self.path) if each not in own)
        return [each for each in beside if not files.isdisjoint(list_data(each))]

    def list_stale(self, output: Path) -> list[Path]:
        """Return the files of a set that is about to be replaced."""
        if not output.is_file() or not output.name.endswith(SUFFIX):
            return []
        return [path for path in list_written(output.parent, name_set(output)) if path.is_file()]

    def describe_images(self, output: NewOutput) -> list[FileImage]:
        """Return the graphs with their data files, the other files, and last the receipt."""
        graphs = (image for member in self._members for image in member.describe_images(output.path, output.fresh))
        images = {image.path: image for image in graphs}
        return [*images.values(), *self.describe_beside(output)]


def choose_entry(folder: Path) -> Path:
    """Return a file that tells where the folder's files may be: in a cache of the hub all of them are links."""
    files = [item for item in sorted(folder.iterdir()) if item.is_file()]
    return next((item for item in files if not item.is_symlink()), files[0] if files else folder / PIPELINE)


def _find_half(name: str) -> str:
    found = _HALF.match(PurePosixPath(name).stem)
    return found[1] if found else ""


def _list_graphs(folder: Path) -> list[Path]:
    """Return the ONNX models of a folder and its sub-folders, one more than allowed at most."""
    found: list[Path] = []
    pending = deque([folder])
    while pending and len(found) <= MAX_GRAPHS:
        for item in sorted(pending.popleft().iterdir()):
            hidden = item.name.startswith(".") or is_unfinished(item.name)
            if item.is_dir() and not item.is_symlink() and not hidden:
                if len(item.relative_to(folder).parts) <= MAX_FOLDER_DEPTH:
                    pending.append(item)
            elif item.suffix.lower() == _SUFFIX and item.is_file() and not hidden:
                found.append(item)
    return sorted(found)


class OnnxFolderFormat:
    """The base format `onnx folder`."""

    name = "onnx folder"
    suffixes = ()

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Recognise a folder with ONNX models in it and no weights of transformers or diffusers."""
        if not path.is_dir() or any(form.find_entry(path) is not None for form in (SAFETENSORS_FOLDER, TORCH_FOLDER)):
            return False
        return not has_components(path) and bool(_list_graphs(path))

    def open(self, path: Path) -> BaseModel:
        """Index the graphs; sets that refer to their data are none of them."""
        names = [found.relative_to(path).as_posix() for found in _list_graphs(path)]
        if len(names) > MAX_GRAPHS:
            raise refuse("LF110", path, f"{len(names)} ONNX models in one folder", f"at most {MAX_GRAPHS}")
        folder = path.absolute()
        entry = choose_entry(folder)
        found = [Member(name, OnnxGraph(resolve_inside(entry, name))) for name in names]
        members = [member for member in found if not is_thin(member)]
        thin = {name for member in found if is_thin(member) for name in member.name_files()}
        sets = {each.name for each in folder.glob(f"*{SUFFIX}")}
        return OnnxFolder(folder, members, thin | sets)


BASE: Final = OnnxFolderFormat()
