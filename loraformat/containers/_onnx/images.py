"""The files of a copy of an ONNX model, described: the same bytes, a receipt, and what else is asked for."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final

from loraformat.containers._onnx.copies import NewTensor, TensorCopy, add_copies, leave_room
from loraformat.containers._onnx.external import DataNames, check_location
from loraformat.containers._onnx.floats import GraphChange, change_graph, find_dropped
from loraformat.containers._onnx.sharing import OwnData, move_out, read_entries, redirect
from loraformat.containers._onnx.walk import ExternalSite, InlineSite
from loraformat.containers._protobuf import LENGTH, Field, Frame, Leaf, encode_bytes, encode_tag, encode_varint, splice
from loraformat.errors import refuse
from loraformat.images import Blank, Edit, FileImage, Literal, NewOutput, Piece, edit_file
from loraformat.limits import MAX_PROTOBUF_BYTES
from loraformat.receipt import RECEIPT_KEY
from loraformat.spans import InputFile, Span

_METADATA_PROPS: Final = 14
_KEY: Final = 1
_VALUE: Final = 2


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What outputs are made of.

    Attributes:
        file: the model's file.
        graph: the main graph in it.
        externals: its tensors with external data.
        inlines: its large initializers with their numbers in the file.
        receipts: our own entries of its metadata.
        data: the open data files by their locations.
    """

    file: InputFile
    graph: Frame
    externals: Sequence[ExternalSite]
    inlines: Sequence[InlineSite]
    receipts: Sequence[Field]
    data: Mapping[str, InputFile]

    @property
    def shareable(self) -> Mapping[Path, InputFile]:
        """The files that another model may have numbers in; its own is one where it holds them itself."""
        own = [self.file] if self.inlines else []
        return {file.path: file for file in (*self.data.values(), *own)}

    def list_movable(self, touched: Sequence[Span]) -> list[Span]:
        """Return those of the bytes that another model may have elsewhere; small tensors stay in the model."""
        inside = {site.numbers.begin for site in self.inlines}
        return [span for span in touched if span.path != self.file.path or span.offset in inside]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a copy.

    Attributes:
        output: where it will stand, and with how much room.
        copies: tensors of their own for some readers of others.
        change: what else changes in the graph.
        metadata: entries that it has more, beside the receipt.
    """

    output: NewOutput
    copies: Sequence[TensorCopy] = field(default=())
    change: GraphChange = field(default=GraphChange())
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def added(self) -> "Sequence[NewTensor]":
        """All initializers that the copy has more."""
        return [*self.copies, *self.change.floats]


def describe_copy(model: ModelParts, wanted: Wanted) -> list[FileImage]:
    """Return the files of a copy: data files first, the model last.

    It differs in its receipt, which is the last entry of the file, in the names of its data files, and in what
    `wanted.copies` add.
    """
    dropped = find_dropped(model.file, model.graph, wanted.change)
    data, leaves, places = _copy_data(model, wanted, dropped)
    leaves += _drop_receipts(model)
    leaves += add_copies(model.file, model.graph, wanted.copies, places)
    leaves += change_graph(model.file, model.graph, wanted.change, dropped, places)
    return [*data, _make_model(model, leaves, wanted)]


def describe_extended(model: ModelParts, wanted: Wanted, edits: Sequence[Leaf], *, share: bool) -> list[FileImage]:
    """Return the files of a model with more in its graph, without a receipt: data files first, the model last.

    Args:
        model: the base.
        wanted: the output; in the base's folder if it shares its data files.
        edits: what is new in the model's file.
        share: whether it refers to the base's data files rather than to copies.
    """
    if share:
        data: list[FileImage] = []
        leaves = [_refer_to_base(model, wanted, each) for each in model.inlines]
    else:
        data, leaves, _ = _copy_data(model, wanted, ())
    return [*data, FileImage(wanted.output.path.absolute(), edit_file(model.file, splice([*leaves, *edits])))]


def _copy_data(
    model: ModelParts, wanted: Wanted, dropped: Iterable[Field]
) -> tuple[list[FileImage], list[Leaf], dict[str, tuple[str, int]]]:
    """Return copies of the data files, the edits that refer to them, and where added tensors lie in them."""
    output = wanted.output.path.absolute()
    names = DataNames(model.file.path.name, output, wanted.output.fresh, wanted.output.is_taken)
    chosen: dict[Path, PurePosixPath] = {}
    data: list[FileImage] = []
    leaves: list[Leaf] = []
    places: dict[str, tuple[str, int]] = {}
    for site in model.externals:
        file, old = model.data[site.location], PurePosixPath(site.location)
        if file.path not in chosen:
            chosen[file.path] = names.choose(old, {str(name).casefold() for name in chosen.values()})
            room, offsets = leave_room((c for c in wanted.added if c.beside == file.path), file.size_bytes)
            places |= {name: (str(chosen[file.path]), offset) for name, offset in offsets.items()}
            data.append(FileImage(output.parent / chosen[file.path], edit_file(file, (), room)))
        if _lies_in(site, dropped):
            continue
        if chosen[file.path] != old:
            literal = Literal(str(chosen[file.path]).encode())
            value = site.value.field
            leaves.append(Leaf(Edit(value.begin, value.end - value.begin, (literal,)), site.value))
        if "checksum" in site.entries:  # A digest of the old data file.
            entry = site.entries["checksum"]
            leaves.append(Leaf(Edit(entry.field.start, entry.field.end - entry.field.start, ()), entry.parent))
    return data, leaves, places


def describe_sharing(model: ModelParts, wanted: Wanted, touched: Sequence[Span]) -> list[FileImage]:
    """Return the files of a model that shares the data files of this one: a data file of its own, the model last.

    What this one holds itself is shared as well: its own file is a data file of the other.

    Args:
        model: the base.
        wanted: its output is in the base's folder.
        touched: the bytes that differ, those of whole tensors.
    """
    output = wanted.output.path.absolute()
    names = DataNames(output.name, output, wanted.output.fresh, wanted.output.is_taken)
    taken = {name.casefold() for name in (*model.data, model.file.path.name)}
    location = names.choose(PurePosixPath(f"{output.name}.data"), taken)
    own = OwnData(str(location), model.shareable, model.list_movable(touched))
    sharer = describe_sharer(model, wanted, own)
    data = [FileImage(output.parent / location, own.pieces)] if own.pieces else []
    return [*data, sharer]


def describe_sharer(model: ModelParts, wanted: Wanted, own: OwnData, mark: str = "") -> FileImage:
    """Return the file of a model that shares the data files of this one, and has what differs in `own`.

    Args:
        model: the base.
        wanted: its output is in the base's folder.
        own: the data file of its own, with what differs; room for what is added is appended.
        mark: goes before the names of what is added in the keys of its room there.
    """
    location, leaves = own.location, _drop_receipts(model)
    dropped = find_dropped(model.file, model.graph, wanted.change)
    for site in (site for site in model.externals if not _lies_in(site, dropped)):
        entries = read_entries(model.file, site)
        length = int(entries["length"]) if "length" in entries else None
        place = own.find(model.data[site.location].path, int(entries.get("offset", 0)), length)
        if place is not None:
            leaves += redirect(site, location, *place)
    for inline in (inline for inline in model.inlines if not _holds(dropped, inline.tensor.field.begin)):
        begin, end = inline.numbers.begin, inline.numbers.end
        place = own.find(model.file.path, begin, end - begin)
        leaves.append(move_out(inline, location, place[0]) if place else _refer_to_base(model, wanted, inline))
    places = own.leave_room([each for each in wanted.added if each.beside in model.shareable], mark)
    leaves += add_copies(model.file, model.graph, wanted.copies, places)
    leaves += change_graph(model.file, model.graph, wanted.change, dropped, places)
    return _make_model(model, leaves, wanted)


def _refer_to_base(model: ModelParts, wanted: Wanted, inline: InlineSite) -> Leaf:
    """Return the edit after which a tensor has its numbers in the base's own file."""
    name = model.file.path.name
    check_location(wanted.output.path, name)
    return move_out(inline, name, inline.numbers.begin)


def _lies_in(site: ExternalSite, dropped: Iterable[Field]) -> bool:
    """Say whether a tensor is one of those that go."""
    return _holds(dropped, site.value.field.begin)


def _holds(fields: Iterable[Field], offset: int) -> bool:
    return any(each.start <= offset < each.end for each in fields)


def _drop_receipts(model: ModelParts) -> list[Leaf]:
    return [Leaf(Edit(field.start, field.end - field.start, ()), None) for field in model.receipts]


def _make_model(model: ModelParts, leaves: Sequence[Leaf], wanted: Wanted) -> FileImage:
    room = [_metadata_entry(*entry) for entry in wanted.metadata.items()]
    room += _receipt_entry(wanted.output.blank_bytes) if wanted.output.blank_bytes else []
    pieces = edit_file(model.file, splice(leaves), room)
    image = FileImage(wanted.output.path.absolute(), pieces)
    if wanted.added and image.size_bytes > MAX_PROTOBUF_BYTES:
        names = ", ".join(repr(each.name) for each in wanted.added)
        found = f"a file of {image.size_bytes} bytes with {names}"
        raise refuse("LF419", image.path, found, f"at most {MAX_PROTOBUF_BYTES}")
    return image


def _metadata_entry(key: str, value: str) -> Piece:
    entry = encode_bytes(_KEY, key.encode()) + encode_bytes(_VALUE, value.encode())
    return Literal(encode_bytes(_METADATA_PROPS, entry))


def _receipt_entry(blank_bytes: int) -> list[Piece]:
    """Return the pieces of a metadata entry with room for the receipt."""
    key = encode_bytes(_KEY, RECEIPT_KEY.encode()) + encode_tag(_VALUE, LENGTH) + encode_varint(blank_bytes)
    head = encode_tag(_METADATA_PROPS, LENGTH) + encode_varint(len(key) + blank_bytes)
    return [Literal(head + key), Blank(blank_bytes)]
