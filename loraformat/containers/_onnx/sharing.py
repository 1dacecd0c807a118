"""A model beside its base that refers to the base's data files, and has a data file of its own for what differs.

A base that holds its weights itself is such a data file: external data may lie anywhere in any file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from loraformat.containers._onnx.copies import NewTensor, leave_room
from loraformat.containers._onnx.walk import ExternalSite, InlineSite
from loraformat.containers._protobuf import VARINT, Field, Leaf, encode_bytes, encode_tag, encode_varint
from loraformat.images import Copy, Edit, Fresh, Literal, Piece
from loraformat.spans import InputFile, Span

_EXTERNAL_DATA: Final = 13
_DATA_LOCATION: Final = 14
_EXTERNAL: Final = 1
_KEY: Final = 1
_VALUE: Final = 2
_REPLACED: Final = ("location", "offset", "length", "checksum")
_ALIGNMENT: Final = 64


class OwnData:
    """The data file of a sharing model, or of several in one folder: room for tensors of the base that change.

    Args:
        location: its name, beside the models.
        files: the open data files of the base.
        touched: the bytes of the base that change.
    """

    def __init__(self, location: str, files: Mapping[Path, InputFile], touched: Sequence[Span]) -> None:
        self.location = location
        self.pieces: list[Piece] = []
        self._offsets: dict[Span, int] = {}
        self.size_bytes = 0
        for span in sorted(set(touched), key=lambda span: (span.path, span.offset)):
            if span.path in files:
                padding = -self.size_bytes % _ALIGNMENT
                self.pieces += [Literal(bytes(padding)), Copy(files[span.path], span.offset, span.length)]
                self._offsets[span] = self.size_bytes + padding
                self.size_bytes += padding + span.length

    def leave_room(self, added: Sequence[NewTensor], mark: str) -> dict[str, tuple[str, int]]:
        """Append room for new tensors; return location and offset of each.

        Args:
            added: the tensors.
            mark: goes before their names in the keys of their room.
        """
        room, offsets = leave_room(added, self.size_bytes)
        self.pieces += [replace(each, key=mark + each.key) if isinstance(each, Fresh) else each for each in room]
        self.size_bytes += sum(each.length for each in room)
        return {name: (self.location, offset) for name, offset in offsets.items()}

    def find(self, path: Path, offset: int, length: int | None) -> tuple[int, int] | None:
        """Return where the bytes of a tensor of the base lie here, offset and length; None for one that is shared."""
        for span, place in self._offsets.items():
            if (span.path, span.offset) == (path, offset) and length in (None, span.length):
                return place, span.length
        return None


def read_entries(file: InputFile, site: ExternalSite) -> dict[str, str]:
    """Return what a tensor's entries of external data say, by key."""
    import onnx

    spans = ((frame.field.begin, frame.field.end) for frame in site.entries.values())
    entries = (onnx.StringStringEntryProto.FromString(file.read(begin, end - begin)) for begin, end in spans)
    return {entry.key: entry.value for entry in entries}


def redirect(site: ExternalSite, location: str, offset: int, length: int) -> Iterator[Leaf]:
    """Yield the edits after which a tensor has its numbers elsewhere."""
    values = {"location": location, "offset": str(offset), "length": str(length)}
    for key in _REPLACED:
        if key not in site.entries:
            continue
        field: Field = site.entries[key].field
        new = b"".join(_encode(*item) for item in values.items()) if key == "location" else b""
        pieces = (Literal(new),) if new else ()
        yield Leaf(Edit(field.start, field.end - field.start, pieces), site.entries[key].parent)


def move_out(site: InlineSite, location: str, offset: int) -> Leaf:
    """Return the edit after which a tensor that had its numbers in the model has them in a data file."""
    length = site.numbers.end - site.numbers.begin
    values = {"location": location, "offset": str(offset), "length": str(length)}
    entries = b"".join(_encode(*item) for item in values.items())
    place = encode_tag(_DATA_LOCATION, VARINT) + encode_varint(_EXTERNAL)
    return Leaf(
        Edit(site.numbers.start, site.numbers.end - site.numbers.start, (Literal(entries + place),)), site.tensor
    )


def _encode(key: str, value: str) -> bytes:
    return encode_bytes(_EXTERNAL_DATA, encode_bytes(_KEY, key.encode()) + encode_bytes(_VALUE, value.encode()))
