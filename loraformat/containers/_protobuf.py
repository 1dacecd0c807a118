"""The protobuf wire format: reading fields in place, and edits that keep every enclosing length right.

Only headers of fields are read, through a small window; payloads are skipped. Everything that libprotobuf would refuse
is refused here too (and groups, which no ONNX file has), so that both see the same structure.
"""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from loraformat.errors import LoraformatError, refuse
from loraformat.images import Edit, Literal
from loraformat.spans import InputFile

VARINT: Final = 0
FIXED64: Final = 1
LENGTH: Final = 2
FIXED32: Final = 5

_FIXED_BYTES: Final = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT_BYTES: Final = 10
_MAX_HEADER_BYTES: Final = 2 * _MAX_VARINT_BYTES
_SMALL_WINDOW: Final = 4096
_LARGE_WINDOW: Final = 65536


class Field(NamedTuple):
    """Where one field of a message stands; offsets are those of the file.

    Attributes:
        number: field number.
        wire: wire type.
        start: offset of its tag.
        prefix: offset of the length, for wire type `LENGTH`; else that of the payload.
        begin: offset of the payload.
        end: the byte after the payload.
    """

    number: int
    wire: int
    start: int
    prefix: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A length-delimited field, and what encloses it: the lengths to mend when something inside changes its size.

    Attributes:
        field: the field.
        parent: the enclosing frame; None at the top level of the file, which has no length.
        depth: the number of enclosing frames.
    """

    field: Field
    parent: "Frame | None" = None
    depth: int = 0

    def enter(self, field: Field) -> "Frame":
        """Return the frame of a field of this message."""
        return Frame(field, self, self.depth + 1)


@dataclass(frozen=True, slots=True)
class Leaf:
    """An edit inside a message, before the lengths around it are mended.

    Attributes:
        edit: the change.
        frame: the innermost message, string or bytes field that changes its length; None at the top level.
    """

    edit: Edit
    frame: Frame | None


def encode_varint(value: int) -> bytes:
    """Return the shortest varint of a non-negative number."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_tag(number: int, wire: int) -> bytes:
    """Return the tag of a field."""
    return encode_varint(number << 3 | wire)


def encode_bytes(number: int, data: bytes) -> bytes:
    """Return a whole length-delimited field."""
    return encode_tag(number, LENGTH) + encode_varint(len(data)) + data


def decode_varint(data: bytes, index: int) -> tuple[int, int]:
    """Return the number at `index` and the index after it; IndexError when cut off, ValueError when too long."""
    value = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        byte = data[index]
        index += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, index
    raise ValueError("a varint of more than 64 bits")


def splice(leaves: Iterable[Leaf]) -> list[Edit]:
    """Return the edits of `leaves` together with those of every length that changes around them, in order.

    Leaves must not overlap. Insertions at one offset stand in the order: deeper message first, then as given.
    """
    keyed: list[tuple[int, int, int, Edit]] = []
    growth: dict[int, int] = {}
    frames: dict[int, Frame] = {}
    for leaf in leaves:
        edit, depth = leaf.edit, 0 if leaf.frame is None else leaf.frame.depth + 1
        keyed.append((edit.offset, edit.length, -depth, edit))
        _grow(growth, leaf.frame, sum(piece.length for piece in edit.pieces) - edit.length)
        _add_with_parents(frames, leaf.frame)
    # A message starts before all that it holds: going backwards, its growth is final when it is met.
    for start in sorted(frames, reverse=True):
        field, change = frames[start].field, growth.get(start, 0)
        if change:
            prefix, old = encode_varint(field.end - field.begin + change), field.begin - field.prefix
            keyed.append((field.prefix, old, 0, Edit(field.prefix, old, (Literal(prefix),))))
            _grow(growth, frames[start].parent, change + len(prefix) - old)
    keyed.sort(key=lambda item: item[:3])
    return [edit for *_, edit in keyed]


def _grow(growth: dict[int, int], frame: Frame | None, change: int) -> None:
    if frame is not None:
        growth[frame.field.start] = growth.get(frame.field.start, 0) + change


def _add_with_parents(frames: dict[int, Frame], frame: Frame | None) -> None:
    while frame is not None and frame.field.start not in frames:
        frames[frame.field.start] = frame
        frame = frame.parent


class Reader:
    """Reads fields of a file in place.

    Args:
        file: the file.
    """

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self._window = b""
        self._start = 0

    def fields(self, begin: int, end: int) -> Iterator[Field]:
        """Yield the fields of the message that fills `begin` to `end`; LF118 when it is not well formed."""
        position = begin
        while position < end:
            window, index = self._view(position, _MAX_HEADER_BYTES)
            origin = position - index
            try:
                field = _decode_field(window, index, origin)
            except IndexError:
                raise self.refuse(position, "a field that is cut off by the end of the file") from None
            except ValueError as error:
                raise self.refuse(position, str(error)) from None
            if field.end > end:
                raise self.refuse(position, f"a field that ends at byte {field.end}, outside its message", end)
            yield field
            position = field.end

    def varint(self, field: Field) -> int:
        """Return the number of a field of wire type `VARINT`."""
        window, index = self._view(field.begin, _MAX_VARINT_BYTES)
        return decode_varint(window, index)[0]

    def read(self, field: Field) -> bytes:
        """Return a field's payload; the caller has checked its size."""
        length = field.end - field.begin
        if length > _LARGE_WINDOW:
            return self.file.read(field.begin, length)
        window, index = self._view(field.begin, length)
        return window[index : index + length]

    def check_text(self, field: Field) -> None:
        """Raise LF118 unless the payload is UTF-8: the protobuf library would hand it out as bytes."""
        try:
            if field.end - field.begin <= _LARGE_WINDOW:
                self.read(field).decode()
                return
            decoder = codecs.getincrementaldecoder("utf-8")()
            for offset in range(field.begin, field.end, _LARGE_WINDOW):
                decoder.decode(self.file.read(offset, min(_LARGE_WINDOW, field.end - offset)))
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise self.refuse(field.start, "a string that is not UTF-8") from None

    def is_ascii(self, field: Field) -> bool:
        """Say whether a message has only strings, and messages, of ASCII: the quick way past most of a model's text."""
        length = field.end - field.begin
        if length > _LARGE_WINDOW:
            return False
        window, index = self._view(field.begin, length)
        end = index + length
        try:
            while index < end:
                tag, size = window[index], window[index + 1]
                start = index + 2
                if size > 0x7F:
                    size, start = decode_varint(window, index + 1)
                index = start + size
                if tag > 0x7F or tag & 7 != LENGTH or not window[start:index].isascii():
                    return False
        except (IndexError, ValueError):
            return False
        return index == end

    def refuse(self, offset: int, found: str, end: int | None = None) -> LoraformatError:
        """Return the error about what stands at `offset`."""
        expected = "" if end is None else f"at most byte {end}"
        return refuse("LF118", self.file.path, f"at byte {offset}: {found}", expected)

    def _view(self, position: int, length: int) -> tuple[bytes, int]:
        """Return the window that holds `length` bytes from `position` (fewer at the file's end), and their index."""
        index = position - self._start
        if index < 0 or index + length > len(self._window):
            self._move(position, length)
            index = position - self._start
        return self._window, index

    def _move(self, position: int, length: int) -> None:
        """Read another window: a large one where we read on, a small one where a payload was skipped."""
        near = 0 <= position - self._start < len(self._window) + _LARGE_WINDOW
        size = max(length, _LARGE_WINDOW if near and self._window else _SMALL_WINDOW)
        self._start = position
        self._window = self.file.read(position, min(size, self.file.size_bytes - position))


def _decode_field(window: bytes, index: int, origin: int) -> Field:
    start = index
    tag = window[index]
    index += 1
    if tag > 0x7F:
        tag, index = decode_varint(window, start)
    number, wire = tag >> 3, tag & 7
    if not 1 <= number < 1 << 29:
        raise ValueError(f"field number {number}")
    prefix = index
    if wire == LENGTH:
        length = window[index]
        index += 1
        if length > 0x7F:
            length, index = decode_varint(window, prefix)
        return Field(number, wire, origin + start, origin + prefix, origin + index, origin + index + length)
    if wire == VARINT:
        length = decode_varint(window, index)[1] - index
    elif wire in _FIXED_BYTES:
        length = _FIXED_BYTES[wire]
    else:
        raise ValueError(f"wire type {wire}, where ONNX has 0, 1, 2 or 5")
    return Field(number, wire, origin + start, origin + prefix, origin + index, origin + index + length)
