"""One graph of a folder of several: its sites, weights and outputs under names that no other graph has."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from loraformat.bases import AddedBias, Anchors, FreeBias, Roles, Site, Weight, WeightCopy, WeightFloats
from loraformat.bases._onnx.ranges import Ranges
from loraformat.bases.onnx_graph import OnnxGraph
from loraformat.containers._onnx.images import Wanted, describe_sharer
from loraformat.containers._onnx.sharing import OwnData
from loraformat.containers._onnx.tensors import SharedBytes
from loraformat.containers.onnx_file import GraphChange
from loraformat.images import Copy, FileImage, Fresh, NewOutput, Piece
from loraformat.problems import Problem
from loraformat.spans import InputFile, Span, StoredTensor

_SHARED: Final = (
    "Graphs of this folder have their numbers in one data file, in which a copy for one of them has no place. Give "
    "each graph a data file of its own: onnx.save(onnx.load(P), P, save_as_external_data=True, location=NAME)."
)


@dataclass(frozen=True, slots=True)
class SharedData:
    """Data files in which several graphs of a folder have numbers.

    Attributes:
        paths: the files.
        readers: by bytes of a weight, everything in any of the graphs that reads some of them.
    """

    paths: frozenset[Path]
    readers: Mapping[Span, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Member:
    """A graph of a folder.

    Attributes:
        name: its file, from the folder.
        graph: the graph alone.
    """

    name: str
    graph: OnnxGraph

    @property
    def _folder(self) -> str:
        parent = str(PurePosixPath(self.name).parent)
        return "" if parent == "." else f"{parent}/"

    @property
    def structure_sha256(self) -> str:
        """Digest of everything but the weights' payloads."""
        return self.graph.structure_sha256

    @property
    def problems(self) -> Sequence[Problem]:
        """What is odd about the graph, by names as the folder has them."""
        return [replace(problem, where=self.mark(problem.where)) for problem in self.graph.problems]

    def name_files(self) -> Mapping[str, InputFile]:
        """Return the graph's files by their paths from the folder."""
        parent = self.graph.path.parent
        return {self._folder + file.path.relative_to(parent).as_posix(): file for file in self.graph.files}

    def place(self, location: str) -> str:
        """Return the path from the folder of a file beside the graph."""
        return self._folder + location

    def mark(self, text: str) -> str:
        """Return an id or name of the graph as the folder has it."""
        return f"{self.name}:{text}"

    def unmark(self, text: str) -> str:
        """Return what an id or name is called in the graph; the reverse of `mark`."""
        return text.removeprefix(f"{self.name}:")

    def key(self, own: str) -> str:
        """Return the key of a weight in the folder: graphs that share a data file have one key for the same bytes."""
        return self._folder + own

    def own_key(self, key: str) -> str:
        """Return the key of a weight in the graph; the reverse of `key`."""
        return key.removeprefix(self._folder)

    def list_sites(self, shared: SharedData) -> Iterator[Site]:
        """Yield the graph's sites."""
        for site in self.graph.sites:
            weight = self._widen(site.weight, shared) if site.weight is not None else None
            is_shared = weight is not None and weight.tensor.span.path in shared.paths
            yield replace(
                site,
                id=self.mark(site.id),
                weight=weight,
                graph=self.name,
                own_name=self.mark(site.own_name) if site.own_name and not is_shared else "",
                part_mend=_SHARED if is_shared else site.part_mend,
                free_bias=self._mark_bias(site.free_bias),
            )

    def _mark_bias(self, bias: FreeBias | None) -> FreeBias | None:
        if bias is None:
            return None
        reader = self.mark(bias.reader) if bias.reader else ""
        obstacle = replace(bias.obstacle, where=self.mark(bias.obstacle.where)) if bias.obstacle else None
        return replace(bias, name=self.mark(bias.name), reader=reader, obstacle=obstacle)

    def _widen(self, weight: Weight, shared: SharedData) -> Weight:
        readers = frozenset(map(self.mark, weight.consumers)) | shared.readers.get(weight.tensor.span, frozenset())
        return replace(weight, key=self.key(weight.key), name=self.mark(weight.name), consumers=readers)

    def find_anchors(self) -> Anchors:
        """Return the graph's anchors, by ids as the folder has them."""
        found = self.graph.find_anchors()
        return replace(found, roles=self._mark_roles(found.roles))

    def find_roles(self) -> Roles:
        """Return the graph's roles, by ids as the folder has them."""
        return self._mark_roles(self.graph.find_roles())

    def _mark_roles(self, roles: Roles) -> Roles:
        parts = {role: tuple((self.mark(site), rows) for site, rows in each) for role, each in roles.parts.items()}
        return replace(roles, by_site={self.mark(site): role for site, role in roles.by_site.items()}, parts=parts)

    def with_copies(self, copies: Sequence[WeightCopy]) -> "Member":
        """Return the graph with those of the copies that its sites read."""
        own = [each for each in copies if self.unmark(each.readers[0]) != each.readers[0]]
        if not own:
            return self
        renamed = [
            replace(
                each,
                name=self.unmark(each.name),
                key=self.own_key(each.key),
                readers=tuple(map(self.unmark, each.readers)),
            )
            for each in own
        ]
        return replace(self, graph=self.graph.with_copies(renamed))

    def with_biases(self, biases: Sequence[AddedBias]) -> "Member":
        """Return the graph with those of the biases that its sites have."""
        own = [
            replace(each, name=self.unmark(each.name), beside=tuple(map(self.unmark, each.beside)))
            for each in biases
            if self.unmark(each.name) != each.name
        ]
        return replace(self, graph=self.graph.with_biases(own)) if own else self

    def with_floats(self, floats: Sequence[WeightFloats]) -> "Member":
        """Return the graph with those of the weights in floats that are its own."""
        keys = {site.weight.key for site in self.graph.sites if site.weight is not None}
        own = [
            self.own_floats(each)
            for each in floats
            if self.unmark(each.name) != each.name and self.own_key(each.key) in keys
        ]
        return replace(self, graph=self.graph.with_floats(own)) if own else self

    def list_joint_floats(self, keys: Set[str]) -> Iterator[str | Problem]:
        """Yield the keys of weights that stand in floats with these, or why one cannot."""
        for each in self.graph.list_joint_floats({self.own_key(key) for key in keys}):
            yield each if isinstance(each, Problem) else self.key(each.key)

    def own_floats(self, wanted: WeightFloats) -> WeightFloats:
        """Return weights in floats by the names that the graph has."""
        readers = tuple(map(self.unmark, wanted.readers))
        return WeightFloats(self.unmark(wanted.name), self.own_key(wanted.key), readers)

    @property
    def has_ranges(self) -> bool:
        """Whether the graph has measured ranges of activations."""
        return bool(self.graph.check_ranges({}))

    def check_ranges(self, ranges: Ranges | None) -> list[Problem]:
        """Return what speaks against giving the graph those of the ranges that are its own; None stands for any."""
        found = self.graph.check_ranges(self._own_ranges(ranges) if ranges is not None else None)
        return [replace(problem, where=self.mark(problem.where)) for problem in found]

    def with_ranges(self, ranges: Ranges) -> "Member":
        """Return the graph with those of the ranges that are its own."""
        own = self._own_ranges(ranges)
        return replace(self, graph=self.graph.with_ranges(own)) if own else self

    def _own_ranges(self, ranges: Ranges) -> Ranges:
        return {self.unmark(scale): ends for scale, ends in ranges.items() if self.unmark(scale) != scale}

    def describe_images(self, folder: Path, fresh: str) -> list[FileImage]:
        """Return the graph's files in an output folder, under the names that they have.

        A graph that has other nodes or tensors is written without the receipt that it may have had.
        """
        if self.graph.changes == ((), GraphChange()):
            files = self.name_files().items()
            return [FileImage(folder / name, [Copy(file, 0, file.size_bytes)]) for name, file in files]
        output = NewOutput(folder / self.name, 0, fresh, lambda path: False)
        images = self.graph.describe_images(output)
        return [FileImage(image.path, [self._mark_piece(piece) for piece in image.pieces]) for image in images]

    def describe_thin(self, path: Path, own: OwnData, metadata: Mapping[str, str]) -> FileImage:
        """Return the graph once more, referring to its data files, and to one with what differs.

        Args:
            path: where it will stand, in the graph's folder.
            own: the file with what differs; room for what the graph has more is appended.
            metadata: entries that it has more.
        """
        wanted = Wanted(NewOutput(path, 0, "", lambda path: False), *self.graph.changes, metadata)
        image = describe_sharer(self.graph.opened.parts(), wanted, own, self.mark(""))
        return FileImage(image.path, [self._mark_piece(piece) for piece in image.pieces])

    def _mark_piece(self, piece: Piece) -> Piece:
        return replace(piece, key=self.mark(piece.key)) if isinstance(piece, Fresh) else piece

    def list_tensors(self) -> list[StoredTensor]:
        """Return the graph's tensors."""
        return [replace(tensor, name=self.mark(tensor.name)) for tensor in self.graph.list_tensors()]


def find_shared(members: Sequence[Member]) -> SharedData:
    """Return the data files that several graphs have numbers in, and who reads them."""
    counts = Counter(path for member in members for path in {file.path for file in member.graph.files})
    paths = frozenset(path for path, count in counts.items() if count > 1)
    held = [tensor for member in members for tensor in member.list_tensors() if tensor.span.path in paths]
    overlaps = SharedBytes((tensor.name, tensor) for tensor in held)
    weights = {
        member.mark(site.weight.tensor.name): (member, site.weight)
        for member in members
        for site in member.graph.sites
        if site.weight is not None and site.weight.tensor.span.path in paths
    }
    readers: dict[Span, set[str]] = defaultdict(set)
    for name, (_, weight) in weights.items():
        for other in overlaps.find(replace(weight.tensor, name=name)):
            member, beside = weights.get(other, (None, weight))
            same = member is not None and beside.tensor.span == weight.tensor.span
            words = {f"the tensor {other!r}, whose bytes overlap its own"}
            readers[weight.tensor.span] |= set(map(member.mark, beside.consumers)) if member and same else words
    return SharedData(paths, {span: frozenset(found) for span, found in readers.items()})
