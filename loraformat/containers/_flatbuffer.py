"""Tables, vectors and strings of a flatbuffer, read in place; every offset is checked before it is followed.

Source: the FlatBuffers internals page (google/flatbuffers 25). Offsets are unsigned 32-bit numbers that count forward
from where they stand; a table begins with a signed 32-bit distance back to its vtable.
"""

import struct
from dataclasses import dataclass
from typing import Final

from loraformat.errors import LoraformatError, refuse
from loraformat.limits import MAX_DIMS, MAX_NAME_BYTES
from loraformat.spans import InputFile, Span

_VTABLE_HEAD_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Buffer:
    """A file that is one flatbuffer."""

    file: InputFile

    def number(self, position: int, form: str = "<I") -> int:
        """Return the number at `position`, in `struct`'s notation."""
        return int(struct.unpack(form, self.bytes(position, struct.calcsize(form)))[0])

    def bytes(self, position: int, length: int) -> bytes:
        """Return `length` bytes at `position`."""
        if position < 0 or position + length > self.file.size_bytes:
            raise self.fault(f"{length} bytes at byte {position}", f"a place in its {self.file.size_bytes} bytes")
        return self.file.read(position, length)

    def follow(self, position: int) -> int:
        """Return the place that the offset at `position` names."""
        offset = self.number(position)
        if not offset:
            raise self.fault(f"the offset 0 at byte {position}", "an offset that goes forward")
        return position + offset

    def vector(self, position: int, item_bytes: int) -> tuple[int, int]:
        """Return the number of items of the vector at `position`, and where the first stands."""
        count = self.number(position)
        first = position + 4
        if first + count * item_bytes > self.file.size_bytes:
            raise self.fault(f"{count} items of {item_bytes} bytes at byte {first}", "items inside the file")
        return count, first

    def fault(self, found: str, expected: str) -> LoraformatError:
        """Return the error for damage."""
        return refuse("LF133", self.file.path, found, expected)


class Table:
    """One table; fields are numbered as in the schema, from 0."""

    def __init__(self, buffer: Buffer, position: int) -> None:
        self.buffer = buffer
        self.position = position
        vtable = position - buffer.number(position, "<i")
        size = buffer.number(vtable, "<H")
        if size < _VTABLE_HEAD_BYTES or size % 2:
            raise buffer.fault(f"a vtable of {size} bytes at byte {vtable}", f"{_VTABLE_HEAD_BYTES} or more, even")
        raw = buffer.bytes(vtable, size)
        self._fields = struct.unpack(f"<{size // 2}H", raw)[2:]

    def place(self, field: int) -> int | None:
        """Return where a field stands, None when it is left out."""
        offset = self._fields[field] if field < len(self._fields) else 0
        return self.position + offset if offset else None

    def number(self, field: int, form: str = "<i") -> int:
        """Return a number, 0 when it is left out."""
        place = self.place(field)
        return 0 if place is None else self.buffer.number(place, form)

    def text(self, field: int) -> str:
        """Return a string, empty when it is left out; LF103 when it is not UTF-8."""
        place = self.place(field)
        if place is None:
            return ""
        length, first = self.buffer.vector(self.buffer.follow(place), 1)
        if length > MAX_NAME_BYTES:
            raise refuse("LF110", self.buffer.file.path, f"a name of {length} bytes", f"at most {MAX_NAME_BYTES}")
        try:
            return self.buffer.bytes(first, length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise refuse("LF103", self.buffer.file.path, f"a name at byte {first}", "UTF-8 text") from error

    def sizes(self, field: int) -> tuple[int, ...]:
        """Return a vector of 64-bit integers: a shape."""
        place = self.place(field)
        if place is None:
            return ()
        count, first = self.buffer.vector(self.buffer.follow(place), 8)
        if count > MAX_DIMS:
            raise refuse("LF110", self.buffer.file.path, f"{count} dimensions", f"at most {MAX_DIMS}")
        return struct.unpack(f"<{count}q", self.buffer.bytes(first, 8 * count))

    def span(self, field: int) -> Span:
        """Return where a vector of bytes lies; one that is left out is empty."""
        place = self.place(field)
        if place is None:
            return Span(self.buffer.file.path, self.position, 0)
        length, first = self.buffer.vector(self.buffer.follow(place), 1)
        return Span(self.buffer.file.path, first, length)

    def tables(self, field: int, most: int) -> "tuple[Table, ...]":
        """Return the tables of a vector; LF110 for more than `most`."""
        place = self.place(field)
        if place is None:
            return ()
        count, first = self.buffer.vector(self.buffer.follow(place), 4)
        if count > most:
            raise refuse("LF110", self.buffer.file.path, f"{count} parameters", f"at most {most}")
        return tuple(Table(self.buffer, self.buffer.follow(first + 4 * index)) for index in range(count))
