"""A folder's graphs once more, beside its own: small ones, which refer to the folder's data files for most numbers.

ONNX has no way out of a model's folder, so that they stand in the folders of the graphs that they are made from, under
names of their own. A JSON file lists them, and has the receipt; it is what the set of them is opened by.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from loraformat.bases._onnx.members import Member
from loraformat.containers._onnx.sharing import OwnData
from loraformat.containers.onnx_file import GraphChange
from loraformat.errors import refuse
from loraformat.images import Blank, FileImage, Literal, NewOutput, Piece
from loraformat.limits import MAX_GRAPHS
from loraformat.spans import InputFile, Span, read_small
from loraformat.strict_json import parse_lasting_object, write_canonical

SUFFIX: Final = ".graphs.json"
HEAD: Final = b'{"graphs":{'
_MARK: Final = "loraformat.set"
"""The metadata entry of a graph that belongs to a set: the set's name."""


class SetForm:
    """What a set is as an output."""

    suffix = SUFFIX
    folder_mark = ""

    def encode_receipt(self, text: str) -> bytes:
        """Return the text as the set's file holds it."""
        return text.encode("utf-8")


def name_set(path: Path) -> str:
    """Return what a set is called: its file's name without the ending.

    Raises:
        RefusedError: LF444 another ending.
    """
    name = path.name.removesuffix(SUFFIX)
    if name in ("", path.name):
        raise refuse(
            "LF444", path, f"the name {path.name!r}", f"a name that ends in {SUFFIX}, in the folder of the base"
        )
    return name


def describe_set(members: Sequence[Member], output: NewOutput, touched: Sequence[Span]) -> list[FileImage]:
    """Return the files of a set: data files, the graphs that change, and last the file that lists all.

    Args:
        members: the folder's graphs.
        output: the set's file, in the folder.
        touched: the bytes that differ, those of whole tensors.

    Raises:
        RefusedError: LF444 graphs of several folders that read a tensor which changes.
    """
    name, folder = name_set(output.path), output.path.absolute().parent
    changed = [member for member in members if _is_changed(member, touched)]
    by_folder: dict[PurePosixPath, list[Member]] = defaultdict(list)
    for member in changed:
        by_folder[PurePosixPath(member.name).parent].append(member)
    _check_apart(by_folder, touched)
    images: list[FileImage] = []
    for inside, group in by_folder.items():
        own = _make_data(f"{name}.data", group, touched)
        graphs = [member.describe_thin(folder / _name_thin(member.name, name), own, {_MARK: name}) for member in group]
        data = [FileImage(folder / inside / own.location, own.pieces)] if own.pieces else []
        images += [*data, *graphs]
    listed = {member.name: _name_thin(member.name, name) if member in changed else member.name for member in members}
    text = write_canonical({"graphs": listed, "version": "1.0"})
    pieces: list[Piece] = [Literal(text[:-1] + b',"receipt":'), Blank(output.blank_bytes), Literal(b"}\n")]
    return [*images, FileImage(output.path, pieces)]


def _is_changed(member: Member, touched: Sequence[Span]) -> bool:
    return member.graph.changes != ((), GraphChange()) or bool(_find_own(member, touched))


def _find_own(member: Member, touched: Sequence[Span]) -> set[Span]:
    return {tensor.span for tensor in member.graph.list_tensors()}.intersection(touched)


def _check_apart(by_folder: Mapping[PurePosixPath, Sequence[Member]], touched: Sequence[Span]) -> None:
    readers: dict[Span, str] = {}
    for group in by_folder.values():
        for member in group:
            for span in _find_own(member, touched):
                other = readers.setdefault(span, member.name)
                if PurePosixPath(other).parent != PurePosixPath(member.name).parent:
                    raise refuse("LF444", member.name, f"a tensor of {other} as well, in another folder", "one folder")


def _make_data(location: str, group: Sequence[Member], touched: Sequence[Span]) -> OwnData:
    """Return the data file that the changed graphs of one folder have for what differs."""
    parts = [member.graph.opened.parts() for member in group]
    files: dict[Path, InputFile] = {path: file for each in parts for path, file in each.shareable.items()}
    movable = [
        span
        for member, each in zip(group, parts, strict=True)
        for span in each.list_movable(sorted(_find_own(member, touched), key=lambda span: span.offset))
    ]
    return OwnData(location, files, movable)


def _name_thin(graph: str, name: str) -> str:
    path = PurePosixPath(graph)
    return str(path.with_name(f"{path.stem}-{name}{path.suffix}"))


def is_thin(member: Member) -> bool:
    """Say whether a graph belongs to a set, and stands beside the one that it is made from."""
    entries = {entry.key: entry.value for entry in member.graph.opened.model.metadata_props}
    path, name = PurePosixPath(member.name), entries.get(_MARK, "")
    source = member.graph.path.with_name(path.stem.removesuffix(f"-{name}") + path.suffix)
    return bool(name) and path.stem.endswith(f"-{name}") and source.is_file()


def read_set(path: Path) -> tuple[dict[str, str], Mapping[str, Any] | None]:
    """Return the files of a set's graphs by the names of those that they are made from, and its receipt.

    Raises:
        LoraformatError: LF104 no such file, LF110 too many graphs.
    """
    stated = parse_lasting_object(read_small(path), path)
    graphs, receipt = stated.get("graphs"), stated.get("receipt")
    listed = graphs if isinstance(graphs, Mapping) else {}
    files = {name: file for name, file in listed.items() if isinstance(file, str)}
    if not files or files.keys() != listed.keys():
        raise refuse("LF104", path, f"graphs {graphs!r:.80}", "an object of files by graphs")
    if len(files) > MAX_GRAPHS:
        raise refuse("LF110", path, f"{len(files)} ONNX models in one set", f"at most {MAX_GRAPHS}")
    return files, receipt if isinstance(receipt, Mapping) else None


def list_written(folder: Path, name: str) -> Iterator[Path]:
    """Yield the files that a set of this name has written into a folder, as far as their names tell."""
    path = folder / f"{name}{SUFFIX}"
    graphs, _ = read_set(path)
    for graph, file in graphs.items():
        if file == _name_thin(graph, name):
            yield folder / file
            yield (folder / file).with_name(f"{name}.data")
